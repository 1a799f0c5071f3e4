"""Jobs that can no longer go on end soon, on all ranks, with the cause in one line; nothing is left of them."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher import audit, watchdog
from launcher.run_dir import Ledger
from launcher.signals import StopFlag
from launcher.watchdog import OomKills, Watchdog, is_effect
from runs import (
    PRETRAIN,
    SCRIPTS,
    assert_same_state,
    deepspeed,
    free_port,
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
@pytest.mark.parametrize(
    ("victim", "launch"),
    [
        pytest.param(0, torchrun, marks=pytest.mark.long),
        (0, deepspeed),
        pytest.param(1, torchrun, marks=pytest.mark.fault(9)),
        pytest.param(1, deepspeed, marks=[pytest.mark.fault(9), pytest.mark.long]),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
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
@pytest.mark.parametrize(
    ("launch", "rank"),
    [
        (torchrun, 1),
        pytest.param(torchrun, 0, marks=pytest.mark.long),
        (deepspeed, 0),
        pytest.param(deepspeed, 1, marks=pytest.mark.long),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("where", ["at-start", pytest.param("in-agreement", marks=pytest.mark.long), "in-engine"])
def test_a_rank_that_is_killed_before_the_first_step_ends_the_start(where, launch, rank, corpus, tmp_path):
    """Before they have met, their launcher alone can tell; gloo while they compare their code; then their watchdogs."""
    recipe, log = write_recipe(tmp_path, corpus), tmp_path / "log"
    process = start(injected(f"die-{where}", rank, 0, recipe, "parallel.timeout_s=1800", launch=launch), log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    events = Ledger(tmp_path / "runs/test").events()
    if where != "in-engine":
        others = r"Signal 9 \(SIGKILL\)|exits with return code = -9|Connection (closed|reset) by peer"
        assert re.search(others, text), text[-3000:]
        assert not events
    else:
        cause = rf"rank {rank} on \S+ failed first, .*start-up of step 0: its process was ended from outside"
        assert re.search(cause, text), text[-3000:]
        assert [bool(re.match(cause, event["error"])) for event in events] == [True] * rank  # written by rank 0
    run(launch(2, "--config", recipe, "train.steps=4"), tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "launch"),
    [
        ("forward", 0, deepspeed),  # with which the ranks' meeting place ends
        pytest.param("forward", 1, deepspeed, marks=pytest.mark.long),
        pytest.param("forward", 1, torchrun, marks=pytest.mark.long),
        *((where, 1, torchrun) for where in ("backward", "reduce", "update")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.fault(2)
def test_a_killed_rank_is_named_and_the_run_goes_on_exactly(where, rank, launch, undisturbed, corpus, tmp_path):
    """SIGKILL within step 13, of which 10 are saved; then the same command without the fault."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    process = start(injected(f"die-in-{where}", rank, 13, recipe, launch=launch), log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    assert re.search(
        rf"rank {rank} on \S+ failed first, .*while rank \d was in \w+ of step 13,.*: its process was ended from outside",
        text,
    ), text[-3000:]
    assert not re.search(rf"rank {1 - rank} on \S+ failed first", text)
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
    assert failed[0]["error"].endswith(
        "ZeroDivisionError: division by zero; traceback in logs/start-0001-rank-00001.log"
    )
    own, effect = (stacks(tmp_path / "runs/test", rank) for rank in (1, 0))
    assert own.endswith("\nZeroDivisionError: division by zero\n")
    assert effect.endswith(f"\nThe cause: {failed[0]['error']}\n")


@pytest.fixture
def memory_group():
    """A control group of 2 GiB within this process's; skips where none can be made."""
    limits = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    *_, (controllers, path) = sorted((controllers, path) for _, controllers, path in lines if controllers in limits)
    top, limit = limits[controllers]
    group = Path(top, path.strip("/"), f"longhaul-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error}")
    try:
        try:
            (group / limit).write_text(str(2**31))
        except OSError as error:
            pytest.skip(f"needs a control group that limits memory: {error}")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():  # of a job that did not end
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.5)
        group.rmdir()


@pytest.mark.slow
@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "launch",
    [torchrun, pytest.param(deepspeed, marks=pytest.mark.long)],
    ids=lambda value: value.__name__,
)
def test_a_rank_that_is_killed_for_want_of_memory_is_named(launch, memory_group, undisturbed, corpus, tmp_path):
    """The job in a control group, as SLURM puts it into one; the kernel ends the rank that takes most."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    command = injected("out-of-memory", 1, 13, recipe, launch=launch)
    process = start(["sh", "-c", f'echo $$ > {memory_group}/cgroup.procs && exec "$@"', "sh", *command], log)
    text = ends(process, recipe, log)
    assert process.returncode != 0
    cause = (
        r"rank 1 on \S+ failed first, .*while rank 0 was in \w+ of step 13,.*: its process was killed, out of memory"
    )
    assert re.search(cause, text), text[-3000:]
    failed = [event for event in Ledger(run_dir).events() if event["event"] == "failed"]
    assert [bool(re.match(cause, event["error"])) for event in failed] == [True]
    run(torchrun(2, "--config", recipe), tmp_path / "again")
    assert_same_state(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_killed_on_another_host_is_named_though_nobody_there_saw_it(victim, corpus, tmp_path):
    """Each rank has a host name of its own, so that none is the neighbour of another. Rank 0 keeps the meeting place."""
    recipe, run_dir, port = write_recipe(tmp_path, corpus), tmp_path / "runs/test", free_port()
    probe = subprocess.run(["unshare", "--uts", "hostname", "node0"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"needs the right to name hosts: {probe.stderr.decode().strip()}")
    python = [str(SCRIPTS / "python"), PRETRAIN, "--config", str(recipe), "train.steps=100000"]
    tasks = [
        start(
            ["unshare", "--uts", "sh", "-c", f'hostname node{rank} && exec "$@"', "sh", *python], tmp_path / f"log{rank}",
            RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_step(run_dir, 6, tasks[0])
    tasks[victim].kill()
    text = ends(tasks[1 - victim], recipe, tmp_path / f"log{1 - victim}")
    assert tasks[1 - victim].returncode == 1
    expected = {
        0: r"rank 0 on node0, or the launcher that keeps the ranks' meeting place, does not answer any more",
        1: r"rank 1 on node1 failed first, .*while rank 0 was in \w+ of step \d+,.*: it does not answer any more; rank 0 on",
    }
    assert re.search(expected[victim], text), text[-3000:]
    if victim == 1:
        assert re.match(expected[1], Ledger(run_dir).events()[-1]["error"])


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
    ("whom", "number"),
    [
        ("runner", "KILL"),
        pytest.param("runner", "TERM", marks=pytest.mark.long),
        pytest.param("launch.py", "KILL", marks=pytest.mark.long),
        ("launch.py", "TERM"),
        ("torchrun", "KILL"),
    ],
)
@pytest.mark.fault(8)
def test_ranks_save_and_leave_when_their_launcher_ends(whom, number, corpus, tmp_path):
    """DeepSpeed alone leaves them running without anybody who knows of them; torchrun keeps their meeting place."""
    recipe, run_dir, log = write_recipe(tmp_path, corpus), tmp_path / "runs/test", tmp_path / "log"
    more = ["train.steps=100000", "--allow-change", "train.steps", "optim.schedule=constant"]
    process = start((torchrun if whom == "torchrun" else deepspeed)(2, "--config", recipe, *more), log)
    wait_for_step(run_dir, 4, process)
    ranks = rank_pids(recipe)
    others = [pid for pid in pids_of(recipe) if pid not in ranks and pid != process.pid]
    os.kill(others[0] if whom == "launch.py" else process.pid, getattr(signal, f"SIG{number}"))
    ends(process, recipe, log)
    stopped = [event for event in Ledger(run_dir).events() if event["event"] == "stopped"]
    assert len(stopped) == 1
    if number == "KILL":
        assert (stopped[0]["signal"], stopped[0]["cause"]) == (None, "the end of its launcher")
    assert (run_dir / f"checkpoints/step-{stopped[0]['step']:08d}/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.fault(20)
@pytest.mark.long
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
    monkeypatch.setattr(watchdog, "_log_files", list)  # pytest has one of its own
    watch = Watchdog(Lone(), 60, StopFlag())
    watch.enter("step", 7, (48, 56))
    host = watch._peers[0].host
    own, later = ValueError("no such thing"), KeyError("later")
    first = watch.failed(own)
    assert first == (
        f"rank 0 on {host} failed first, in step of step 7, samples 48 to 55: ValueError: no such thing; traceback in its "
        "output"
    )
    assert watch.failed(later) == first
    assert (is_effect(own), is_effect(later), later.__notes__) == (False, True, [f"The cause: {first}"])
    watch.close()


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/job/task_1", "job/task_1/memory.events"),
        ("0::/", "memory.events"),  # in a container
        ("0::/../elsewhere", "memory.events"),
        ("4:memory:/job", "memory/job/memory.oom_control"),
        ("4:cpu,memory:/seen/from/outside", "memory/memory.oom_control"),
    ],
)
def test_oom_kills_are_counted_where_the_kernel_tells(line, file, tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_text(f"9:cpuset:/\n{line}\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("low 0\noom 5\noom_kill 3\noom_group_kill 0\n")
    kills = OomKills(7, tmp_path, tmp_path)
    assert not kills.rose()
    (tmp_path / file).write_text("low 0\noom 6\noom_kill 4\noom_group_kill 0\n")
    assert kills.rose()


def test_without_a_count_nobody_was_out_of_memory(tmp_path):
    assert not OomKills(7, tmp_path, tmp_path).rose()
