"""Batches from a corpus: which rank reads which samples of a step, made ready by a thread ahead of the step.

A run reads samples 0, 1, 2, ... in order; data.order says which window a sample is. A step takes the next
global_batch_size of them whatever the world: micro-batch a of rank r holds samples g0 + (a * dp_size + r) * B + b, with
g0 the first of the step. So the state to resume from is one number; neither world size nor micro-batch is in it.

A grad_accum_steps, B micro_batch_size, T seq_len
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.order import permute, sample_window

IGNORE = -100  # a target that counts for nothing, as torch's cross-entropy has it
EVAL_KEY = 0  # of the fixed order in which held-out windows are taken


class BatchError(DataError):
    """A batch that does not divide, a corpus too small for it, or a cursor that belongs to other data."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step."""

    tokens: Tensor  # (A, B, T) int64
    targets: Tensor  # (A, B, T) int64: tokens one further on
    samples: NDArray[np.int64]  # (A, B) global sample numbers
    n_targets: int  # targets of the step that count, over all ranks


class Loader(Iterator[StepBatch]):
    """Endless iterator over the steps' batches of one rank; epochs follow each other, each in an order of its own.

    cursor: what cursor() gave at the checkpoint to go on from; refused when it belongs to other data.
    samples: without a cursor, the first sample to read.    prefetch: batches made ready ahead.
    Raises BatchError when the batch does not divide, the corpus has fewer windows than one global batch, or the cursor
    is refused. Call close() when done, or use it as a context manager.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        samples: int = 0,
        cursor: dict[str, Any] | None = None,
        prefetch: int = 2,
    ) -> None:
        _check_rank(micro_batch_size, dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            unit = micro_batch_size * dp_size
            nearest = sorted({max(unit, global_batch_size // unit * unit), (global_batch_size // unit + 1) * unit})
            raise BatchError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
                f"dp_size={dp_size}; the nearest that are: {', '.join(map(str, nearest))}"
            )
        if corpus.n_windows < global_batch_size:
            raise BatchError(
                f"{corpus.folder} ({corpus.split}) has {corpus.n_windows} windows of {corpus.seq_len} tokens, one step "
                f"takes global_batch_size={global_batch_size}; use a larger corpus, a shorter seq_len, a smaller batch"
            )
        if prefetch < 1:
            raise BatchError(f"prefetch={prefetch}; expected at least 1 batch")
        if cursor is not None and samples:
            raise BatchError(f"both samples={samples} and a cursor were given; give one of them")
        if samples < 0:
            raise BatchError(f"samples={samples}; expected 0 or more")
        self.corpus, self.seed = corpus, seed
        self._samples = samples if cursor is None else self.check_cursor(cursor, corpus, seed)
        self._global_batch_size, self._dp_rank = global_batch_size, dp_rank
        self._shape = (global_batch_size // (micro_batch_size * dp_size), dp_size, micro_batch_size)  # (A, ranks, B)
        self._pin = torch.accelerator.is_available()
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(self._samples,), name="data-prefetch", daemon=True)
        self._thread.start()

    @staticmethod
    def check_cursor(cursor: dict[str, Any], corpus: Corpus, seed: int) -> int:
        """The samples a cursor has consumed. Raises BatchError naming what differs when it belongs to other data."""
        if missing := {"samples", "fingerprint", "seed"} - cursor.keys():
            raise BatchError(
                f"the data cursor {cursor} lacks {sorted(missing)}; the checkpoint is damaged: use an earlier one"
            )
        before, now = _parts(cursor["fingerprint"], cursor["seed"]), _parts(corpus.fingerprint, seed)
        differs = [
            f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differs:
            raise BatchError(
                f"the checkpoint was trained on other data than {corpus.folder}: {'; '.join(differs)}. "
                "Go on with the corpus, seq_len and seed that the run began with, or begin a new run"
            )
        return int(cursor["samples"])

    def cursor(self) -> dict[str, Any]:
        """Where the run stands: samples handed out so far (prefetched ones are not), and what the number refers to."""
        return {"samples": self._samples, "fingerprint": self.corpus.fingerprint, "seed": self.seed}

    def describe(self, samples: ArrayLike) -> str:
        """Where the tokens of samples come from, a line each: epoch, window, documents of shards. For error reports."""
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        epochs, windows = sample_window(numbers, self.corpus.n_windows, self.seed)
        lines = []
        for sample, epoch, window in zip(numbers.tolist(), epochs.tolist(), windows.tolist(), strict=True):
            places: dict[str, list[int]] = {}
            for shard, document in self.corpus.documents(window):
                places.setdefault(shard, []).append(document)
            where = ", ".join(f"{shard} {_ranges(documents)}" for shard, documents in places.items())
            lines.append(f"sample {sample}: epoch {epoch}, window {window}, documents of {where}")
        return "\n".join(lines)

    def close(self) -> None:
        """End the prefetch thread; the loader gives no batch after it."""
        self._closing.set()
        while self._thread.is_alive():
            _drain(self._ready)  # makes room for a put that waits
            self._thread.join(timeout=0.05)
        _drain(self._ready)

    def __next__(self) -> StepBatch:
        while True:
            if self._closing.is_set():
                raise RuntimeError("the loader is closed; it gives no further batches")
            try:
                item = self._ready.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the data-prefetch thread is gone and left neither batch nor error") from None
        if isinstance(item, BaseException):
            self._closing.set()
            raise item  # as it was raised in the thread, with the traceback from there
        self._samples += self._global_batch_size
        return item

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetch(self, first: int) -> None:
        try:
            while not self._closing.is_set():
                self._put(self._make(first))
                first += self._global_batch_size
        except BaseException as error:  # raised again by __next__
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _make(self, first: int) -> StepBatch:
        all_ranks = np.arange(first, first + self._global_batch_size, dtype=np.int64).reshape(self._shape)
        samples = all_ranks[:, self._dp_rank]  # (A, ranks, B) -> (A, B)
        _, windows = sample_window(samples.ravel(), self.corpus.n_windows, self.seed)
        tokens, targets = _split(self.corpus.windows(windows), samples.shape)
        if self._pin:
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return StepBatch(tokens, targets, samples, n_targets=self._global_batch_size * self.corpus.seq_len)


def eval_batches(
    corpus: Corpus, max_windows: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets), both (B, T) int64, over the first max_windows of a fixed order of the corpus, or all it has.

    Every rank gets the same number of batches; rows that fill the last ones have targets -100, so that each window
    counts once at any world size. Raises BatchError when the corpus has no window or max_windows < 1.
    """
    _check_rank(micro_batch_size, dp_rank, dp_size)
    if max_windows < 1:
        raise BatchError(f"max_windows={max_windows}; expected at least 1")
    if corpus.n_windows < 1:
        raise BatchError(
            f"{corpus.folder} ({corpus.split}) has no window of {corpus.seq_len} tokens: its shards are shorter; use a "
            "shorter seq_len, or prepare with a larger data.valid_fraction or data.shard_bytes"
        )
    count = min(max_windows, corpus.n_windows)
    step = micro_batch_size * dp_size
    for first in range(dp_rank * micro_batch_size, -(-count // step) * step, step):
        positions = np.arange(first, first + micro_batch_size, dtype=np.int64)
        real = positions < count
        rows = np.zeros((micro_batch_size, corpus.seq_len + 1), dtype=np.int64)
        rows[real] = corpus.windows(permute(positions[real], corpus.n_windows, EVAL_KEY))
        tokens, targets = _split(rows, (micro_batch_size,))
        targets[torch.from_numpy(~real)] = IGNORE
        yield tokens, targets


def _split(windows: NDArray[np.int64], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(n, T + 1) -> tokens and targets of shape (*shape, T), each in memory of its own."""
    both = torch.from_numpy(windows)
    length = windows.shape[1] - 1
    return both[:, :-1].contiguous().view(*shape, length), both[:, 1:].contiguous().view(*shape, length)


def _check_rank(micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch_size < 1:
        raise BatchError(f"micro_batch_size={micro_batch_size}; expected at least 1 sequence")
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise BatchError(f"dp_rank={dp_rank} of dp_size={dp_size}; expected a rank from 0 to dp_size - 1")


def _parts(fingerprint: str, seed: int) -> dict[str, str]:
    """A corpus fingerprint's "key=value key=value" as a mapping, with the seed."""
    parts = dict(part.partition("=")[::2] for part in fingerprint.split())
    return parts | {"seed": str(seed)}


def _ranges(numbers: list[int]) -> str:
    """An ascending list as "3" or "3-7" stretches: [3, 4, 5, 9] -> "3-5, 9"."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and stretches[-1][1] == number - 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in stretches)


def _drain(items: queue.Queue[StepBatch | BaseException]) -> None:
    while True:
        try:
            items.get_nowait()
        except queue.Empty:
            return
