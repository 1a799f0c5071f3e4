"""One writer: living holders are refused by name, dead ones replaced, and one of several takers wins, wherever it is cut."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from launcher import lease
from launcher.lease import GONE, Holder, Lease, LeaseLost, _parse, _record, _Watch, sole_writer, this_process
from launcher.run_dir import Ledger, RunDirError
from launcher.saving import tell_saved
from parallel.checkpoint import committed_steps
from parallel.checkpoint_writer import Outcome
from runs import ROOT, environment, kill, rank_pids, start, torchrun, wait_for_step, write_recipe


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leave(run_dir, number=1, **changes) -> Holder:
    """A lease that somebody holds who is not there."""
    holder = this_process().model_copy(update=changes)
    (run_dir / "lease").mkdir(exist_ok=True)
    (run_dir / f"lease/{number:08d}.json").write_bytes(_record(holder))
    return holder


def took_s(run_dir) -> float:
    began = time.monotonic()
    with sole_writer(run_dir, wait_s=0.1):
        return time.monotonic() - began


def script(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]


HOLD = """
    import sys, time
    from pathlib import Path
    from launcher.lease import sole_writer
    with sole_writer(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def holding(run_dir, seconds=100.0, **env) -> subprocess.Popen:
    process = subprocess.Popen(
        script(HOLD, run_dir, seconds), cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, text=True
    )
    assert "held" in process.stdout.readline()
    return process


@pytest.mark.fault(22)
def test_a_living_holder_is_named_and_nothing_is_written(tmp_path):
    holder = holding(tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="2")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    message = (
        rf"{tmp_path} is in use by another job \(host \S+, pid {holder.pid}, SLURM job 17, restart 2, since [-:0-9 ]+; "
        r"(last heartbeat|no heartbeat seen, watched since) \d+ s ago\); stop that one first, or use another run.name"
    )
    try:
        with pytest.raises(RunDirError, match=message), sole_writer(tmp_path, wait_s=0.3):
            pytest.fail("taken")
        assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    finally:
        holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with sole_writer(tmp_path, wait_s=0):  # dead, though its parent has not asked for its end yet
        pass
    holder.wait()


def test_a_holder_that_is_just_finishing_is_waited_for(tmp_path):
    holder = holding(tmp_path, seconds=1.0)
    with sole_writer(tmp_path, wait_s=30):
        assert holder.wait() == 0


def test_a_released_lease_is_free_and_numbers_only_go_up(tmp_path):
    for number in (1, 2, 3):
        with sole_writer(tmp_path, wait_s=0) as mine:
            mine.held()
        assert [path.name for path in (tmp_path / "lease").iterdir()] == [f"{number:08d}.json"]


@pytest.mark.fault(23)
def test_a_pid_that_another_process_has_got_since(tmp_path):
    leave(tmp_path, process_start=1)
    assert took_s(tmp_path) < lease.STALE_S


def test_a_process_that_proc_hides_is_asked_for_by_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "process_start_of", lambda pid: None)
    holder = leave(tmp_path)
    with pytest.raises(RunDirError, match=f"pid {holder.pid}"):
        took_s(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave(tmp_path, pid=ended.pid)
    assert took_s(tmp_path) < lease.STALE_S


@pytest.mark.parametrize("payload", [None, b"", b"{", b'{"host": 3}'], ids=["record", "empty", "cut", "no record"])
@pytest.mark.fault(23)
def test_a_dead_holder_elsewhere_is_replaced_when_its_heartbeat_stands_still(tmp_path, payload):
    """Also one cut while it took the lease. Its clock may say what it likes."""
    leave(tmp_path, machine="another", since="2999-01-01 00:00:00")
    if payload is not None:
        (tmp_path / "lease/00000001.json").write_bytes(payload)
    assert took_s(tmp_path) >= lease.STALE_S


@pytest.mark.fault(22)
def test_a_living_holder_elsewhere_is_refused(tmp_path):
    theirs = Lease(tmp_path / "lease/00000001.json", leave(tmp_path, host="node7", machine="another"))
    try:
        with pytest.raises(RunDirError, match="host node7, .*; last heartbeat 0 s ago"):
            took_s(tmp_path)
    finally:
        theirs.release()


def test_time_in_which_nobody_looked_does_not_count(monkeypatch):
    """A file system that hung for an hour kept the holder from writing as it kept us from reading."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = _Watch(1, b"a")
    for now in (0.5, 3600.0, 3600.2):  # noqa: B007  (time.monotonic returns it)
        watch.look(b"a")
    assert watch.quiet_s == pytest.approx(0.5 + lease.LONGEST_LOOK_S + 0.2)
    watch.look(b"b")
    assert (watch.beats, watch.quiet_s) == (1, 0.0)


@pytest.mark.fault(23)
def test_the_same_slurm_job_requeued_takes_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, machine="another", restarts=0)
    assert took_s(tmp_path) < lease.STALE_S
    leave(tmp_path, number=8, machine="another", restarts=1)
    assert took_s(tmp_path) >= lease.STALE_S


@pytest.mark.parametrize(
    ("answer", "cluster", "gone"),
    [
        *((f"echo {state}", "here", True) for state in GONE),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "here", True),
        ("echo RUNNING", "here", False),
        ("echo COMPLETING", "here", False),
        ("echo a state of next year", "here", False),
        ("echo cannot reach the controller >&2; exit 1", "here", False),
        ("sleep 30", "here", False),
        ("exec no-such-program", "here", False),
        ("echo FAILED", "another", False),  # whose job 17 is another one
    ],
)
@pytest.mark.fault(23)
def test_slurm_is_asked_for_a_holder_elsewhere(tmp_path, monkeypatch, answer, cluster, gone):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --states=all --format=%T --jobs=17" ] || exit 3\n{answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setattr(lease, "SQUEUE_S", 0.3)
    leave(tmp_path, machine="another", job="17", cluster=cluster)
    assert (took_s(tmp_path) < lease.STALE_S) == gone


def test_a_lease_that_cannot_be_written(tmp_path):
    (tmp_path / "lease").write_text("a file where the folder should be")
    with pytest.raises(RunDirError, match="lease cannot be written: File exists; choose another place with run.folder"):
        took_s(tmp_path)


def test_a_full_disk_leaves_no_lease_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunDirError, match="lease cannot be written: No space left on device"):
        took_s(tmp_path)
    assert list((tmp_path / "lease").iterdir()) == []


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    with sole_writer(tmp_path) as mine:
        monkeypatch.setattr(Lease, "_write", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        time.sleep(10 * lease.BEAT_S)
        mine.held()
        monkeypatch.undo()
    assert caplog.text.count("the heartbeat in") == 1


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (2, r"taken by another job \(host node9, pid 4242, SLURM job 18"),
        (1, r"taken by another job \(host node9"),  # after somebody had removed the folder by hand
        (None, "removed, as if this one had died"),
    ],
)
def test_a_lost_lease_says_who_took_it_and_asks_the_run_to_stop(tmp_path, number, how, caplog):
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        with sole_writer(tmp_path) as mine:
            if number is None:
                shutil.rmtree(tmp_path / "lease")
            else:
                leave(tmp_path, number=number, host="node9", pid=4242, job="18")
            with pytest.raises(LeaseLost, match=rf"is no longer this job's: its lease \(host .*\) was {how}"):
                mine.held()
            assert asked.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "is no longer this job's" in caplog.text
    if number is not None:  # who has lost it does not release it for the other
        assert not _parse((tmp_path / f"lease/{number:08d}.json").read_bytes()).released


FORKS = """
    import os, random, signal, sys, threading, time
    from pathlib import Path
    from launcher import lease
    lease.POLL_S, lease.STALE_S = 0.01, 0.02
    os.fsync = lambda handle: None  # what a kill leaves does not depend on it

    def at_each_line(do):
        '''Call do before each line that launcher/lease.py executes in this thread.'''
        def trace(frame, event, _):
            if frame.f_code.co_filename != lease.__file__:
                return None
            if event == "line":
                do()
            return trace
        sys.settrace(trace)

    def leave(run_dir, number, **changes):
        run_dir.joinpath("lease").mkdir(parents=True, exist_ok=True)
        holder = lease.this_process().model_copy(update=changes)
        run_dir.joinpath(f"lease/{number:08d}.json").write_bytes(lease._record(holder))
"""


@pytest.mark.slow
@pytest.mark.fault(23)
def test_killed_at_each_line_of_taking_and_releasing_the_next_start_goes_on(tmp_path):
    code = """
    last, number = sys.argv[2], 0
    while True:
        run_dir = Path(sys.argv[1]) / f"{last}{number}"
        run_dir.mkdir()
        if last != "none":
            leave(run_dir, 4, **({"process_start": 1} if last == "dead" else {"machine": "another"}))
            leave(run_dir, 3, process_start=1)
        if (child := os.fork()) == 0:
            lines = 0
            def die():
                global lines
                lines += 1
                if lines > number:
                    os._exit(9)
            at_each_line(die)
            with lease.sole_writer(run_dir):
                pass
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with lease.sole_writer(run_dir, wait_s=0) as mine:
            mine.held()
            assert os.listdir(run_dir / "lease") == [mine.path.name], os.listdir(run_dir / "lease")
        if code == 0:
            break
        number += 1
    print("lines", number)
    """
    for last in ("none", "dead", "silent"):
        command = script(textwrap.dedent(FORKS) + textwrap.dedent(code), tmp_path, last)
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout.split()[-1]) > 50


@pytest.mark.fault(22)
def test_of_several_takers_one_wins(tmp_path):
    """Processes that pause at random at every line; the winner is killed and the others of the next round take over."""
    code = """
    TAKERS, ROUNDS = 3, 60
    run_dir = Path(sys.argv[1])
    (run_dir / "lease").mkdir()
    for seed in range(ROUNDS):
        if seed % 5 == 4:  # the holder is a silent one of another machine
            leave(run_dir, max(lease._number(name) for name in os.listdir(run_dir / "lease")) + 1, machine="another")
        told, tell = os.pipe()
        children = []
        for taker in range(TAKERS):
            if (child := os.fork()) == 0:
                rng = random.Random(seed * TAKERS + taker)
                at_each_line(lambda: time.sleep(rng.random() * 0.004 if rng.random() < 0.3 else 0))
                try:
                    mine = lease._take(run_dir, 0)
                except lease.RunDirError:
                    os._exit(2)
                sys.settrace(None)
                mine.held()
                os.write(tell, b"w")
                signal.pause()
            children.append(child)
        os.close(tell)
        codes = {}
        winners = len(os.read(told, 1))
        while len(codes) < TAKERS - winners:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        for child in children:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        assert list(codes.values()) == [2] * (TAKERS - 1), (seed, codes)
        assert os.read(told, 9) == b"", f"seed {seed}: two won"
        os.close(told)
    """
    command = script(textwrap.dedent(FORKS) + textwrap.dedent(code), tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.fault(22)
def test_who_took_a_number_that_was_free_again_steps_back(tmp_path):
    """It found holder 3 dead and slept; 4 and 5 came since, 5 holds and has removed those below."""
    leave(tmp_path, number=5)
    assert not lease._make(tmp_path / "lease/00000004.json", this_process())
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["00000005.json"]


@pytest.mark.parametrize("error", [None, "OSError: no longer this job's"])
@pytest.mark.fault(22)
def test_a_save_that_ends_after_the_folder_was_lost_is_not_in_its_ledger(tmp_path, error):
    """The process was stopped while its thread wrote."""
    ledger = Ledger(tmp_path)
    with sole_writer(tmp_path) as mine:
        tell_saved(Outcome(5, tmp_path, 1, 0.1), ledger, mine)
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave(tmp_path, number=2)
        tell_saved(Outcome(10, tmp_path, 1, 0.1, error), ledger, mine)
    signal.signal(signal.SIGTERM, before)
    assert [event["step"] for event in ledger.events()] == [5]


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_run_that_was_stopped_and_comes_back_saves_no_more(tmp_path, corpus):
    """Two ranks in a PID namespace of their own, so on another machine as the lease has it, stopped until it is taken."""
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    allowed = subprocess.run([*namespace, "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"needs the right to make a namespace: {allowed.stderr.decode().strip()}")
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    log = tmp_path / "log"
    ranks = torchrun(2, "--config", recipe, "train.steps=100000", "checkpoint.every=100000", "eval.every=0")
    process = start([*namespace, *ranks], log)
    try:
        wait_for_step(run_dir, 12, process)
        pids = rank_pids(recipe)
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        ledger = (run_dir / "ledger.jsonl").read_bytes()
        with sole_writer(run_dir, wait_s=0):
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            assert process.wait(60) != 0
            text = log.read_text()
            assert f"was taken by another job (host {os.uname().nodename}, pid {os.getpid()}, " in text
            assert "it stops without saving again" in text
            assert committed_steps(run_dir / "checkpoints") == []  # it would have saved as it was asked to stop
            assert (run_dir / "ledger.jsonl").read_bytes() == ledger
    finally:
        if process.poll() is None:
            kill(recipe, process)
