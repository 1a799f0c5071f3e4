"""No run depends on what time it is: clocks differ between hosts, and are set back."""

import ast
import os
import sys

import pytest
from tensorboard.summary.writer import event_file_writer

from launcher import metrics as module
from launcher.metrics import MetricsLog
from parallel.checkpoint import committed_steps
from runs import ROOT, assert_same_state, losses, run, start, wait_for_step, write_recipe

CLOCK = ("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.asctime", "time.strftime")
MODIFIED = ("st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "getmtime", "getctime", "now", "utcnow", "today")
EXCEPTIONS = {
    ("launcher/run_dir.py", "time.time"): "the time of an event in the ledger, for people; events count in their order",
    (
        "launcher/metrics.py",
        "time.time",
    ): "whether TensorBoard, which goes by the time in names, would take files amiss",
    ("launcher/pretrain.py", "time.time"): "how long the run has taken until this start, for where the time went",
    ("launcher/lease.py", "time.strftime"): "since when a folder is held, for people",
    (
        "data/cache.py",
        "time.time_ns",
    ): "which shard was used last, of one machine: another one goes, and is fetched again",
    ("data/cache.py", "st_mtime_ns"): "the same, and whether a file is still the one that was checked",
    ("data/cache.py", "st_ctime_ns"): "whether a file is still the one that was checked",
    ("data/files.py", "st_mtime_ns"): "whether a source is still the one that was listed",
    ("data/prepared.py", "st_mtime_ns"): "whether a source is still the one that was listed",
    ("data/shards.py", "st_mtime_ns"): "whether a shard is still the one that was mapped",
    ("cluster/records.py", "time.time"): "the time of an event of a job, for people and for where the time went",
    ("cluster/status.py", "time.time"): "how long a run that is under way has taken",
    ("cluster/status.py", "time.localtime"): "when a start was, for people",
    ("cluster/status.py", "time.strftime"): "the same",
    ("cluster/report.py", "time.localtime"): "when a page was written, for people",
    ("cluster/report.py", "time.strftime"): "the same",
    ("cluster/goodput.py", "st_mtime"): "whether somebody writes to the run, where SLURM does not tell",
    ("cluster/preflight.py", "time.time"): "told to the nodes of a job, which compare their own with it",
    ("launcher/preflight.py", "time.time"): "the same: a node whose clock is wrong is left out",
    ("data/corpus.py", "st_mtime_ns"): "a shard newer than its manifest is compared with its hash",
}


def test_where_the_source_asks_for_the_time():
    found = set()
    for folder in ("data", "model", "parallel", "launcher", "cluster"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and (ast.unparse(node) in CLOCK or node.attr in MODIFIED):
                    name = ast.unparse(node) if ast.unparse(node) in CLOCK else node.attr
                    found.add((str(path.relative_to(ROOT)), name))
    assert found == EXCEPTIONS.keys()


def curve(run_dir):
    """step -> value of TensorBoard's points, as it reads them; a step that is there twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss/train")]
    assert len(points) == len(dict(points))
    return dict(points)


@pytest.mark.fault(41)
def test_tensorboard_reads_starts_in_their_order_whatever_their_clocks_said(tmp_path, monkeypatch):
    """Set back again and again, also to the same second."""
    for number, (now, resumed) in enumerate([(900, 0), (500, 3), (500, 5), (1000, 6), (100, 8), (950, 9)]):
        monkeypatch.setattr(module.time, "time", lambda now=now: 1_700_000_000.0 + now)
        monkeypatch.setattr(event_file_writer, "os", FakePid(1000 - number))  # the name goes on with host and pid
        log = MetricsLog(tmp_path, resumed)
        for step in range(resumed + 1, resumed + 5):
            log.write(step, {"loss/train": float(number)})
        log.close()
    assert [curve(tmp_path)[step] for step in range(1, 14)] == [0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 5]


class FakePid:
    """os for a writer that believes to be another process."""

    def __init__(self, pid):
        self.getpid = lambda: pid

    def __getattr__(self, name):
        return getattr(os, name)


def command(recipe, hours):
    """One rank whose clock is wrong by so many hours."""
    arguments = ["--config", str(recipe), "train.steps=12", "eval.every=12", "checkpoint.every=2", "checkpoint.keep=2"]
    program = (
        "import sys, time\n"
        f"right = time.time; time.time = lambda: right() + {hours} * 3600\n"
        f"import launcher.pretrain as p; p.leave(p.main({arguments!r}))\n"
    )
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("hours", [-24, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.fault(41)
def test_a_run_whose_clock_jumps_between_two_starts(corpus, tmp_path, hours):
    straight, recipe = write_recipe(tmp_path, corpus, "straight"), write_recipe(tmp_path, corpus)
    run(command(straight, 0), tmp_path / "straight.log")
    run_dir = tmp_path / "runs/test"
    process = start(command(recipe, 0), tmp_path / "log")
    wait_for_step(run_dir, 7, process)
    while not committed_steps(run_dir / "checkpoints"):  # the save goes on beside the training
        assert process.poll() is None
    process.kill()
    process.wait()
    saved = committed_steps(run_dir / "checkpoints")
    text = run(command(recipe, hours), tmp_path / "log")
    assert "resumed from" in text
    assert_same_state(run_dir, tmp_path / "runs/straight")
    assert losses(run_dir) == losses(tmp_path / "runs/straight")
    assert committed_steps(run_dir / "checkpoints") == sorted({saved[-1], 10, 12})  # the first was resumed from
    assert (run_dir / "checkpoints/latest").read_text() == "step-00000012\n"
    assert sorted(curve(run_dir)) == list(range(1, 13))
