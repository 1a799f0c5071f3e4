"""Batches straight from text: the lanes of data/lanes.py dealt to ranks and workers, made ready ahead of the step.

Sample g is window g // lanes of lane g % lanes. As lanes is a multiple of dp_size, rank r owns the lanes with
lane % dp_size == r, and the samples with g % dp_size == r; its workers share its lanes. A step takes the next
global_batch_size samples whatever the world. So the state to resume from is that of every lane, with the number of
samples; neither world size nor micro-batch nor workers are in it.

A grad_accum_steps, B micro_batch_size, T seq_len
"""

import atexit
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel, NonNegativeInt, ValidationError

from data.lane_workers import Crew, Job, Part, read_steps
from data.lanes import LaneState, Stream, StreamConfig, StreamEnd, StreamError
from data.loader import StepBatch, digest
from data.tokenizer import load_tokenizer

__all__ = ["StreamConfig", "StreamCursor", "StreamEnd", "StreamError", "StreamLoader"]

log = logging.getLogger(__name__)

_DESCRIBED_STEPS = 4  # handed out last, whose places describe() knows


class StreamCursor(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where a run stands in its stream, or one rank in its lanes of it; saved with every checkpoint."""

    samples: NonNegativeInt  # number of the next sample to read
    fingerprint: dict[str, str]  # what a lane's windows depend on
    lanes: list[LaneState]  # in ascending order

    @classmethod
    def read(cls, cursor: dict[str, Any]) -> "StreamCursor":
        """Raises StreamError for what is not a cursor of a stream."""
        try:
            return cls.model_validate(cursor)
        except ValidationError as error:
            first = error.errors()[0]
            raise StreamError(
                f"the data cursor is not one of a stream ({'.'.join(map(str, first['loc']))}: {first['msg']}); the "
                "run read prepared shards before, or the checkpoint is damaged: use an earlier one"
            ) from None


@dataclass(frozen=True)
class _Step:
    batch: StepBatch
    states: list[LaneState]  # after it
    places: dict[int, str]  # by sample


class _Source(Protocol):
    """Where a rank's windows come from: worker processes, or this one."""

    def take(self) -> list[Part]: ...

    def kill(self) -> None: ...  # from any thread: take() comes back soon

    def close(self) -> None: ...  # from the thread that takes


class _OwnThread:
    """The lanes in the loader's thread: data.stream.workers=0."""

    def __init__(self, job: Job, stream: Stream) -> None:
        self._steps = read_steps(job, stream)

    def take(self) -> list[Part]:
        return [next(self._steps)]

    def kill(self) -> None:
        """Nothing to kill: the thread ends when its step is made."""

    def close(self) -> None:
        self._steps.close()


class StreamLoader(Iterator[StepBatch]):
    """Iterator over the steps' batches of one rank, with the surface of data.loader.Loader.

    cursor: what merge_cursors gave at the checkpoint to go on from; refused when it belongs to other data.
    prefetch: batches made ready ahead; the workers are a step or two further still.
    Raises StreamError when batch or lanes do not divide, or the cursor is refused. What goes wrong later is raised by
    the step that lacks its batch: StreamError for what cannot be read and for a worker that died, StreamEnd after the
    last of data.stream.epochs. Call close() when done, or use it as a context manager.
    """

    fixed_targets = True  # every target counts, so that a batch's n_targets is the step's

    def __init__(
        self,
        stream: Stream,
        *,
        seq_len: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: dict[str, Any] | None = None,
        prefetch: int = 2,
    ) -> None:
        _check_numbers(seq_len, global_batch_size, micro_batch_size, dp_rank, dp_size, prefetch)
        check_lanes(stream.cfg, dp_size)
        stream.warn()
        self.fingerprint = fingerprint(stream, seq_len, seed)
        self.cfg = stream.cfg
        self._samples, lanes = 0, [LaneState(lane=lane) for lane in range(self.cfg.lanes)]
        if cursor is not None:
            start = self.check_cursor(cursor, self.fingerprint)
            self._samples, lanes = start.samples, start.lanes
        self._states = [state for state in lanes if state.lane % dp_size == dp_rank]
        self._seq_len, self._global_batch_size = seq_len, global_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._shape = (global_batch_size // (micro_batch_size * dp_size), micro_batch_size)  # (A, B)
        self._pin = torch.accelerator.is_available()
        self._places: deque[dict[int, str]] = deque(maxlen=_DESCRIBED_STEPS)
        self._next: _Step | BaseException | None = None  # taken from the queue by at_end, not yet handed out
        self._source = self._open_source(stream, seed)
        self._ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(self._samples,), name="data-prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # as data.loader.Loader does

    @staticmethod
    def check_cursor(cursor: dict[str, Any], fingerprint: dict[str, str]) -> StreamCursor:
        """The cursor, checked. Raises StreamError naming what differs when it belongs to other data, or lacks lanes."""
        before = StreamCursor.read(cursor)
        differs = [
            f"{key} was {before.fingerprint.get(key)}, is {fingerprint.get(key)}"
            for key in sorted(before.fingerprint.keys() | fingerprint.keys())
            if before.fingerprint.get(key) != fingerprint.get(key)
        ]
        if differs:
            raise StreamError(
                f"the checkpoint was trained on another stream: {'; '.join(differs)}. Go on with the data.stream, "
                "seq_len and seed that the run began with, or begin a new run"
            )
        lanes = [state.lane for state in before.lanes]
        if lanes != list(range(int(fingerprint["lanes"]))):
            raise StreamError(
                f"the data cursor has lanes {lanes} of {fingerprint['lanes']}; expected every lane once: a checkpoint "
                "holds what StreamLoader.merge_cursors makes of all ranks' cursors; use an earlier one"
            )
        return before

    @staticmethod
    def merge_cursors(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One cursor of the cursors of all ranks. Raises StreamError unless they are all those of one step."""
        cursors = [StreamCursor.read(part) for part in parts]
        if not cursors:
            raise StreamError("no data cursors to merge; give those of all ranks")
        if len({cursor.samples for cursor in cursors}) > 1 or any(
            cursor.fingerprint != cursors[0].fingerprint for cursor in cursors
        ):
            raise StreamError(
                "the data cursors to merge are not of one step of one run: they stand at samples "
                f"{[cursor.samples for cursor in cursors]}; gather those of all ranks at the same step"
            )
        lanes = sorted((state for cursor in cursors for state in cursor.lanes), key=lambda state: state.lane)
        whole = cursors[0].model_copy(update={"lanes": lanes}).model_dump()
        StreamLoader.check_cursor(whole, cursors[0].fingerprint)
        return whole

    def cursor(self) -> dict[str, Any]:
        """This rank's part of where the run stands after the batches handed out: plain JSON, for merge_cursors."""
        return StreamCursor(samples=self._samples, fingerprint=self.fingerprint, lanes=self._states).model_dump()

    def describe(self, samples: ArrayLike) -> str:
        """Where the tokens of samples come from, a line each: lane, window, rows of files. For error reports.

        The rows are known for this rank's samples of the last 4 steps handed out.
        """
        known = {sample: place for step in self._places for sample, place in step.items()}
        lines = []
        for sample in np.atleast_1d(np.asarray(samples, dtype=np.int64)).tolist():
            window, lane = divmod(sample, self.cfg.lanes)
            place = known.get(sample, "of which rows is known in the steps after it alone, on the rank that read it")
            lines.append(f"sample {sample}: lane {lane}, window {window}, {place}")
        return "\n".join(lines)

    def at_end(self) -> bool:
        """Whether the lanes of this rank have no further step, so that next() would raise StreamEnd.

        Waits for the next batch. For the ranks to agree on the last step together, before one of them stops alone.
        """
        if self._next is None:
            self._next = self._take()
        return isinstance(self._next, StreamEnd)

    def close(self) -> None:
        """End workers and thread; the loader gives no batch after it."""
        atexit.unregister(self.close)
        self._closing.set()
        self._source.kill()
        while self._thread.is_alive():
            _drain(self._ready)  # makes room for a put that waits
            self._thread.join(timeout=0.05)
        _drain(self._ready)

    def __next__(self) -> StepBatch:
        item, self._next = self._next or self._take(), None
        if isinstance(item, BaseException):
            self._closing.set()
            raise item  # as it was raised in the thread, with the traceback from there
        self._samples += self._global_batch_size
        self._states = item.states
        self._places.append(item.places)
        return item.batch

    def __enter__(self) -> "StreamLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_source(self, stream: Stream, seed: int) -> _Source:
        def job(states: list[LaneState]) -> Job:
            size = self._global_batch_size
            return Job(self.cfg, stream.files, tuple(states), self._seq_len, seed, self._samples, size)

        workers = self.cfg.workers
        if not workers:
            return _OwnThread(job(self._states), stream)
        return Crew([job(self._states[number::workers]) for number in range(workers)])

    def _take(self) -> _Step | BaseException:
        while True:
            if self._closing.is_set():
                raise RuntimeError("the loader is closed; it gives no further batches")
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the data-prefetch thread is gone and left neither batch nor error") from None

    def _prefetch(self, first: int) -> None:
        try:
            while not self._closing.is_set():
                self._put(self._make(first))
                first += self._global_batch_size
        except BaseException as error:  # raised again by __next__
            self._put(error)
        finally:
            self._source.close()

    def _put(self, item: _Step | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _make(self, first: int) -> _Step:
        after = first + self._global_batch_size
        samples = np.arange(first + (self._dp_rank - first) % self._dp_size, after, self._dp_size, dtype=np.int64)
        tokens = np.empty((len(samples), self._seq_len + 1), dtype=np.int64)
        states: list[LaneState] = []
        places: dict[int, str] = {}
        for part in self._source.take():
            tokens[np.searchsorted(samples, part.samples)] = part.tokens
            states += part.states
            places |= zip(part.samples.tolist(), part.places, strict=True)
        both = torch.from_numpy(tokens).view(*self._shape, -1)
        inputs, targets = both[..., :-1].contiguous(), both[..., 1:].contiguous()
        if self._pin:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        samples = samples.reshape(self._shape)
        n_targets = self._global_batch_size * self._seq_len
        batch = StepBatch(inputs, targets, None, samples, (first, after), n_targets, digest(samples, tokens))
        return _Step(batch, sorted(states, key=lambda state: state.lane), places)


def fingerprint(stream: Stream, seq_len: int, seed: int) -> dict[str, str]:
    """What a lane's windows depend on, part by part, so that a difference can be named."""
    cfg = stream.cfg
    return {
        "dataset": " ".join(filter(None, (cfg.dataset, cfg.config_name, cfg.split, cfg.sample_by))),
        "field": cfg.field,
        "files": stream.files,
        "lanes": str(cfg.lanes),
        "seed": str(seed),
        "seq_len": str(seq_len),
        "shuffle_buffer": str(cfg.shuffle_buffer),
        "tokenizer": load_tokenizer(cfg.tokenizer).fingerprint,
    }


def check_lanes(cfg: StreamConfig, dp_size: int) -> None:
    """Raise StreamError unless all ranks get as many lanes, and each of their workers one at least."""
    if cfg.lanes % dp_size:
        sizes = [str(size) for size in range(1, cfg.lanes + 1) if cfg.lanes % size == 0]
        raise StreamError(
            f"data.stream.lanes={cfg.lanes} cannot be shared by dp_size={dp_size} ranks; it can by {', '.join(sizes)}. A "
            f"run keeps its lanes; for a new one the nearest that fit are: {_nearest(cfg.lanes, dp_size)}"
        )
    if cfg.workers > cfg.lanes // dp_size:
        raise StreamError(
            f"data.stream.workers={cfg.workers}, but a rank of {dp_size} has {cfg.lanes // dp_size} of the "
            f"{cfg.lanes} lanes; use at most {cfg.lanes // dp_size} workers, or in a new run more lanes"
        )


def _check_numbers(
    seq_len: int, global_batch_size: int, micro_batch_size: int, rank: int, ranks: int, prefetch: int
) -> None:
    if seq_len < 1:
        raise StreamError(f"seq_len={seq_len}; expected at least 1")
    if micro_batch_size < 1:
        raise StreamError(f"micro_batch_size={micro_batch_size}; expected at least 1 sequence")
    if ranks < 1 or not 0 <= rank < ranks:
        raise StreamError(f"dp_rank={rank} of dp_size={ranks}; expected a rank from 0 to dp_size - 1")
    if prefetch < 1:
        raise StreamError(f"prefetch={prefetch}; expected at least 1 batch")
    unit = micro_batch_size * ranks
    if global_batch_size < 1 or global_batch_size % unit:
        raise StreamError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"dp_size={ranks}; the nearest that are: {_nearest(global_batch_size, unit)}"
        )


def _nearest(number: int, unit: int) -> str:
    below = max(unit, number // unit * unit)
    return ", ".join(map(str, sorted({below, (number // unit + 1) * unit})))


def _drain(items: queue.Queue[_Step | BaseException]) -> None:
    while True:
        try:
            items.get_nowait()
        except queue.Empty:
            return
