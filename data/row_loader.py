"""Batches of encoded examples that fit in memory: which rank reads which rows of a step, padded to one length.

Sample g of a run is row sample_window(g, rows, seed) of data/order.py: each epoch has an order of its own, and the state
to resume from is one number. A step takes the next global_batch_size samples, dealt to ranks as data/loader.py does.

A grad_accum_steps, B micro_batch_size, T tokens of the longest row of this rank's step
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data.errors import DataError
from data.loader import IGNORE, StepBatch, digest
from data.order import sample_window

MULTIPLE = 8  # rows are padded to a multiple of so many tokens, as far as the context goes

IntArray = NDArray[np.int64]
Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens, targets, documents: (B, T)


class Row(NamedTuple):
    """One example, encoded, or several packed together."""

    tokens: IntArray  # (n,)
    targets: IntArray  # (n,): a label, a tag or the next token; IGNORE where nothing counts
    documents: NDArray[np.int32] | None = None  # (n,): number of each token's document; None: the row is one


@dataclass
class RowSet:
    """Encoded examples in the order of their files."""

    rows: list[Row]
    where: list[str]  # of each row, "path, line 7"
    seq_len: int  # the longest row that there may be
    notes: list[str] = field(default_factory=list)  # what their user should know: what was cut or left out
    reference: Tensor | None = (
        None  # (rows, 2) fp32, of pairs: by the model of the first step; a row is one target then
    )
    n_bytes: int = 0  # UTF-8 bytes of the text that targets stand for; 0 where they are labels

    def fingerprint(self) -> str:
        """16 hexadecimal digits: of all tokens and targets in their order."""
        digest = xxhash.xxh3_64()
        for row in self.rows:
            for part in (np.array([len(row.tokens)], dtype=np.int64), row.tokens, row.targets):
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def batch(self, rows: Sequence[int], length: int | None = None) -> Batch:
        """Rows padded behind their ends, which changes nothing before them. length: None for what the longest needs."""
        if length is None:
            longest = max(len(self.rows[row].tokens) for row in rows)
            length = min(self.seq_len, -(-longest // MULTIPLE) * MULTIPLE)
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
        packed = self.rows[0].documents is not None
        documents = np.zeros((len(rows), length), dtype=np.int32)
        for at, row in enumerate(self.rows[row] for row in rows):
            n = len(row.tokens)
            tokens[at, :n], targets[at, :n] = row.tokens, row.targets
            if row.documents is not None:
                documents[at, :n], documents[at, n:] = row.documents, row.documents[-1] + 1
        return (
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(documents) if packed else None,
        )


class RowLoader(Iterator[StepBatch]):
    """Endless iterator over the steps' batches of one rank.

    samples: number of the first sample to read.    left_out: stretches of samples, first and last, that are passed over.
    cursor_of: what a checkpoint holds of the data, with the number of samples. The batch divides: the config saw to it.
    """

    fixed_targets = False

    def __init__(
        self,
        rows: RowSet,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: dict[str, Any],
        left_out: Sequence[tuple[int, int]] = (),
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0
        self.rows, self._seed, self._cursor = rows, seed, dict(cursor)
        self._global_batch_size, self._dp_rank = global_batch_size, dp_rank
        self._shape = (-1, dp_size, micro_batch_size)  # (A, ranks, B)
        self._left_out = sorted(left_out)

    def cursor(self) -> dict[str, Any]:
        """Where the run stands: the number of the next sample, and what data it refers to."""
        return dict(self._cursor)

    @staticmethod
    def merge_cursors(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One cursor of the cursors of all ranks: every rank knows the whole."""
        assert all(part == parts[0] for part in parts), "ranks stand at different samples"
        return parts[0]

    def at_end(self) -> bool:
        return False

    def describe(self, samples: ArrayLike) -> str:
        """Where samples come from, a line each. For error reports."""
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64)).ravel()
        epochs, rows = sample_window(numbers, len(self.rows.rows), self._seed)
        return "\n".join(
            f"sample {sample}: {self.rows.where[row]}, epoch {epoch}"
            for sample, epoch, row in zip(numbers.tolist(), epochs.tolist(), rows.tolist(), strict=True)
        )

    def close(self) -> None:
        """Nothing is held open."""

    def __next__(self) -> StepBatch:
        first = self._cursor["samples"]
        every, after = take(first, self._global_batch_size, self._left_out)
        samples = every.reshape(self._shape)[:, self._dp_rank]  # (G,) -> (A, ranks, B) -> (A, B)
        _, rows = sample_window(samples.ravel(), len(self.rows.rows), self._seed)
        parts = self.rows.batch(rows.tolist())
        tokens, targets = (part.view(*samples.shape, -1) for part in parts[:2])  # (A * B, T) -> (A, B, T)
        documents = None if parts[2] is None else parts[2].view(*samples.shape, -1)
        self._cursor["samples"] = after
        reference = None if self.rows.reference is None else self.rows.reference[rows].view(*samples.shape, 2)
        n_targets = int((targets != IGNORE).sum()) if reference is None else samples.size
        return StepBatch(
            tokens, targets, documents, samples, (first, after), n_targets, digest(samples, tokens.numpy()), reference
        )


def take(first: int, count: int, left_out: Sequence[tuple[int, int]]) -> tuple[IntArray, int]:
    """The next `count` samples from `first` on that are not left out, and the number after the last of them."""
    samples: list[int] = []
    while len(samples) < count:
        inside = next((last for begin, last in left_out if begin <= first <= last), None)
        if inside is not None:
            first = inside + 1
            continue
        samples.append(first)
        first += 1
    return np.array(samples, dtype=np.int64), first


def eval_rows(rows: RowSet, batch_size: int, dp_rank: int, dp_size: int) -> Iterator[tuple[list[int], Batch]]:
    """The rows of one rank, each of all once over the ranks: their numbers, and the batch.

    Every rank gets the same number of batches; where a rank has no row left, the batch is row 0 without targets and the
    list is empty.
    """
    n, step = len(rows.rows), batch_size * dp_size
    for first in range(dp_rank * batch_size, -(-n // step) * step, step):
        mine = list(range(first, min(first + batch_size, n)))
        tokens, targets, documents = rows.batch(mine or [0])
        yield mine, (tokens, targets if mine else torch.full_like(targets, IGNORE), documents)


def same_data(cursor: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise DataError where a checkpoint's cursor is of other data. expected: the cursor of what is there now."""
    for key, value in expected.items():
        if key != "samples" and cursor.get(key) != value:
            raise DataError(
                f"the run was trained on other data: its checkpoint has {key} {cursor.get(key)!r}, the files of task.train "
                f"give {value!r} now; restore them, or use another run.name for a new run"
            )
