"""Fine-tuning as a user types it: the same loop, stops and resumes; its best checkpoint stays, and its result is a model."""

import json
import math
import shutil

import pytest
from test_origin import write_recipe

from exports import make_run
from launcher import audit, checkpoint, evaluate, export, generate
from launcher.config import EvalConfig
from launcher.finetune import FINETUNE
from launcher.origin_config import load_finetune_config
from launcher.run_dir import Ledger
from launcher.saving import Progress
from launcher.start import is_finished, parse_arguments
from parallel.checkpoint import committed_steps, read_manifest
from runs import PRETRAIN, run, torchrun


def tune(ranks, *arguments):
    return [word.replace(PRETRAIN, "launcher/finetune.py") for word in torchrun(ranks, *arguments)]


@pytest.mark.slow
def test_stopped_resumed_without_its_origin_ended_early_and_used(corpus, tmp_path, capsys):
    origin = make_run(tmp_path / "runs", corpus, "llama")
    recipe = write_recipe(tmp_path, f"{origin}@1", corpus)
    run_dir, log = tmp_path / "tuned/tuned", tmp_path / "log"
    best = ["eval.keep_best=loss/valid", "eval.patience=2"]
    text = run(
        tune(2, "--config", recipe, "parallel.zero_stage=3", "train.stop_at=9", *best), log, code=1
    )  # torchrun's
    assert f"loaded 21 tensors, 103,152 numbers, from {origin}@1 (digest " in text
    [start] = [event for event in Ledger(run_dir).events() if event["event"] == "start"]
    manifest = read_manifest(run_dir / "checkpoints/step-00000009")
    assert start["origin_digest"] == manifest.config["origin"]["digest"]
    assert (start["init"], start["origin_step"]) == (f"{origin}@1", 1)
    # another topology, the origin is gone, and from here on the model stays as it is
    shutil.rmtree(origin)
    no_better = ["--allow-change", "optim.lr", "optim.lr=1e-30"]
    text = run(tune(3, "--config", recipe, "parallel.zero_stage=1", *best, *no_better), log)
    assert "  best by loss/valid: " in text
    assert f"launcher/generate.py {run_dir} --prompt 'def ' --step 12\n" in text
    assert "  ended before step 24 by eval.patience: loss/valid was not better in 2 evaluations" in text
    finished = Ledger(run_dir).events()[-1]
    assert finished["event"] == "finished"
    assert (finished["best_step"], finished["step"]) == (12, 20)
    # checkpoint.keep is 1: the newest, and the best, and what the start went on from
    assert committed_steps(run_dir / "checkpoints") == [9, 12, 20]
    cfg = load_finetune_config(recipe, ["parallel.zero_stage=1", *best, "optim.lr=1e-30"])
    assert is_finished(cfg)
    assert not is_finished(load_finetune_config(recipe, [*best, "eval.patience=3", "optim.lr=1e-30"]))
    assert checkpoint.main(["prune", str(run_dir), "--keep", "1"]) == 0
    assert committed_steps(run_dir / "checkpoints") == [12, 20]
    assert checkpoint.main(["list", str(run_dir)]) == 0
    assert "best of its evaluations until then" in capsys.readouterr().out.splitlines()[-3]
    assert audit.main([str(run_dir), "--verify"]) == 0
    capsys.readouterr()
    # what was made of it is a model like any other
    assert evaluate.main([str(run_dir), "--step", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["overall"]["loss"] == pytest.approx(finished["best_score"], rel=1e-5)
    assert generate.main([str(run_dir), "--step", "12", "--prompt", "def ", "--tokens", "4"]) == 0
    assert export.main([str(run_dir), "--step", "12", "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "fine-tuned" in card
    assert "pretrained with" not in card


def test_patience_counts_evaluations_that_were_not_better(corpus):
    cfg = EvalConfig(keep_best="loss/valid", patience=2)
    progress = Progress()
    for step, loss, since in [(1, 5.0, 0), (2, 4.0, 0), (3, 4.0, 1), (4, math.nan, 2), (5, 3.0, 0)]:
        progress.step = step
        progress.note_score({"loss/valid": loss}, cfg)
        assert progress.since_best == since
    progress.note_score({}, cfg)  # it could not be made: that is told, and is no reason to end
    assert (progress.best, progress.best_step, progress.since_best) == (3.0, 5, 0)
    score = Progress(step=1)
    for value in (0.5, 0.75, 0.7):
        score.note_score({"valid/accuracy": value}, EvalConfig(keep_best="valid/accuracy"))
    assert (score.best, score.since_best) == (0.75, 1)


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], FINETUNE)
    assert "launcher/finetune.py --config configs/finetune/text.yaml init=runs/embedded@600" in " ".join(
        capsys.readouterr().out.split()
    )
