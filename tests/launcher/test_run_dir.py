"""The files beside the checkpoints: what a crash or another program left in them does not stop a resume."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launcher.metrics import MetricsLog, describe
from launcher.pretrain import typed_as
from launcher.read_log import ReadLog, read_records
from launcher.run_dir import Ledger, RunDirError

RUBBISH = ["", "{", "3", "null", '{"step": null}', '["step"]', "\x00\x00", '{"st']


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_in_the_ledger_is_left_out(tmp_path, rubbish):
    ledger = Ledger(tmp_path)
    assert ledger.events() == []
    ledger.add("start", step=0)
    with open(ledger.path, "a") as file:
        file.write(rubbish + "\n")
    ledger.add("finished", step=3)
    assert [event["event"] for event in ledger.events()] == ["start", "finished"]
    assert [ledger.tells_finished(step) for step in (0, 3, 4)] == [False, True, False]


def test_a_ledger_that_cannot_be_read_is_no_empty_one(tmp_path):
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(
        RunDirError, match="ledger.jsonl cannot be read: Is a directory; restore it, or use another run.name"
    ):
        Ledger(tmp_path).events()


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_in_the_metrics_is_set_aside_with_what_is_written_again(tmp_path, rubbish):
    lines = [json.dumps({"step": step, "loss/train": 1.0 / step}) for step in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, rubbish]) + "\n")
    log = MetricsLog(tmp_path, resumed_step=3)
    log.write(4, {"loss/train": float("inf")})
    log.close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4]
    assert kept[-1]["loss/train"] == "inf"
    aside = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in aside[:-1]] == [{**json.loads(line), "resumed_step": 3} for line in lines[3:]]
    assert aside[-1] == rubbish


def test_the_log_line_can_hold_any_number():
    values = {
        "a/x": float("inf"),
        "a/y": float("nan"),
        "a/z": 12345.6,
        "loss/train": 3.14159,
        "a/n": 1e30,
        "a/i": 4000.0,
    }
    assert describe(values, list(values)) == "x inf  y nan  z 12,346  loss 3.142  n 1e+30  i 4,000"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fault(18)
def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(small_disk, caplog):
    """Not a line of the ledger and not a record is lost, and none ends the run; a checkpoint would wait for the records."""
    ledger, reads = Ledger(small_disk), ReadLog(small_disk, 1, 0)
    batch = SimpleNamespace(span=(0, 8), digest=7)
    ledger.add("start", step=0)
    reads.add(1, batch)
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    step = 1
    while "cannot be written" not in caplog.text:  # until the last block is full, too
        step += 1
        ledger.add("checkpoint", step=step, path="x" * 500)
        reads.add(step, batch)
    for _ in range(200):
        step += 1
        reads.add(step, batch)
    with pytest.raises(OSError, match="No space left on device"):
        reads.sync()
    (small_disk / "others").unlink()
    ledger.add("finished", step=step)
    reads.sync()
    reads.close()
    events = ledger.events()
    assert [event["event"] for event in events] == ["start", *["checkpoint"] * (len(events) - 2), "finished"]
    assert [event["step"] for event in events[1:-1]] == list(range(2, len(events)))
    assert read_records(small_disk, 1, 0)["step"].tolist() == list(range(1, step + 1))


def test_a_program_is_named_so_that_it_can_be_typed(monkeypatch, tmp_path):
    """Another environment's python on the PATH, a link to the same file, is not this one's."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(other))
    assert typed_as("python") == "own/python"
    monkeypatch.setenv("PATH", str(own))
    assert typed_as("python") == "python"
