"""Preference tuning as a user types it: pairs are read, the reference is kept, the better answer becomes likelier."""

import json

import pytest
import torch
from task_runs import make_origin, tune, write_lines, write_recipe
from transformers import AutoModelForCausalLM

from data.chat import PlainTemplate
from data.preference import encode_pairs, read_pairs
from data.records import RecordError
from data.task import PreferenceTask
from data.tokenizer import load_tokenizer
from launcher import evaluate, export, pretrain
from launcher.finetune import FINETUNE
from launcher.reference import FILE
from runs import assert_same_state, losses, metrics, run

PAIRS = [{"prompt": f"name number {i}", "chosen": f"def number_{i}():", "rejected": f"import {i}"} for i in range(10)]
TEXTS = [f"### User:\nname number {i}\n\n### Assistant:\ndef number_{i}(): import {i}\n" for i in range(50)]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("hf") / "llama", TEXTS)


@pytest.fixture
def recipe(origin, tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", PAIRS) for name in ("p", "v")]
    task = {"kind": "preference", "train": files[:1], "valid": files[1:], "beta": 0.5}
    path = write_recipe(tmp_path, origin, task, steps=8, global_batch_size=4, micro_batch_size=2)
    path.write_text(path.read_text().replace("\ninit:", "\nmodel: {seq_len: 128}\ninit:"))
    return path


@pytest.mark.slow
@pytest.mark.long  # four starts
def test_the_better_answer_becomes_the_likelier_one(origin, recipe, tmp_path, capsys):
    """Two ranks of ZeRO 3, stopped and resumed without the reference's model, against one that never stops."""
    straight = tmp_path / "runs/straight"
    zero3 = ["parallel.zero_stage=3"]
    text = run(tune(2, "--config", recipe, "run.name=straight", *zero3), tmp_path / "log")
    assert "10 pairs" in text
    first = losses(straight)[1]
    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)  # it is its own reference yet
    run(tune(2, "--config", recipe, "train.stop_at=3", *zero3), tmp_path / "log2", code=1)
    run_dir = tmp_path / "runs/tuned"
    before = (run_dir / FILE).read_bytes()
    run(tune(2, "--config", recipe, *zero3), tmp_path / "log2")
    assert (run_dir / FILE).read_bytes() == before
    assert_same_state(straight, run_dir)
    assert losses(straight) == losses(run_dir)
    other = ["run.name=other", "parallel.zero_stage=0", "parallel.activation_checkpointing=full"]
    run(tune(1, "--config", recipe, *other), tmp_path / "log4")
    for step, loss in losses(tmp_path / "runs/other").items():
        assert loss == pytest.approx(losses(straight)[step], rel=1e-3, abs=1e-5)
    last = next(line for line in reversed(metrics(run_dir)) if "valid/preferred" in line)
    assert last["valid/preferred"] == 1.0
    assert last["valid/margin"] > 1
    assert evaluate.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["overall"]["loss/valid"] == pytest.approx(last["loss/valid"], rel=1e-4)
    assert evaluate.main([str(run_dir), "--data", "x.jsonl"]) == 2
    assert "a preference is scored against the model that the tuning began with" in capsys.readouterr().err
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    write_lines(tmp_path / "v.jsonl", PAIRS)
    assert evaluate.main([str(run_dir), "--json"]) == 0
    others = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    write_lines(tmp_path / "v.jsonl", others)
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--json"]) == 2  # as many, and not those that the reference is of
    assert "the held-out pairs are not those of the run; restore the files" in capsys.readouterr().err
    (run_dir / FILE).write_bytes(before[:-1] + b"x")
    text = run(tune(1, "--config", recipe, "--allow-change", "train.steps", "train.steps=9"), tmp_path / "log3", code=1)
    assert "what the model made of the pairs before its first step, cannot be used: its xxh3 is" in text


def test_a_row_is_both_answers_after_the_prompt(origin):
    template = PlainTemplate(load_tokenizer(origin))
    task = PreferenceTask(kind="preference", train=["-"])
    chosen, rejected = ("x y", "z")
    file = origin.parent / "one.jsonl"
    write_lines(file, [{"prompt": "a", "chosen": chosen, "rejected": rejected}])
    [row] = encode_pairs(read_pairs(task, [str(file)]), template, 64).rows
    for document, answer in ((0, chosen), (1, rejected)):
        here = row.documents == document
        targets = row.targets[here]
        counted = targets[targets != -100]
        assert template.tokenizer.decode(counted) == answer
        assert counted[-1] == template.tokenizer.eos_id
        assert template.tokenizer.decode(row.tokens[here]).startswith("### User:\na\n\n### Assistant:\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "same", "rejected": "same"}, "p.jsonl, line 1: chosen and rejected are the same"),
        ({"rejected": ""}, "of the assistant, is ''; expected a string that is not empty"),
        ({"prompt": 3}, "its prompt is 3; expected a string or a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "the last message of prompt is of the assistant"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, "has the role 'bot'"),
        ({"chosen": "x " * 200}, "and both are read in one row: model.seq_len=128 is the longest"),
    ],
)
def test_bad_pairs_are_refused_before_anything_is_started(change, message, recipe, tmp_path, capsys):
    write_lines(tmp_path / "p.jsonl", [PAIRS[0] | change])
    assert pretrain.main(["--config", str(recipe)], FINETUNE) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_missing_field_and_a_beta_of_nothing_are_refused(recipe, tmp_path, capsys):
    assert pretrain.main(["--config", str(recipe), "task.beta=0.0"], FINETUNE) == 2
    assert "task.beta: got 0.0" in capsys.readouterr().err
    write_lines(tmp_path / "p.jsonl", [{"prompt": "x", "chosen": "y"}])
    with pytest.raises(RecordError, match="there is no field 'rejected'"):
        read_pairs(PreferenceTask(kind="preference", train=["-"]), [str(tmp_path / "p.jsonl")])
