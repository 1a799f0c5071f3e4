"""An export as int8: what plain transformers computes from it is what is said, and what it costs is said too."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from task_runs import make_tuned_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from launcher import evaluate, export, generate, label
from launcher.config import ConfigError
from launcher.origin import open_origin
from launcher.trained import open_checkpoint
from model import int8
from model.hf_folder import read_config

LABELS = ["good", "bad", "so so"]


@pytest.fixture(scope="session")
def chat(corpus, tmp_path_factory):
    """A run of a Llama, its second step made and not trained."""
    return make_tuned_run(tmp_path_factory.mktemp("runs"), corpus, "llama", {"kind": "chat"})


@pytest.fixture(autouse=True)
def short_proof(monkeypatch):
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    monkeypatch.setattr(export, "PROOF_TOKENS", 256)


def run_export(run_dir, output, *more, code=0):
    assert export.main([str(run_dir), "--output", str(output), "--dtype", "int8", *map(str, more)]) == code
    return output


def report_in(folder):
    return json.loads((folder / "export_report.json").read_text())


def test_it_says_what_was_saved_and_what_it_cost(chat, tmp_path, capsys):
    folder = run_export(chat, tmp_path / "out", "--shard-size", "30KB")
    said, card, report = capsys.readouterr().out, (folder / "README.md").read_text(), report_in(folder)
    assert report["dtype"] == "int8"
    assert report["logits"]["equal"]
    found = report["int8"]
    assert found["matrices"] == 14
    sizes = {name: parameter.numel() for name, parameter in open_checkpoint(chat, 2).model().named_parameters()}
    assert found["parameters"] == sum(size for name, size in sizes.items() if re.search(r"\.w\w*\.weight$", name))
    on_disk = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    assert found["weight_bytes"] < on_disk < 1.3 * found["weight_bytes"]  # these headers are large
    assert found["weight_bytes"] < found["weight_bytes_bf16"] == 2 * report["parameters"]
    for text in (said, card):
        assert (
            f"14 matrices of the blocks, {found['parameters']:,} of {report['parameters']:,} parameters, are int8"
            in text
        )
        assert re.search(r"same 256 tokens: the loss is \d\.\d{6} in place of \d\.\d{6} \([+-]0\.\d{6}\), and \d", text)
        assert "transformers needs compressed-tensors (pip install compressed-tensors)" in text


def test_the_price_is_that_of_the_same_windows(chat, tmp_path, monkeypatch):
    seen = {}
    plain = export.proof_windows

    def windows_of(*arguments):
        seen["windows"], seen["targets"] = plain(*arguments)
        return seen["windows"], seen["targets"]

    monkeypatch.setattr(export, "proof_windows", windows_of)
    folder = run_export(chat, tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    here = open_checkpoint(chat, 2).model()
    losses, same = [0.0, 0.0], []
    with torch.inference_mode():
        for window, target in zip(seen["windows"], seen["targets"], strict=True):
            pair = here(window[None])[0, :, :512], there(window[None]).logits[0]
            for i, logits in enumerate(pair):
                losses[i] += F.cross_entropy(logits, target, reduction="sum").item()
            same += (pair[0].argmax(-1) == pair[1].argmax(-1)).tolist()
    n = sum(int((target != -100).sum()) for target in seen["targets"])
    report = report_in(folder)
    assert report["int8"]["unquantized"]["loss"] == pytest.approx(losses[0] / n, abs=1e-5)
    assert report["logits"]["loss_there"] == pytest.approx(losses[1] / n, abs=1e-5)
    assert losses[0] != losses[1]
    assert report["int8"]["unquantized"]["same_choice"] == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize(("family", "kind"), [("llama", "tag"), ("bert", "classify")])
def test_a_model_for_labels(family, kind, corpus, tmp_path, capsys):
    task = {"kind": kind, "labels": LABELS if kind == "classify" else ["O", "B-PER", "I-PER"]}
    run_dir = make_tuned_run(tmp_path / "runs", corpus, family, task)
    folder = run_export(run_dir, tmp_path / "out")
    auto = AutoModelForSequenceClassification if kind == "classify" else AutoModelForTokenClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 512, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, near = model(tokens).logits, open_checkpoint(run_dir, 2).model()(tokens)
    assert logits.std() > 0.1
    near = near if kind == "tag" else near[:, -1]
    assert 0 < (near - logits).abs().max() < 0.05 * near.abs().max()
    assert {"score", "classifier"} & set(model.config.quantization_config.quantization_config.ignore)
    assert report_in(folder)["int8"]["unquantized"]["loss"] is None
    assert "on the same" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(capsys, run_dir, output):
    before = sorted(output.parent.iterdir())
    run_export(run_dir, output, code=2)
    assert sorted(output.parent.iterdir()) == before
    return capsys.readouterr().err


def test_gpt2_is_refused(corpus, tmp_path, capsys):
    run_dir = make_tuned_run(tmp_path / "runs", corpus, "gpt2", {"kind": "chat"})
    message = refused(capsys, run_dir, tmp_path / "out")
    assert "--dtype int8 is for linear layers, and GPT-2's are Conv1D in transformers" in message


def test_without_the_package_it_is_refused(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert "--dtype int8 needs compressed-tensors" in refused(capsys, chat, tmp_path / "out")


def test_a_wrong_scale_is_found(chat, tmp_path, capsys, monkeypatch):
    plain = int8.Scale.blocks

    def wrong(self, read):
        for scale in plain(self, read):
            scale[3] *= 1.01
            yield scale

    monkeypatch.setattr(int8.Scale, "blocks", wrong)
    run_export(chat, tmp_path / "out", code=1)
    assert "transformers' logits differ from the run's by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_reads_folders_refuses_one(chat, tmp_path, capsys):
    folder = run_export(chat, tmp_path / "out")
    why = re.escape(
        f"{folder / 'config.json'}: its weights are quantized (compressed-tensors), and are read here as they were trained "
        "alone; name the run or the folder that it was made from, or use transformers"
    )
    with pytest.raises(ValueError, match=why):
        read_config(folder)
    for command, more in ((generate, ["--prompt", "x"]), (evaluate, []), (label, ["--text", "x"])):
        capsys.readouterr()
        assert command.main([str(folder), *more]) == 2
        assert re.search(why, capsys.readouterr().err)
    with pytest.raises(ConfigError, match=why):
        open_origin(str(folder))
