"""A run does not end for its numbers: a folder that fails under way is told once, and written again when it can be."""

import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest

from launcher import metrics as module
from launcher import pretrain
from launcher.config import load_config
from launcher.metrics import MetricsLog
from launcher.saving import Progress
from parallel.engine import UpdateResult
from runs import PRETRAIN, metrics, start, wait_for_step, write_recipe


def curve(run_dir):
    """Steps of TensorBoard's points, as it reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in board.Scalars("loss/train")] if "loss/train" in board.Tags()["scalars"] else []


def fill(path):
    """Put in the place of a file one that takes nothing, as on a full disk; gives what puts it back."""
    path.rename(aside := path.with_name("aside"))
    path.symlink_to("/dev/full")
    return lambda: aside.rename(path)


@pytest.mark.fault(18)
def test_lines_are_kept_while_the_disk_is_full(tmp_path, caplog):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 7):
        if step == 3:
            restore = fill(tmp_path / "metrics.jsonl")
        if step == 5:
            restore()
        log.write(step, {"loss/train": 1.0})
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (
        caplog.text.count("metrics.jsonl cannot be written ([Errno 28] No space left on device); its lines are kept")
        == 1
    )
    assert curve(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(18)
def test_lines_that_are_left_at_the_end_are_written_then(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss/train": 1.0})
    restore = fill(tmp_path / "metrics.jsonl")
    log.write(2, {"loss/train": 1.0})
    restore()
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.fault(56)
def test_a_removed_folder_is_made_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss/train": 1.0})
    log._draw(lambda board: board.flush())  # as its thread does every 10 s
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "metrics.jsonl").unlink()
    log.write(2, {"loss/train": 1.0})
    log._draw(lambda board: board.flush())
    assert f"TensorBoard in {tmp_path}/tensorboard fails ([Errno 2] No such file or directory" in caplog.text
    for step in (3, 4):
        log.write(step, {"loss/train": 1.0})
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]
    assert curve(tmp_path) == [3, 4]


class Raising:
    """A TensorBoard that takes some points and then nothing more, nor lets itself be closed."""

    made = 0

    def __init__(self, *_, **__):
        Raising.made += 1
        self.points = 0

    def add_scalar(self, *_):
        self.points += 1
        if self.points > 2:
            raise ValueError("nonsense")

    def close(self):
        raise OSError("not now")


@pytest.mark.fault(56)
def test_a_tracker_that_raises_is_told_once_and_tried_again_later(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "SummaryWriter", Raising)
    monkeypatch.setattr(Raising, "made", 0)
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 11):
        log.write(step, {"loss/train": 1.0})
    assert Raising.made == 1
    now += module.RETRY_S
    for step in range(11, 21):
        log.write(step, {"loss/train": 1.0})
    assert Raising.made == 2
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 21))
    assert caplog.text.count("fails (nonsense); what it misses is in") == 1
    assert len(caplog.records) == 1


@pytest.mark.fault(56)
def test_a_tracker_that_fails_when_it_is_closed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "SummaryWriter", Raising)
    MetricsLog(tmp_path, 0).close()
    assert "fails (not now)" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "logs", "metrics.jsonl"])
@pytest.mark.fault(56)
def test_what_cannot_start_is_refused_before_anything_is_started(tmp_path, corpus, capsys, monkeypatch, name):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))
    recipe = write_recipe(tmp_path, corpus)
    wrong = tmp_path / "runs/test" / name
    wrong.parent.mkdir(parents=True)
    if "." in name:
        wrong.mkdir()
    else:
        wrong.write_text("a file where a folder should be")
    assert pretrain.main(["--config", str(recipe)]) == 2
    reason = "Is a directory" if "." in name else "File exists"
    assert f"{wrong} cannot be written: {reason}; choose another place with run.folder" in capsys.readouterr().err


@pytest.mark.fault(18, 56)
def test_a_run_whose_folder_fails_under_way(tmp_path, corpus):
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    process = start(
        [sys.executable, PRETRAIN, "--config", str(recipe), "train.steps=300", "eval.every=0"], tmp_path / "log"
    )
    wait_for_step(run_dir, 3, process)
    (run_dir / "tensorboard").rename(run_dir / "gone")
    (run_dir / "tensorboard").write_text("a file where the folder was")
    fill(run_dir / "metrics.jsonl")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    text = (tmp_path / "log").read_text()
    assert text.count("metrics.jsonl cannot be written") == 1
    assert text.count("TensorBoard in ") == 1
    assert json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])["event"] == "finished"
    assert f"step {300}/300" in text


def test_the_time_that_is_left_is_that_of_a_usual_step(tmp_path, caplog, monkeypatch):
    """The first step of a start takes many times as long."""
    monkeypatch.setattr(pretrain.log, "level", logging.INFO)
    cfg = load_config(str(write_recipe(tmp_path, tmp_path)), ["log.every=4"])
    clock, log = pretrain.Clock(), MetricsLog(tmp_path, 0)
    for step_s in (300.0, 60.0, 61.0, 60.0):
        clock.add(step_s, tokens=256)
    stats = pretrain.Stats([], 6.0, UpdateResult(1.0, True), None)
    pretrain.log_step(cfg, SimpleNamespace(world_size=1), log, Progress(step=4), stats, clock, {})
    assert "step  4/24  loss 6 " in caplog.text
    assert "left 20.2 min" in caplog.text
    assert metrics(tmp_path)[0]["speed/median_step_time_s"] == 60.5
