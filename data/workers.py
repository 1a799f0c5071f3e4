"""Tasks in worker processes: results as they come, and an end for every way that a process can end.

An exception in a worker is raised here; a worker that dies (out of memory, killed) is an error that says so; when the
caller leaves, by an error or Ctrl-C, the workers are killed; when the caller itself is killed, they end by themselves.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class Report(Protocol):
    """Called by a task in its worker to tell the caller how far it is."""

    def __call__(self, *counts: int) -> None: ...


class WorkerDied(RuntimeError):
    """A worker process ended without a result and without an exception."""


@dataclass
class _Worker:
    process: SpawnProcess
    task: Any


def run_tasks(
    work: Callable[[T, Report], R], tasks: Sequence[T], n_workers: int, on_report: Callable[..., None]
) -> Iterator[tuple[T, R]]:
    """(task, work(task, report)) for every task, in the order in which they finish.

    work: a module-level function; it and the tasks travel by pickle to processes started afresh, so that no thread or
    lock of this one is copied.    on_report: called here with what the task gave to report.
    Raises what work raised, with the worker's traceback as a note, or WorkerDied.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    crew: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(n_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), name="data-worker", daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            crew[ours] = _Worker(process, waiting.popleft())
        for connection, worker in crew.items():
            _send(connection, worker)
        while crew:
            for ready in wait(list(crew)):
                connection = cast(Connection, ready)
                worker = crew[connection]
                kind, payload = _receive(connection, worker)
                if kind == "report":
                    on_report(*payload)
                elif kind == "error":
                    raise payload
                else:
                    finished = worker.task
                    if waiting:
                        worker.task = waiting.popleft()
                        _send(connection, worker)
                    else:
                        connection.close()  # the worker's recv ends it
                        crew.pop(connection).process.join()
                    yield finished, payload
    finally:
        for connection, worker in crew.items():
            worker.process.kill()
            worker.process.join()
            connection.close()


def _send(connection: Connection, worker: _Worker) -> None:
    try:
        connection.send(worker.task)
    except BrokenPipeError:
        raise _died(worker) from None


def _receive(connection: Connection, worker: _Worker) -> tuple[str, Any]:
    try:
        return cast(tuple[str, Any], connection.recv())
    except (EOFError, ConnectionResetError):
        raise _died(worker) from None


def _died(worker: _Worker) -> WorkerDied:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = "; SIGKILL is most often the machine out of memory: use fewer workers" if code == -signal.SIGKILL else ""
    return WorkerDied(f"a worker process {how} in the middle of its work{hint}")


def _serve(connection: Connection, work: Callable[[Any, Report], Any]) -> None:
    """A worker's life: tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller decides
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(*counts: int) -> None:
        connection.send(("report", counts))

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", work(task, report))
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            answer = ("error", _portable(error))
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error itself where pickle brings it back whole, else a RuntimeError that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.__notes__ = error.__notes__
        return plain
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
