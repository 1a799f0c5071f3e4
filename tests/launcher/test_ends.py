"""Ranks do not outlive their launcher while they start, nor train on when it is told to end; more in test_watchdog.py."""

import os
import re
import signal
import time

import pytest
from test_watchdog import ends, pids_of

from launcher.launchers import Launcher, launchers_of, leaving_with_launcher, process_start_of
from launcher.run_dir import Ledger
from runs import deepspeed, rank_pids, start, torchrun, wait_for_step, write_recipe

LONG = ["train.steps=100000", "--allow-change", "train.steps", "optim.schedule=constant"]


def wait_for_ranks(recipe, n=2, timeout=60):
    deadline = time.monotonic() + timeout
    while len(rank_pids(recipe)) < n:
        assert time.monotonic() < deadline, f"{n} ranks were not started in {timeout} s: {rank_pids(recipe)}"
        time.sleep(0.02)


def launch_py(recipe, runner):
    ranks = rank_pids(recipe)
    (pid,) = [pid for pid in pids_of(recipe) if pid not in (runner.pid, *ranks)]
    return pid


# -- while the ranks start ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["runner", "launch.py"])
@pytest.mark.parametrize("after_s", [1, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_do_not_outlive_a_launcher_that_is_killed_while_they_start(whom, after_s, corpus, tmp_path):
    """Before the launcher was noted ahead of torch's import, they trained on with nobody who knew of them."""
    recipe, log = write_recipe(tmp_path, corpus), tmp_path / "log"
    process = start(deepspeed(2, "--config", recipe, *LONG), log)
    wait_for_ranks(recipe)
    time.sleep(after_s)
    os.kill(process.pid if whom == "runner" else launch_py(recipe, process), signal.SIGKILL)
    text = ends(process, recipe, log)
    assert re.search("launcher of this rank (has ended; stopping|ended before the ranks had met)", text), text[-3000:]


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_do_not_wait_for_its_store(corpus, tmp_path):
    """It keeps their meeting place: they would try for parallel.timeout_s to reach it."""
    recipe, log = write_recipe(tmp_path, corpus), tmp_path / "log"
    process = start(torchrun(2, "--config", recipe, *LONG, "parallel.timeout_s=1800"), log)
    wait_for_ranks(recipe)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    assert "the launcher of this rank ended before the ranks had met; nothing was started" in ends(process, recipe, log)


# -- while they train ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["runner", "launch.py"])
@pytest.mark.parametrize("number", ["USR1", pytest.param("INT", marks=pytest.mark.long)])
def test_ranks_save_and_leave_on_other_signals_to_deepspeed(whom, number, corpus, tmp_path):
    """KILL and TERM are in test_watchdog.py."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    process = start(deepspeed(2, "--config", recipe, *LONG), log)
    wait_for_step(run_dir, 4, process)
    os.kill(process.pid if whom == "runner" else launch_py(recipe, process), getattr(signal, f"SIG{number}"))
    ends(process, recipe, log)
    stopped = [event for event in Ledger(run_dir).events() if event["event"] == "stopped"]
    assert len(stopped) == 1
    assert (run_dir / f"checkpoints/step-{stopped[0]['step']:08d}/manifest.json").exists()


# -- who is a launcher --------------------------------------------------------------------------------------------------


@pytest.fixture
def made_proc(tmp_path):
    """A /proc of made processes: {pid: (parent, command)}."""

    def make(processes):
        for pid, (parent, command) in processes.items():
            folder = tmp_path / str(pid)
            folder.mkdir()
            (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 0 0")
            (folder / "cmdline").write_text(command.replace(" ", "\0"))
        return tmp_path

    return make


RANK = "python -u launcher/pretrain.py"
RUNNER, LAUNCH = "python /e/bin/deepspeed launcher/pretrain.py", "python -u -m deepspeed.launcher.launch --world_info=x"


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([RANK, LAUNCH, RUNNER, "bash"], [101, 102]),
        ([RANK, "bash wrap.sh", LAUNCH, RUNNER], [102, 103]),
        ([RANK, LAUNCH, "bash", "sshd"], [101]),  # of another node, through pdsh
        ([RANK, "python /e/bin/torchrun --nproc-per-node=2", "bash"], [101]),
        ([RANK, "python -m torch.distributed.run --nproc-per-node=2", "bash"], [101]),
        ([RANK, "slurmstepd: [7.0]"], []),  # srun
        ([RANK, "bash", "vim deepspeed.md"], []),
    ],
)
def test_the_launchers_of_a_rank(made_proc, chain, expected):
    proc = made_proc({100 + n: (101 + n if n + 1 < len(chain) else 0, command) for n, command in enumerate(chain)})
    assert [launcher.pid for launcher in launchers_of(100, {"RANK": "0"}, proc)] == expected
    assert launchers_of(100, {}, proc) == []  # one process under nohup, whoever started it


def test_a_launcher_of_the_same_number_is_another_one():
    start_ = process_start_of(os.getpid())
    assert not Launcher(os.getpid(), start_).ended()
    assert Launcher(os.getpid(), start_ + 1).ended()


def test_a_process_without_a_launcher_may_wait():
    with leaving_with_launcher([]):
        pass
