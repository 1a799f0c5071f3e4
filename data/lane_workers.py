"""Lanes in worker processes: every step's windows over a pipe each, and an end for every way that a process can end.

A worker is a fresh interpreter, started by its command line rather than by multiprocessing, whose spawn imports the
main module again: of a training run that is torch and DeepSpeed, seconds and half a GiB for every worker. Its pipe holds
some 100 KiB, so that a worker which is ahead waits. It ends when the pipe does, so also when its parent is killed.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.lanes import Lane, LaneState, Stream, StreamConfig, StreamEnd, StreamError
from data.tokenizer import load_tokenizer

_ENTRY = "import sys; sys.path[:] = {path!r}; from data.lane_workers import serve; serve({fd})"
# They reach every process of the terminal or the job step, and the parent decides. So a worker is born with them blocked:
# what it did about them itself would come a second of imports too late.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Job:
    """What one process reads: windows of its lanes, step after step."""

    cfg: StreamConfig
    files: str  # the fingerprint of what the run's own process listed
    states: tuple[LaneState, ...]  # of its lanes
    seq_len: int
    seed: int
    samples: int  # number of the first step's first sample
    global_batch_size: int


class Part(NamedTuple):
    """One step's samples of some lanes, in ascending order."""

    samples: NDArray[np.int64]  # (n,)
    tokens: NDArray[np.int32]  # (n, seq_len + 1)
    places: list[str]  # (n,) where the tokens come from
    states: list[LaneState]  # of all the lanes, after the step


def read_steps(job: Job, stream: Stream) -> Generator[Part, None, None]:
    """The parts of all steps. Every lane is asked for its first window first, so that one without any shows at once."""
    tokenizer = load_tokenizer(job.cfg.tokenizer)
    lanes = {
        state.lane: Lane(stream, tokenizer, job.seq_len, job.seed, state)
        for state in sorted(job.states, key=lambda state: state.lane)
    }
    try:
        for lane in lanes.values():
            lane.fill()
        first = job.samples
        while True:
            every = np.arange(first, first + job.global_batch_size, dtype=np.int64)
            samples = every[np.isin(every % job.cfg.lanes, list(lanes))]
            windows = [lanes[number].window() for number in (samples % job.cfg.lanes).tolist()]
            tokens = np.empty((len(windows), job.seq_len + 1), dtype=np.int32)
            for row, window in enumerate(windows):
                tokens[row] = window.tokens
            yield Part(samples, tokens, [window.place for window in windows], [lane.state for lane in lanes.values()])
            first += job.global_batch_size
    finally:
        for lane in lanes.values():
            lane.close()


class Crew:
    """Worker processes, one for each job.  take() gives all their parts of the next step."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._closing = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._jobs = list(jobs)
        try:
            for _ in jobs:
                self._start()
        except BaseException:
            self.close()
            raise

    def take(self) -> list[Part]:
        """Raises what a worker raised, and StreamError for one that died or after close()."""
        jobs, self._jobs = self._jobs, []  # sent at the first call: a large one waits until the worker has started
        for number, job in enumerate(jobs):
            try:
                self._pipes[number].send(job)
            except OSError:
                raise self._lost(number) from None
        return [self._receive(number) for number in range(len(self._pipes))]

    def kill(self) -> None:
        """Kill the workers and wait until they are gone; a take() in another thread comes back with an error."""
        self._closing.set()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Kill the workers and close their pipes; in the thread that takes."""
        self.kill()
        for pipe in self._pipes:
            pipe.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, _blocked(_STOP_SIGNALS):  # closed here, so that the end of the process is the end of the pipe
            entry = _ENTRY.format(path=sys.path, fd=theirs.fileno())
            self._pipes.append(Connection(ours.detach()))
            self._processes.append(subprocess.Popen([sys.executable, "-c", entry], pass_fds=[theirs.fileno()]))

    def _receive(self, number: int) -> Part:
        pipe = self._pipes[number]
        try:
            kind, payload = pipe.recv()
        except (EOFError, OSError):
            raise self._lost(number) from None
        if kind == "part":
            return cast(Part, payload)
        message, trace = payload
        error = {"end": StreamEnd, "refused": StreamError, "failed": RuntimeError}[kind](message)
        error.add_note(f"in a worker process:\n{trace}")
        raise error

    def _lost(self, number: int) -> StreamError:
        if self._closing.is_set():
            return StreamError("the stream is closed; it gives no further windows")
        code = self._processes[number].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = "; SIGKILL is most often the machine out of memory: use fewer workers" if code == -signal.SIGKILL else ""
        return StreamError(
            f"a worker process of data.stream (of {len(self._processes)}, number {number}) {how} in the middle of its "
            f"work; what it said is above{hint}. The run goes on from its last checkpoint"
        )


@contextmanager
def _blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Signals kept back from this thread meanwhile, and for good from a process that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(fd: int) -> None:
    """A worker's life: one job, and its parts until the pipe closes."""
    pipe = Connection(fd)
    try:
        job: Job = pipe.recv()
        threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
        stream = Stream.open(job.cfg)  # again: an opened dataset brings torch along where its maker has it
        if stream.files != job.files:
            raise StreamError(f"the files of data.stream changed as the run started: {job.files}, then {stream.files}")
        for part in read_steps(job, stream):
            pipe.send(("part", part))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except BaseException as error:
        kind = "end" if isinstance(error, StreamEnd) else "refused" if isinstance(error, DataError) else "failed"
        message = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            pipe.send((kind, (message, traceback.format_exc())))
    sys.stderr.flush()
    os._exit(0)  # not by the interpreter's own end, which waits for the reading threads of Arrow, or aborts on them


def _end_with_parent(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()  # nothing more is ever sent: it returns when the parent's end is closed
    os._exit(1)
