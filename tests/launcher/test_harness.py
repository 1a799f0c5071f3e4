"""lm-eval through the export: its numbers are the run's own, and stay with the run."""

import json
import sys

import pytest
import torch
from task_runs import make_bert, make_tuned_run

from launcher import export, harness
from launcher.trained import open_checkpoint
from model.hf_folder import CONFIG

TEXT = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n"
TASK = """
task: ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0}}
"""


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    return make_tuned_run(tmp_path_factory.mktemp("runs"), corpus, "llama", {"kind": "chat"})


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PROOF_CHARACTERS", 2**14)
        patch.setattr(export, "PROOF_TOKENS", 256)
        assert export.main([str(run_dir), "--output", str(folder)]) == 0
    return folder


def pieces_of(tokenizer, start, end):
    """(ids of the start, ids of the end, whether a piece reaches over the border)."""
    text = start.rstrip()
    whole, before = tokenizer.encode(start + end).tolist(), tokenizer.encode(text).tolist()
    if whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :], False
    return before, tokenizer.encode(start[len(text) :] + end).tolist(), True


@pytest.mark.slow
def test_log_likelihoods_are_the_runs(run_dir, folder):
    pytest.importorskip("lm_eval", reason=f"lm-eval takes 300 MB: {harness.INSTALL}")
    from lm_eval.api.instance import Instance

    checkpoint = open_checkpoint(run_dir, 2)
    ours, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    pairs = [(TEXT[max(0, at - 16) : at], TEXT[at : at + 10]) for at in range(1, len(TEXT) - 10, 2)]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = harness.model_of(folder, "fp32", 4).loglikelihood(requests)
    over = 0
    for (start, end), (value, _) in zip(pairs, found, strict=True):
        before, answer, reaches_over = pieces_of(tokenizer, start, end)
        over += reaches_over
        ids = torch.tensor([*before, *answer])
        with torch.inference_mode():
            chosen = ours(ids[None, :-1])[0, :, : tokenizer.vocab_size].log_softmax(-1).gather(1, ids[1:, None])
        assert value == pytest.approx(chosen[-len(answer) :].sum().item(), abs=1e-4)
    assert 0 < over < len(pairs)


@pytest.mark.slow
def test_a_task_is_scored_and_kept_with_the_run(run_dir, folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason=f"lm-eval takes 300 MB: {harness.INSTALL}")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"start": "import ", "ends": ["os", "sys"], "right": right} for right in (0, 1, 1, 1)]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ends.yaml").write_text(TASK.format(data=tmp_path / "ends.jsonl"))
    arguments = [str(folder), "--tasks", "ends", "--include-path", str(tmp_path), "--run", str(run_dir), "--save", "e"]
    assert harness.main(arguments) == 0
    accuracy = json.loads((run_dir / "evaluations/e/step-00000002.json").read_text())["overall"]["ends/acc"]
    assert accuracy in (0.25, 0.75)  # the same answer each time
    assert f"ends/acc         {accuracy:.4f}" in capsys.readouterr().out
    assert list((run_dir / "tensorboard/evaluations/e").iterdir())
    assert harness.main([str(folder), "--tasks", "ends,nothing", "--include-path", str(tmp_path)]) == 2
    assert "--tasks nothing: lm-eval has no such task" in capsys.readouterr().err
    assert harness.main([*arguments, "--limit", "2"]) == 2
    assert (
        "--save e: its results are of ends, not of ends the first 2 of each; choose another" in capsys.readouterr().err
    )


def refused(capsys, *arguments):
    assert harness.main([*map(str, arguments), "--tasks", "piqa"]) == 2
    return capsys.readouterr().err


def test_without_lm_eval_it_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(capsys, folder)
    assert "lm-eval is needed (" in said
    assert "); run: pip install -c constraints.txt -e '.[harness]'" in said


def test_what_does_not_go_together_is_refused(folder, run_dir, tmp_path, capsys):
    assert "--run and --save go together" in refused(capsys, folder, "--save", "x")
    assert "--limit 0; expected at least 1" in refused(capsys, folder, "--limit", 0)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    assert f"--run {other}: {folder} is of the run llama; name the folder of that run" in refused(
        capsys, folder, "--run", other, "--save", "x"
    )
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    assert f"{tmp_path / 'export_report.json'} does not say of what run and step it is (" in refused(
        capsys, tmp_path, "--run", run_dir, "--save", "x"
    )
    assert f"{tmp_path / 'x' / CONFIG}: " in refused(capsys, tmp_path / "x")


def test_what_continues_no_text_is_refused(tmp_path, capsys):
    folder = make_bert(tmp_path / "bert", [TEXT])
    assert f"{folder} continues no text, as tasks of lm-eval ask for" in refused(capsys, folder)
