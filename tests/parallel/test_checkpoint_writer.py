"""Writing beside the training: whole or absent, in the background, failures told alike on every rank and tried again."""

import os
import shutil
import subprocess
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import parallel.checkpoint_writer as module
from parallel.checkpoint import CheckpointReader, committed_steps, faults, file_hash
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig, ParallelConfig
from parallel.retention import to_retire
from parallel.state import KINDS
from ranks import Alone, LoneEngine, build, manifest_of, run_ranks, run_steps


class Runs:
    """A writer in one process, and what it said."""

    def __init__(self, folder, **cfg):
        self.outcomes, self.engine = [], LoneEngine()
        self.writer = CheckpointWriter(folder, Alone(), CheckpointConfig(**cfg), self.outcomes.append)

    def save(self, step, **totals):
        self.writer.save(self.engine, manifest_of(self.engine, step, totals=totals))
        return self.writer.wait()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path):
    runs = Runs(tmp_path, keep=2)
    for step in range(1, 6):
        assert runs.save(step).error is None
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000005"]
    assert [outcome.step for outcome in runs.outcomes] == [1, 2, 3, 4, 5]


def test_the_one_that_was_resumed_from_stays(tmp_path):
    """It has been read and compared with its hashes; of those written since nobody knows that they can be read."""
    runs = Runs(tmp_path, keep=1)
    for step in (1, 2):
        runs.save(step)
    resumed = Runs(tmp_path, keep=1)
    for step in (3, 4):
        resumed.save(step)
    assert committed_steps(tmp_path) == [2, 4]


def test_some_are_kept_for_good(tmp_path):
    runs = Runs(tmp_path, keep=1, keep_every=4, keep_every_hours=2.0)
    for step in range(1, 10):
        runs.save(step, train_s=step * 1800.0)
    assert committed_steps(tmp_path) == [1, 4, 8, 9]  # 1, 4 and 8 begin two hours each; 4 and 8 also divide


@pytest.mark.parametrize(
    ("cfg", "retired"),
    [
        ({"keep": 0}, []),
        ({"keep": 3}, [10, 20, 30]),
        ({"keep": 9}, []),
        ({"keep": 1, "keep_every": 20}, [10, 30, 50]),
        ({"keep": 1, "keep_every_hours": 1.0}, [30, 40]),  # 10 and 50 are of unknown time: they stay
    ],
)
def test_which_are_retired(cfg, retired):
    train_s = {20: 5.0, 30: 10.0, 40: 3599.0, 60: 3600.0}
    assert to_retire([10, 20, 30, 40, 50, 60], CheckpointConfig(**cfg), train_s) == retired


@pytest.mark.fault(6)
def test_what_is_being_removed_is_no_checkpoint(tmp_path, monkeypatch):
    """The manifest goes first, so that whatever stops the rest leaves nothing that looks whole."""
    runs = Runs(tmp_path, keep=1)
    runs.save(1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert runs.save(2).error is None
    assert committed_steps(tmp_path) == [2]
    assert (tmp_path / "step-00000001").is_dir()


def test_a_staging_folder_of_a_killed_save_is_removed(tmp_path):
    for step in (1, 7):
        (tmp_path / f"step-0000000{step}.0a1b2c3d.staging").mkdir()
        (tmp_path / f"step-0000000{step}.0a1b2c3d.staging/rank-00009.safetensors").write_text("half")
    assert Runs(tmp_path).save(1).error is None
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert names(tmp_path / "step-00000001") == ["manifest.json", "rank-00000.safetensors"]


def test_a_staging_folder_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch, caplog):
    left, rmtree = tmp_path / "step-00000001.0a1b2c3d.staging", shutil.rmtree
    left.mkdir()

    def busy(path, **options):
        if path == left:
            raise OSError(16, "Device or resource busy", str(path / ".nfs0001"))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert Runs(tmp_path).save(1).error is None
    assert names(tmp_path) == ["latest", "step-00000001", left.name]
    assert f"cannot remove {left}, left by a save that was killed: [Errno 16]" in caplog.text


def test_the_training_goes_on_meanwhile(tmp_path, monkeypatch):
    """What is written is the state at the call, though the thread comes to it later; the next save waits for it."""
    may_go, write = threading.Event(), module._write_shard
    monkeypatch.setattr(module, "_write_shard", lambda *args: (may_go.wait(20), write(*args))[1])
    runs = Runs(tmp_path)
    runs.writer.save(runs.engine, manifest_of(runs.engine, 1))
    for tensor in runs.engine.state.values():
        tensor += 100  # the next update
    assert runs.outcomes == []
    threading.Timer(0.2, may_go.set).start()
    began = time.monotonic()
    runs.writer.save(runs.engine, manifest_of(runs.engine, 2))
    assert time.monotonic() - began > 0.15  # it waited for the first
    assert runs.writer.wait().step == 2
    for step, first in ((1, 0.0), (2, 100.0)):
        assert CheckpointReader(tmp_path / f"step-0000000{step}").tensor("w").tolist() == [first + i for i in range(4)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no memory for the file")])
def test_a_write_that_fails_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, error):
    """Whatever kind of error it is, the ranks agree on it; one that did not would leave the others waiting."""
    runs, write = Runs(tmp_path), module.write_safetensors
    runs.save(1)

    def full(*_):
        raise error

    monkeypatch.setattr(module, "write_safetensors", full)
    outcome = runs.save(2)
    assert outcome.error == f"writing the checkpoint failed on 1 of 1 ranks; rank 0: {type(error).__name__}: {error}"
    assert not outcome.not_finite
    assert runs.writer.failures == 1
    assert names(tmp_path) == ["latest", "step-00000001"]
    monkeypatch.setattr(module, "write_safetensors", write)
    assert runs.save(3).error is None
    assert committed_steps(tmp_path) == [1, 3]


def test_old_checkpoints_that_cannot_be_listed_fail_no_save(tmp_path, monkeypatch):
    """Only one rank removes them, after all have committed: were it to count that as a failure, ranks would disagree."""

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    runs = Runs(tmp_path)
    monkeypatch.setattr(module, "retire", broken)
    assert runs.save(1).error is None
    assert (runs.writer.failures, runs.writer.committed_step) == (0, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(36)
def test_state_that_is_not_finite_is_never_committed(tmp_path, kind, value):
    runs = Runs(tmp_path)
    runs.save(1)
    runs.engine.state[kind][2] = value
    outcome = runs.save(2)
    assert f"rank 0: the {kind} of w is not finite at element 2" in outcome.error
    assert outcome.not_finite
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_large_values_are_finite_though_their_sum_is_not(tmp_path):
    runs = Runs(tmp_path)
    runs.engine.state["weight"][:] = 3e38
    assert runs.save(1).error is None
    assert CheckpointReader(tmp_path / "step-00000001").tensor("w").tolist() == [torch.tensor(3e38).item()] * 4


def test_the_file_is_what_the_safetensors_library_reads_and_its_hash_that_of_its_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight:a.b:0": 7, 'weight:"ü":5': 1, "exp_avg:a.b:0": 300_001}
    tensors = {name: torch.randn(n, generator=generator) for name, n in sizes.items()}
    digest = module.write_safetensors(tmp_path / "x.safetensors", tensors)
    assert digest == file_hash(tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_job_that_may_not_write_any_more_commits_nothing(tmp_path):
    def lost():
        raise OSError("the run was taken over by host b, pid 9")

    runs = Runs(tmp_path)
    runs.writer._before_commit = lost
    assert "the run was taken over by host b, pid 9" in runs.save(1).error
    assert committed_steps(tmp_path) == []


@pytest.mark.parametrize("when", ["before the leftovers are removed", "before it has prepared", "before it commits"])
@pytest.mark.fault(22)
def test_a_job_that_lost_the_folder_in_the_middle_of_a_save_leaves_its_successors_alone(tmp_path, monkeypatch, when):
    """It was stopped there; the other has the same step under way and has removed what it found."""
    mine, lost = Runs(tmp_path), []
    mine.save(1)

    def taken_over(removing=True):
        lost.append("the run was taken over")
        for leftover in tmp_path.glob("*.staging") if removing else []:
            shutil.rmtree(leftover)
        (tmp_path / "step-00000002.0a1b2c3d.staging").mkdir()
        (tmp_path / "step-00000002.0a1b2c3d.staging/rank-00000.safetensors").write_text("half")

    def refuse():
        if lost:
            raise OSError(lost[0])

    mine.writer._before_commit = refuse
    if when == "before the leftovers are removed":  # just after the look at the lease
        mine.writer._before_commit = lambda: refuse() if lost else taken_over()
    elif when == "before it has prepared":
        usage = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: (taken_over(), usage(folder))[1])
    else:
        write = module.write_synced
        monkeypatch.setattr(module, "write_synced", lambda *args: (write(*args), taken_over(removing=False)))
    assert "OSError: the run was taken over" in mine.save(2).error
    assert committed_steps(tmp_path) == [1]
    theirs = tmp_path / "step-00000002.0a1b2c3d.staging"
    assert names(theirs) == ["rank-00000.safetensors"]
    assert [p.name for p in tmp_path.glob("*.staging")] == [theirs.name]


@pytest.mark.fault(15)
def test_a_latest_that_cannot_be_written_fails_no_save(tmp_path, caplog):
    """The checkpoint is committed by then; a link is replaced and what it leads to stays as it is."""
    runs, outside = Runs(tmp_path / "checkpoints"), tmp_path / "outside"
    runs.save(1)
    latest = tmp_path / "checkpoints/latest"
    latest.unlink()
    latest.mkdir()
    assert runs.save(2).error is None
    assert runs.writer.committed_step == 2
    assert "step-00000002 is saved, but what comes after it failed: [Errno 21] Is a directory" in caplog.text
    latest.rmdir()
    outside.write_text("theirs")
    latest.symlink_to(outside)
    assert runs.save(3).error is None
    assert (outside.read_text(), latest.is_symlink(), latest.read_text()) == ("theirs", False, "step-00000003\n")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 10 MiB, for two checkpoints of 4."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(mesh, folder, spare):
    """Saves on a disk that is filled and emptied again: what each rank was told."""
    module.SPARE_BYTES = spare
    engine = build(mesh, ParallelConfig(zero_stage=1, precision="fp32"))
    writer = CheckpointWriter(folder / "checkpoints", mesh, CheckpointConfig(keep=1))
    told = []
    for step in (1, 2, 3):
        run_steps(engine, range(step - 1, step))
        if mesh.rank == 0 and step == 2:
            (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - 400_000))
        if mesh.rank == 0 and step == 3:
            (folder / "others").unlink()
        mesh.barrier()
        writer.save(engine, manifest_of(engine, step))
        told.append(writer.wait().error)
    engine.close()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, -(2**40)], ids=["looked at before", "found out by writing"])
@pytest.mark.fault(17)
def test_a_full_disk_is_told_alike_on_all_ranks_and_tried_again(small_disk, spare):
    told = run_ranks(2, fill_up, small_disk, spare)
    assert told[0] == told[1]
    assert told[0][0] is None
    assert told[0][2] is None
    match = "GB free, the checkpoint takes" if spare == 0 else "No space left on device"
    assert match in told[0][1]
    checkpoints = small_disk / "checkpoints"
    assert names(checkpoints) == ["latest", "step-00000003"]
    assert faults(checkpoints / "step-00000003") == []
