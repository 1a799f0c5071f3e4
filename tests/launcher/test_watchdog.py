"""Jobs that can no longer go on end soon, on all ranks, with the cause in one line; nothing is left of them."""

import os
import re
import signal
import time

import pytest

from launcher import audit
from launcher.run_dir import Ledger
from launcher.signals import StopFlag
from launcher.watchdog import Watchdog, _oom_kills
from runs import (
    assert_same_state,
    deepspeed,
    injected,
    losses,
    rank_pids,
    run,
    start,
    torchrun,
    wait_for_step,
    write_recipe,
)

SOON_S = 60  # where DeepSpeed alone takes half an hour, or 30 s a rank


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("straight")
    run(torchrun(2, "--config", write_recipe(folder, corpus)), folder / "log")
    return folder / "runs/test"


def pids_of(recipe):
    """All processes that name the recipe: launchers and ranks."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(recipe) in words and int(entry) != os.getpid():
                found.append(int(entry))
    return sorted(found)


def ends(process, recipe, log, within_s=SOON_S):
    """The text of a job that ends by itself, with none of its processes left."""
    process.wait(within_s)
    deadline = time.monotonic() + within_s
    while pids_of(recipe):
        assert time.monotonic() < deadline, f"left: {pids_of(recipe)}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
    return log.read_text(errors="replace")


def stacks(run_dir, rank):
    (file,) = sorted(run_dir.glob(f"logs/start-*-rank-{rank:05d}.log"))[-1:]
    return file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, deepspeed], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.fault(9))])
def test_a_stopped_rank_is_named_and_the_job_ends(launch, victim, corpus, tmp_path):
    """Under deepspeed rank 0 keeps the store over which the ranks tell each other where they are."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    process = start(launch(2, "--config", recipe, "parallel.timeout_s=8", "train.steps=100000"), log)
    wait_for_step(run_dir, 6, process)
    os.kill(rank_pids(recipe)[victim], signal.SIGSTOP)
    text = ends(process, recipe, log)
    assert process.returncode != 0, text[-3000:]
    cause = re.search(rf"rank {victim} on \S+ does not answer, .*; (others wait|this rank waits) in \w+ of step \d+, "
                      r"samples \d+ to \d+; the limit is parallel.timeout_s=8. Stacks are in logs/", text)  # fmt: skip
    assert cause, text[-3000:]
    assert "Thread 0x" in stacks(run_dir, 1 - victim)
    assert "in train_step" in stacks(run_dir, 1 - victim)
    if victim == 1:  # else nobody is left who may write to the ledger
        assert (
            "does not answer"
            in [event for event in Ledger(run_dir).events() if event["event"] == "failed"][-1]["error"]
        )


@pytest.mark.slow
@pytest.mark.fault(9)
def test_a_rank_that_is_stopped_for_less_than_the_limit_changes_nothing(undisturbed, corpus, tmp_path):
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    process = start(torchrun(2, "--config", recipe, "parallel.timeout_s=20"), tmp_path / "log")
    wait_for_step(run_dir, 6, process)
    victim = rank_pids(recipe)[1]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(10)
    os.kill(victim, signal.SIGCONT)
    assert process.wait(120) == 0
    assert re.search(r"waiting for \d+ s in .* the limit is parallel.timeout_s=20: rank 1 on \S+ does not answer",
                     (tmp_path / "log").read_text())  # fmt: skip
    assert_same_state(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.parametrize(("launch", "rank"), [(torchrun, 1), (deepspeed, 0)], ids=["torchrun", "deepspeed"])
def test_a_rank_that_is_killed_before_the_ranks_have_met_ends_the_start(launch, rank, corpus, tmp_path):
    recipe, log = write_recipe(tmp_path, corpus), tmp_path / "log"
    process = start(injected("die-at-start", rank, 0, recipe, "parallel.timeout_s=20", launch=launch), log)
    ends(process, recipe, log)
    assert process.returncode != 0
    assert not Ledger(tmp_path / "runs/test").events()
    run(launch(2, "--config", recipe, "train.steps=4"), tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "launch"),
    [("forward", deepspeed), *((where, torchrun) for where in ("forward", "backward", "reduce", "update"))],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.fault(2)
def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(where, launch, undisturbed, corpus, tmp_path):
    """SIGKILL within step 13, of which 10 are saved; then the same command without the fault."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    process = start(injected(f"die-in-{where}", 1, 13, recipe, launch=launch), log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    assert re.search(r"rank 1 on \S+ failed first, last seen in .*: its process was ended from outside", text), text[
        -3000:
    ]
    run(torchrun(2, "--config", recipe), tmp_path / "again")
    assert losses(run_dir) == losses(undisturbed)
    assert_same_state(run_dir, undisturbed)
    assert audit.main([str(run_dir), "--verify"]) == 0


@pytest.mark.slow
def test_an_error_on_one_rank_is_the_cause_that_all_tell(corpus, tmp_path):
    recipe, log = write_recipe(tmp_path, corpus), tmp_path / "log"
    process = start(injected("raise-in-forward", 1, 7, recipe, launch=deepspeed), log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    assert "failed first, in forward of step 7, samples 48 to 55: ZeroDivisionError: division by zero" in text
    failed = [event for event in Ledger(tmp_path / "runs/test").events() if event["event"] == "failed"]
    assert re.match(r"rank 1 on \S+ failed first, in forward of step 7", failed[0]["error"])


@pytest.mark.slow
@pytest.mark.fault(10)
def test_a_straggler_is_named_and_nothing_ends(undisturbed, corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)
    text = run(injected("late", 1, 9, recipe, "parallel.timeout_s=16"), tmp_path / "log")
    assert re.search(r"waiting for \d+ s in backward of step 9, samples 64 to 71, the limit is parallel.timeout_s=16: "
                     r"rank 1 on \S+ does not go on, in forward of step 9, samples 64 to 71 for \d+ s", text)  # fmt: skip
    assert_same_state(tmp_path / "runs/test", undisturbed)


@pytest.mark.slow
@pytest.mark.fault(11)
def test_ranks_in_different_collectives_end_with_both_call_sites_in_the_logs(corpus, tmp_path):
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    process = start(injected("desync", 1, 7, recipe, "parallel.timeout_s=8"), log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    assert re.search(r"rank 1 on \S+ does not go on, in forward of step 7.*; others wait in backward of step 7", text)
    assert "another_collective" in stacks(run_dir, 1) + text
    assert "in train_step" in stacks(run_dir, 0) + text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number"), [("runner", "KILL"), ("runner", "TERM"), ("launch.py", "KILL"), ("launch.py", "TERM")]
)
@pytest.mark.fault(8)
def test_ranks_save_and_leave_when_their_launcher_ends(whom, number, corpus, tmp_path):
    """DeepSpeed alone leaves them running without anybody who knows of them."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    more = ["train.steps=100000", "--allow-change", "train.steps", "optim.schedule=constant"]
    process = start(deepspeed(2, "--config", recipe, *more), log)
    wait_for_step(run_dir, 4, process)
    ranks = rank_pids(recipe)
    launch = next(pid for pid in pids_of(recipe) if pid not in ranks and pid != process.pid)
    os.kill(process.pid if whom == "runner" else launch, getattr(signal, f"SIG{number}"))
    ends(process, recipe, log)
    stopped = [event for event in Ledger(run_dir).events() if event["event"] == "stopped"]
    assert [event["signal"] for event in stopped] == ["SIGTERM"]
    assert (run_dir / f"checkpoints/step-{stopped[0]['step']:08d}/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.fault(20)
def test_slow_storage_is_no_hang_and_holds_up_no_step(undisturbed, corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)
    text = run(injected("slow-sync", 0, 2, recipe, "parallel.timeout_s=30"), tmp_path / "log")
    assert "failed first" not in text
    assert text.index("step  9/24") < text.index("step 5  saved") < text.index("step 11/24")  # the next save waits
    assert_same_state(tmp_path / "runs/test", undisturbed)


class Lone:
    """A mesh of one."""

    rank, world_size = 0, 1

    def __init__(self):
        self.values = {}

    def open_store(self):
        return self

    def gather(self, value):
        return [value]

    def barrier(self):
        pass

    def set(self, key, value):
        self.values[key] = value

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key].encode()

    def multi_get(self, keys):
        return [self.values[key].encode() for key in keys]

    def compare_set(self, key, expected, value):
        return self.values.setdefault(key, value).encode()


def test_the_first_failure_stays_the_cause(monkeypatch):
    watch = Watchdog(Lone(), 60, StopFlag())
    watch.enter("step", 7, (48, 56))
    host = watch._peers[0].host
    first = watch.failed(ValueError("no such thing"))
    assert first == f"rank 0 on {host} failed first, in step of step 7, samples 48 to 55: ValueError: no such thing"
    assert watch.failed(KeyError("later")) == first
    watch.close()


def test_oom_kills_are_counted_where_the_kernel_tells():
    assert _oom_kills() >= 0
