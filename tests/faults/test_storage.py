"""A disk that is full, read-only, slow or seen late, and damaged checkpoints, under whole runs of two ranks."""

import contextlib
import os
import re
import shutil
import subprocess
import time

import pytest

from launcher.run_dir import Ledger
from parallel.checkpoint import committed_steps
from runs import injected, kill, metrics, run, start, torchrun, wait_for_step
from straight import OPTIONS, STEPS

pytestmark = pytest.mark.slow


def wait_for_text(log, pattern, process, seconds=60):
    """The match, as soon as the run's output has it."""
    until = time.monotonic() + seconds
    while (found := re.search(pattern, log.read_text(errors="replace"))) is None:
        assert process.poll() is None, f"the run ended without {pattern!r}\n{log.read_text()[-3000:]}"
        assert time.monotonic() < until, f"no {pattern!r} in {seconds} s"
        time.sleep(0.01)
    return found


def through_a_fault(recipe, log, run_dir, begin, end, *more):
    """A run of 60 steps with a fault of the disk from step 7 until 3 steps after a save has failed; what it printed."""
    options = (*OPTIONS, "checkpoint.every=10", "checkpoint.retry_every=4")
    process = start(injected("slow-steps", 0, 1, recipe, *options, *more), log)
    try:
        wait_for_step(run_dir, 7, process)
        begin()
        try:
            step = int(wait_for_text(log, r"step (\d+) could NOT be saved, training goes on", process)[1])
            wait_for_text(log, rf"\bstep +{step + 3}/{STEPS}", process)
            assert max(committed_steps(run_dir / "checkpoints"), default=0) < step
        finally:
            end()
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            kill(recipe, process)
    return log.read_text()


def assert_told_and_retried(run_dir):
    events = [event for event in Ledger(run_dir).events() if event["event"].startswith("checkpoint")]
    failed = [event["step"] for event in events if event["event"] == "checkpoint_failed"]
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert failed[0] == 10
    assert [step for step in saved if step % 10], "it was not tried again before the next save was due"
    assert saved[-1] == STEPS
    assert not list((run_dir / "checkpoints").glob("*.staging"))


@pytest.mark.fault(17, 18)
def test_a_disk_that_is_full_for_a_while(may_mount, straight, recipe, tmp_path):
    """Not a byte is left for checkpoint, ledger, metrics, logs and records; all that is not lost for good is there later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk], check=True)
    try:
        text = through_a_fault(
            recipe, tmp_path / "log", disk / "test", lambda: fill(disk / "ballast"), (disk / "ballast").unlink,
            f"run.folder={disk}",
        )  # fmt: skip
        assert "No space left on device" in text
        assert "metrics.jsonl cannot be written ([Errno 28]" in text
        assert_told_and_retried(disk / "test")
        straight.assert_equal(disk / "test")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(path):
    """Until the kernel takes not one byte more."""
    with open(path, "wb", buffering=0) as file:
        for block in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(block)):
                    pass


@pytest.mark.fault(19)
def test_a_folder_that_is_read_only_for_a_while(may_mount, straight, recipe, tmp_path):
    """A read-only mount over it: what is open goes on, what is opened is refused."""
    run_dir = tmp_path / "runs/test"

    def begin():
        subprocess.run(["mount", "--bind", run_dir, run_dir], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", run_dir], check=True)

    text = through_a_fault(
        recipe, tmp_path / "log", run_dir, begin, lambda: subprocess.run(["umount", "-l", run_dir], check=True)
    )
    assert re.search(r"could NOT be saved, .*Read-only file system", text)
    assert "ledger.jsonl cannot be written ([Errno 30] Read-only file system" in text
    assert_told_and_retried(run_dir)
    straight.assert_equal(run_dir)


SLOW_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int fsync(int fd) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, ".safetensors")) sleep(30);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""


@pytest.mark.long
@pytest.mark.fault(20)
def test_storage_that_takes_30_s_for_a_sync(straight, recipe, tmp_path):
    """Three times the limit of a phase. The steps go on meanwhile, the end waits, nobody takes it for a hang."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "slow.c").write_text(SLOW_FSYNC)
    library, log, run_dir = tmp_path / "slow.so", tmp_path / "log", tmp_path / "runs/test"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "slow.c", "-ldl"], check=True)
    options = (*OPTIONS, "checkpoint.every=30", "parallel.timeout_s=10")
    text = run(torchrun(2, "--config", recipe, *options), log, LD_PRELOAD=str(library))
    saves = [event["time"] for event in Ledger(run_dir).events() if event["event"] == "checkpoint"]
    assert len(saves) == 2
    assert saves[1] - saves[0] > 29  # the last one was slow, too
    assert "failed first" not in text
    assert "the job hangs" not in text
    assert text.index(f"step {STEPS}/{STEPS}") < text.index("step 30  saved")
    assert "finished: 60 steps" in text
    assert max(line["speed/step_time_s"] for line in metrics(run_dir) if "speed/step_time_s" in line) < 5
    straight.assert_equal(run_dir)


@pytest.mark.fault(21)
def test_a_rank_that_sees_the_checkpoints_late_is_waited_for(may_mount, straight, recipe, tmp_path):
    run_dir = tmp_path / "runs/test"
    straight.begun(run_dir, 20)
    text = run(injected("late-view", 1, 0, recipe, *OPTIONS), tmp_path / "log")
    assert "[rank 1] " in text
    assert "step-00000020 is not seen whole on this machine yet; waiting for it up to 60 s" in text
    assert "resumed from " in text
    assert Ledger(run_dir).events()[-1]["event"] == "finished"
    starts = [event["step"] for event in Ledger(run_dir).events() if event["event"] == "start"]
    assert starts == [0, 20]
    straight.assert_equal(run_dir)


@pytest.mark.fault(21)
def test_a_rank_that_never_sees_the_checkpoints_ends_the_start_and_damages_none(may_mount, straight, recipe, tmp_path):
    run_dir = tmp_path / "runs/test"
    straight.begun(run_dir, 20)
    text = run(injected("no-view", 1, 0, recipe, *OPTIONS), tmp_path / "log", code=1)
    assert f"rank 1 on {os.uname().nodename} does not see " in text
    assert "checkpoints/step-00000020/manifest.json, which rank 0 sees; is " in text
    assert committed_steps(run_dir / "checkpoints") == [5, 10, 15, 20]


@pytest.mark.fault(16)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(straight, recipe, tmp_path):
    """As where the disk that they are on is not mounted."""
    run_dir = tmp_path / "runs/test"
    straight.begun(run_dir, 10)
    shutil.move(run_dir / "checkpoints", tmp_path / "elsewhere")
    text = run(torchrun(2, "--config", recipe, *OPTIONS), tmp_path / "log", code=1)
    assert re.search(r"checkpoints has no checkpoint, yet .*ledger.jsonl tells of one of step 60. Restore it", text)
    assert Ledger(run_dir).events()[-1]["event"] == "failed"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)


@pytest.mark.fault(12, 13, 14)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(straight, recipe, tmp_path):
    """A bit, a missing half and a missing shard: three checkpoints are passed over, each told, and the end is the same."""
    run_dir = tmp_path / "runs/test"
    straight.begun(run_dir, 25)
    damage(run_dir / "checkpoints/step-00000025/rank-00001.safetensors", "bit")
    damage(run_dir / "checkpoints/step-00000020/rank-00000.safetensors", "half")
    (run_dir / "checkpoints/step-00000015/rank-00001.safetensors").unlink()
    text = run(torchrun(2, "--config", recipe, *OPTIONS), tmp_path / "log")
    for step, what in ((25, "rank-00001.safetensors: xxh3"), (20, "bytes, the manifest says"), (15, "No such file")):
        assert re.search(rf"step-000000{step} is damaged and set aside: .*{what}", text)
    assert "step-00000010, written by 2 ranks" in text
    straight.assert_equal(run_dir)


@pytest.mark.fault(16)
def test_a_run_without_a_whole_checkpoint_stops(straight, recipe, tmp_path):
    run_dir = tmp_path / "runs/test"
    straight.begun(run_dir, 10)
    for step in (5, 10):
        damage(run_dir / f"checkpoints/step-{step:08d}/rank-00000.safetensors", "bit")
    text = run(torchrun(2, "--config", recipe, *OPTIONS), tmp_path / "log", code=1)
    assert "has checkpoints but none that is whole (damaged: step-00000005, step-00000010)" in text
    assert committed_steps(run_dir / "checkpoints") == []
    assert "none that is whole" in Ledger(run_dir).events()[-1]["error"]
