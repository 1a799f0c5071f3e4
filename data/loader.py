"""Batches from a dataset: which rank reads which samples of a step, made ready by a thread ahead of the step.

A run reads samples 0, 1, 2, ... in order; data/dataset.py says where a sample lies. A step takes the next
global_batch_size of them that are not left out, whatever the world: with s those samples in order, micro-batch a of
rank r holds s[(a * dp_size + r) * B + b]. So the state to resume from is one number; neither world size nor micro-batch
is in it.

A grad_accum_steps, B micro_batch_size, T seq_len
"""

import atexit
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data.corpus import Corpus
from data.dataset import Dataset
from data.errors import DataError
from data.layout import Rows
from data.masking import IGNORE, Masker
from data.order import permute

AHEAD_TOKENS = 2**18  # of a rank that are read at a time: with small steps several, whose overhead is then shared
EVAL_KEY = 0  # of the fixed order in which held-out windows are taken


class BatchError(DataError):
    """A batch that does not divide, or data too small for it."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step."""

    tokens: Tensor  # (A, B, T) int64
    targets: Tensor  # (A, B, T) int64: tokens one further on; -100 where a target does not count
    documents: Tensor | None  # (A, B, T) int32: number of the document in its row; None without data.document_mask
    samples: NDArray[np.int64]  # (A, B) global sample numbers
    span: tuple[int, int]  # (first, one past the last) sample number of the step, over all ranks, left-out ones too
    n_targets: int  # targets that count: of the step over all ranks where they all do, else of this rank
    digest: int  # xxh3-64 of samples and tokens: what launcher/audit.py compares
    reference: Tensor | None = None  # (A, B, 2) fp32, of pairs of answers; see data/row_loader.py


class Loader(Iterator[StepBatch]):
    """Endless iterator over the steps' batches of one rank; epochs follow each other, each in an order of its own.

    samples: number of the first sample to read.    masker: of a masked model.
    prefetch: batches made ready ahead; more of small ones.
    Raises BatchError when the batch does not divide, or the dataset has fewer windows than one global batch.
    Call close() when done, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        samples: int = 0,
        prefetch: int = 2,
        masker: Masker | None = None,
    ) -> None:
        _check_rank(micro_batch_size, dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            unit = micro_batch_size * dp_size
            nearest = sorted({max(unit, global_batch_size // unit * unit), (global_batch_size // unit + 1) * unit})
            raise BatchError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
                f"dp_size={dp_size}; the nearest that are: {', '.join(map(str, nearest))}"
            )
        if (n_windows := sum(corpus.n_windows for corpus in dataset.corpora.values())) < global_batch_size:
            raise BatchError(
                f"{', '.join(dataset.names)} have {n_windows} windows of {dataset.seq_len} tokens, one step takes "
                f"global_batch_size={global_batch_size}; use a larger corpus, a shorter seq_len, a smaller batch"
            )
        if prefetch < 1:
            raise BatchError(f"prefetch={prefetch}; expected at least 1 batch")
        if samples < 0:
            raise BatchError(f"samples={samples}; expected 0 or more")
        self.dataset, self._masker = dataset, masker
        self._samples = samples
        self._global_batch_size, self._dp_rank = global_batch_size, dp_rank
        self._shape = (global_batch_size // (micro_batch_size * dp_size), dp_size, micro_batch_size)  # (A, ranks, B)
        self._pin = torch.accelerator.is_available()
        of_step = global_batch_size // dp_size * dataset.seq_len
        # several steps at a time may need more shards than one, and those of a URL have few places
        self._most_steps = 1 if dataset.remote else max(1, AHEAD_TOKENS // of_step)
        self._taken: deque[StepBatch] = deque()  # out of the queue, and not handed out yet
        self._ready: queue.Queue[list[StepBatch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(self._samples,), name="data-prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the interpreter's end aborts on a thread that is inside torch

    @property
    def fixed_targets(self) -> bool:
        """Whether every target counts, so that a batch's n_targets is the step's."""
        return self.dataset.fixed_targets and self._masker is None

    def cursor(self) -> dict[str, Any]:
        """Where the run stands: the number of the next sample (prefetched ones are not past), and what it refers to."""
        return self.dataset.cursor(self._samples)

    @staticmethod
    def merge_cursors(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One cursor of the cursors of all ranks: here every rank knows the whole."""
        assert all(part == parts[0] for part in parts), "ranks stand at different samples"
        return parts[0]

    def at_end(self) -> bool:
        """Whether there is no further step. Never here: what ends is refused before the run starts."""
        return False

    def describe(self, samples: ArrayLike) -> str:
        """Where the tokens of samples come from, a line each. For error reports."""
        return self.dataset.describe(samples)

    def close(self) -> None:
        """End the prefetch thread; the loader gives no batch after it."""
        atexit.unregister(self.close)
        self._closing.set()
        while self._thread.is_alive():
            _drain(self._ready)  # makes room for a put that waits
            self._thread.join(timeout=0.05)
        _drain(self._ready)

    def __next__(self) -> StepBatch:
        if self._closing.is_set():
            raise RuntimeError("the loader is closed; it gives no further batches")
        while not self._taken:
            try:
                item = self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the data-prefetch thread is gone and left neither batch nor error") from None
                continue
            if isinstance(item, BaseException):
                self._closing.set()
                raise item  # as it was raised in the thread, with the traceback from there
            self._taken.extend(item)
        batch = self._taken.popleft()
        self._samples = batch.span[1]
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetch(self, first: int) -> None:
        try:
            steps = 1  # the first batch soon, then more at a time
            while not self._closing.is_set():
                try:
                    batches = self._make(first, steps)
                except DataError:
                    if steps == 1:
                        raise
                    steps = 1  # the steps before the one that cannot be read are good
                    continue
                self._put(batches)
                first = batches[-1].span[1]
                steps = min(2 * steps, self._most_steps)
        except BaseException as error:  # raised again by __next__
            self._put(error)

    def _put(self, item: list[StepBatch] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _make(self, first: int, steps: int) -> list[StepBatch]:
        """The batches of this rank for so many steps."""
        spans, every = [], []
        for _ in range(steps):
            all_ranks, after = self.dataset.take(first, self._global_batch_size)
            spans.append((first, after))
            every.append(all_ranks)
            first = after
        # (steps, G) -> (steps, A, ranks, B) -> (steps, A, B)
        samples = np.stack(every).reshape(steps, *self._shape)[:, :, self._dp_rank]
        self.dataset.prefetch(every[-1])
        rows = self.dataset.read(samples.ravel())
        keys = None if self._masker is None else [self._masker.key(sample) for sample in samples.ravel().tolist()]
        tokens, targets, documents = _tensors(rows, samples.shape, self._masker, keys)
        if self._pin:
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
            documents = None if documents is None else documents.pin_memory()
        n_targets = [self._global_batch_size * self.dataset.seq_len] * steps
        if not self.fixed_targets:
            n_targets = (targets != IGNORE).view(steps, -1).sum(dim=1).tolist()
        read = rows.tokens.reshape(steps, -1)
        return [
            StepBatch(
                tokens[step], targets[step], None if documents is None else documents[step],
                samples[step], spans[step], n_targets[step], digest(samples[step], read[step]),
            )
            for step in range(steps)
        ]  # fmt: skip


def digest(samples: NDArray[np.int64], tokens: NDArray[np.int64]) -> int:
    """xxh3-64 of sample numbers and the tokens read for them, in that order."""
    both = xxhash.xxh3_64(np.ascontiguousarray(samples).data)
    both.update(np.ascontiguousarray(tokens).data)
    return both.intdigest()


def eval_batches(
    corpus: Corpus,
    max_windows: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    masker: Masker | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(tokens, targets, documents), (B, T) each, over the first max_windows of a fixed order, or all there are.

    tokens and targets are int64, documents int32, or None where the corpus was opened without document_mask.
    masker: of a masked model; a window always hides the same tokens.

    Every rank gets the same number of batches; rows that fill the last ones have targets -100, so that each window
    counts once at any world size. Raises BatchError when the corpus has no window or max_windows < 1.
    """
    _check_rank(micro_batch_size, dp_rank, dp_size)
    if max_windows < 1:
        raise BatchError(f"max_windows={max_windows}; expected at least 1")
    if corpus.n_windows < 1:
        raise BatchError(
            f"{corpus.name} of {corpus.location} ({corpus.split}) has no window "
            f"of {corpus.seq_len} tokens: its shards are shorter; use a "
            "shorter seq_len, or prepare with a larger data.valid_fraction or data.shard_bytes"
        )
    count, order = min(max_windows, corpus.n_windows), corpus.order(EVAL_KEY)
    step = micro_batch_size * dp_size
    for first in range(dp_rank * micro_batch_size, -(-count // step) * step, step):
        positions = np.arange(first, first + micro_batch_size, dtype=np.int64)
        real = np.minimum(positions, count - 1)
        windows = permute(real, corpus.n_windows, EVAL_KEY) if corpus.shards_at_once is None else order(real)[1]
        keys = None if masker is None else [masker.held_out_key(window) for window in windows.tolist()]
        rows = corpus.read_in_order(order, real, windows)
        tokens, targets, documents = _tensors(rows, (micro_batch_size,), masker, keys)
        targets[torch.from_numpy(positions >= count)] = IGNORE
        yield tokens, targets, documents


def _tensors(
    rows: Rows, shape: tuple[int, ...], masker: Masker | None = None, keys: list[str] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of n windows as tokens, targets and documents of shape (*shape, T), each in memory of its own.

    masker and keys: of a masked model, as Masker.hide takes them.
    """
    if masker is not None and keys is not None:
        hidden = masker.hide(rows.tokens, rows.documents, keys)
        made = [None if part is None else torch.from_numpy(part).view(*shape, -1) for part in hidden]
        assert made[0] is not None
        assert made[1] is not None
        return made[0], made[1], made[2]
    both = torch.from_numpy(rows.tokens)
    length = both.shape[1] - 1
    tokens = both[:, :-1].contiguous().view(*shape, length)
    # a copy in any case: of a single row the slice is contiguous already, and would be a view of the tokens' memory
    targets = both[:, 1:].clone(memory_format=torch.contiguous_format).view(*shape, length)
    if rows.counted is not None:
        targets[~torch.from_numpy(rows.counted).view(*shape, length)] = IGNORE
    documents = None if rows.documents is None else torch.from_numpy(rows.documents).view(*shape, length)
    return tokens, targets, documents


def _check_rank(micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch_size < 1:
        raise BatchError(f"micro_batch_size={micro_batch_size}; expected at least 1 sequence")
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise BatchError(f"dp_rank={dp_rank} of dp_size={dp_size}; expected a rank from 0 to dp_size - 1")


def _drain(items: queue.Queue[list[StepBatch] | BaseException]) -> None:
    while True:
        try:
            items.get_nowait()
        except queue.Empty:
            return
