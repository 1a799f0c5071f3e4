"""Worker processes: every task once, and an end for every way that a process can end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.workers import WorkerDied, run_tasks

ROOT = Path(__file__).parents[2]


def square(task, report):
    report(task, 1)
    return task * task


def pids(task, report):
    time.sleep(0.3)
    return os.getpid()


def refuse(task, report):
    raise KeyError(f"task {task}")


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def refuse_strangely(task, report):
    raise Unpicklable(task, lambda: 0)


def kill_itself(task, report):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(task, report):
    os._exit(7)


def sleep_and_tell(task, report):
    report(os.getpid())
    time.sleep(60)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(pid, seconds=10):
    end = time.monotonic() + seconds
    while not gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there after {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("n_workers", [1, 2, 9])
def test_every_task_once(n_workers):
    reports = []
    results = dict(run_tasks(square, range(5), n_workers, lambda *counts: reports.append(counts)))
    assert results == {n: n * n for n in range(5)}
    assert sorted(reports) == [(n, 1) for n in range(5)]


def test_no_tasks():
    assert list(run_tasks(square, [], 2, print)) == []


def test_workers_are_other_processes_at_the_same_time():
    found = {pid for _, pid in run_tasks(pids, range(2), 2, print)}
    assert len(found) == 2
    assert os.getpid() not in found


def test_an_exception_is_raised_here_with_the_workers_traceback():
    with pytest.raises(KeyError, match="task 3") as caught:
        list(run_tasks(refuse, [3], 2, print))
    assert "in refuse" in caught.value.__notes__[0]


def test_an_exception_that_cannot_travel_is_said_in_words():
    with pytest.raises(RuntimeError, match=r"Unpicklable: 3 and .*lambda") as caught:
        list(run_tasks(refuse_strangely, [3], 1, print))
    assert "in refuse_strangely" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("work", "match"),
    [(kill_itself, r"killed by SIGKILL .*out of memory: use fewer workers"), (leave, "ended with code 7")],
)
@pytest.mark.fault(3)
def test_a_dead_worker_is_an_error(work, match):
    with pytest.raises(WorkerDied, match=match):
        list(run_tasks(work, [1, 2, 3], 2, print))


def test_leaving_kills_the_workers():
    found = []

    def stop(pid):
        found.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(sleep_and_tell, [1, 2], 2, stop))
    wait_until_gone(found[0], seconds=0.5)


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import sys; sys.path[:0] = ['tests/data', '.']\n"
        "from test_workers import run_tasks, sleep_and_tell\n"
        "if __name__ == '__main__':\n"
        "    list(run_tasks(sleep_and_tell, [1, 2], 2, lambda pid: print(pid, flush=True)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in workers:
        wait_until_gone(pid)
