"""Packing: whole documents into windows of equal length, and which positions of a window belong to which document.

Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830): longest first, each
document goes where the least room is left that still holds it. Only a document longer than a window is cut, and then
the next piece repeats the last token of the one before, so that with document masking every token is a target exactly
once, apart from each document's first: nothing before that predicts it.

A window is seq_len + 1 tokens, its capacity: inputs are its first seq_len tokens, targets its last seq_len.

W windows, P pieces, C capacity, T = C - 1 positions, n rows
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.errors import DataError

SHORTEST = 2  # tokens: a document of one has no target, and no piece is shorter than this

Read = Callable[[int, int, int], NDArray]  # (document, first token in it, tokens) -> (tokens,)


class PackingError(DataError):
    """Lengths, a capacity or places that cannot be packed, or a reader that does not give what was packed."""


@dataclass(frozen=True)
class Packing:
    """Which pieces of which documents make which window: the pieces of window w are [offsets[w], offsets[w + 1]).

    Within a window pieces are in the order of their documents, and no window is empty.
    """

    capacity: int  # tokens of a window
    window_offsets: NDArray[np.int64]  # (W + 1,) first piece of each window, and P at the end
    piece_document: NDArray[np.int64]  # (P,) number of the document in the lengths given
    piece_start: NDArray[np.int64]  # (P,) first token, counted within the document
    piece_tokens: NDArray[np.int64]  # (P,) SHORTEST to capacity
    n_left_out: int  # documents without a target, of no token or one, which are in no window

    @property
    def n_windows(self) -> int:
        return len(self.window_offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens in windows, padding not counted; a token that two pieces share counts twice."""
        return int(self.piece_tokens.sum())

    @property
    def n_pad(self) -> int:
        """Padding tokens in all windows."""
        return self.n_windows * self.capacity - self.n_tokens

    @property
    def efficiency(self) -> float:
        """Fraction of the windows' tokens that is not padding; 1 without windows."""
        return self.n_tokens / (self.n_windows * self.capacity) if self.n_windows else 1.0


def best_fit(lengths: ArrayLike, capacity: int) -> Packing:
    """Pack documents of `lengths` (n,) tokens, end tokens counted, into windows of `capacity` tokens.

    A pure function of its arguments. Documents of fewer than SHORTEST tokens predict nothing and are left out, counted
    in n_left_out. Windows are numbered in the order in which they are opened, so those of long documents come first.
    Raises PackingError for a capacity below SHORTEST, and for lengths that are negative or no integers.
    """
    documents = _checked(lengths, capacity)
    piece_document, piece_start, piece_tokens = _cut(documents, capacity)
    window_of_piece, n_windows = _place(piece_tokens, capacity)
    order = np.argsort(window_of_piece, kind="stable")  # pieces are in the documents' order, and stay so in a window
    counts = np.bincount(window_of_piece, minlength=n_windows)
    return Packing(
        capacity=capacity,
        window_offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        piece_document=piece_document[order],
        piece_start=piece_start[order],
        piece_tokens=piece_tokens[order],
        n_left_out=int((documents < SHORTEST).sum()),
    )


def count_windows(lengths: ArrayLike, capacity: int) -> int:
    """The windows that best_fit makes, without making them: several times as quick. Raises as best_fit does."""
    _, _, piece_tokens = _cut(_checked(lengths, capacity), capacity)
    return sum(move.windows for move in _moves(_histogram(piece_tokens, capacity), capacity) if move.opens)


def fill(
    packing: Packing, windows: ArrayLike, read: Read, pad_id: int, mask: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """The tokens of some windows, with what belongs to what.

    windows: (n,) numbers of windows.    read: gives a stretch of a document's tokens.    pad_id: the token after the end.
    mask: whether documents do not see each other. Then a document's first token is no target. Without it, it is one of
    the end token before it, as in contiguous windows; the repeated token of a document that was cut is a target neither
    way, since it already was one in another window.
    Returns the rows (n, C); the number within its row of each position's document (n, T), from 0 upwards, padding
    having one of its own; and whether each position's target counts (n, T), never for padding.
    Raises PackingError for windows that are not in the packing, and when `read` gives another number of tokens.
    """
    numbers = np.atleast_1d(np.asarray(windows, dtype=np.int64))
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < packing.n_windows:
        raise PackingError(
            f"windows {numbers.min()} to {numbers.max()} asked of a packing of {packing.n_windows}; "
            f"expected 0 to {packing.n_windows - 1}"
        )
    C = packing.capacity
    rows = np.full((numbers.size, C), pad_id, dtype=np.int64)
    documents = np.empty((numbers.size, C - 1), dtype=np.int32)
    counted = np.zeros((numbers.size, C - 1), dtype=np.bool_)
    for row, window in enumerate(numbers.tolist()):
        first, last = packing.window_offsets[window : window + 2].tolist()
        end = 0
        for number, piece in enumerate(range(first, last)):
            document, start, n = (
                int(array[piece]) for array in (packing.piece_document, packing.piece_start, packing.piece_tokens)
            )
            rows[row, end : end + n] = _read(read, document, start, n)
            documents[row, end : end + n] = number  # a last token at the row's end has no position: cut off by NumPy
            counted[row, end : end + n - 1] = True
            if end and not mask and start == 0:
                counted[row, end - 1] = True  # from the end token before to this document's first
            end += n
        documents[row, end:] = last - first
    return rows, documents, counted


def document_numbers(starts: ArrayLike, seq_len: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The same for a contiguous window, from the positions in it at which documents begin.

    starts: positions in the window's seq_len + 1 tokens, ascending; 0 may be among them or not, as the window's first
    token begins a document or goes on with one, and one position may be named twice (an empty document).
    Returns each position's document (seq_len,), from 0 upwards, and whether its target belongs to the same document
    (seq_len,). Raises PackingError for a position outside the window.
    """
    positions = np.asarray(starts, dtype=np.int64)
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) <= seq_len:
        raise PackingError(
            f"documents begin at positions {positions.min()} to {positions.max()} of a window of seq_len={seq_len}; "
            f"expected 0 to {seq_len}"
        )
    begins = np.zeros(seq_len + 1, dtype=np.bool_)
    begins[positions] = True
    begins[0] = False  # the first document of a window is number 0, wherever it began
    return np.cumsum(begins[:-1], dtype=np.int32), ~begins[1:]


def _checked(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    if capacity < SHORTEST:
        raise PackingError(f"capacity={capacity}; expected at least {SHORTEST} tokens, which is seq_len 1")
    array = np.atleast_1d(np.asarray(lengths))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PackingError(f"lengths have shape {array.shape} and dtype {array.dtype}; expected integers (n,)")
    if int(array.min()) < 0:
        raise PackingError(f"document {int(array.argmin())} has length {array.min()}; expected 0 or more tokens")
    return array.astype(np.int64)


def _cut(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces in the documents' order: document, first token, tokens, each (P,). Neighbours share one token."""
    step = capacity - 1  # targets of a full piece
    pieces = np.where(lengths < SHORTEST, 0, -(-(lengths - 1) // step))
    document = np.repeat(np.arange(lengths.size), pieces)
    number = np.arange(document.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of the piece in its document
    start = number * step
    return document, start, np.minimum(lengths[document] - start, capacity)


class _Move(NamedTuple):
    """`windows` windows with `room` tokens left take `each` pieces of `length` tokens."""

    length: int
    room: int
    windows: int
    each: int
    opens: bool  # the windows are new ones


def _histogram(piece_tokens: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    return np.bincount(piece_tokens, minlength=capacity + 1)


def _moves(histogram: NDArray[np.int64], capacity: int) -> Iterator[_Move]:
    """Best-fit decreasing over the number of pieces of each length, (C + 1,): the same for all orders of documents.

    Pieces of one length are placed many at a time. The least room that holds such a piece, once it has taken one, is
    less than before and still the least: so one window takes them until none fits, then the next of the same room does.
    """
    windows_with = [0] * (capacity + 1)  # room -> open windows
    rooms = 0  # the same as a set of bits: one shift finds the least room that is enough
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            enough = rooms >> length
            opens = enough == 0
            room = capacity if opens else length + (enough & -enough).bit_length() - 1
            each = min(room // length, left)
            windows = left // each if opens else min(left // each, windows_with[room])
            yield _Move(length, room, windows, each, opens)
            left -= windows * each
            if not opens:
                windows_with[room] -= windows
                if windows_with[room] == 0:
                    rooms ^= 1 << room
            rest = room - each * length
            windows_with[rest] += windows
            rooms |= 1 << rest


def _place(piece_tokens: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """The window of each piece (P,), and how many windows there are."""
    windows_with: defaultdict[int, list[int]] = defaultdict(list)  # room -> numbers of open windows; the last is taken
    windows: list[int] = []  # of each piece, longest piece first
    n_windows = 0
    for move in _moves(_histogram(piece_tokens, capacity), capacity):
        if move.opens:
            taken = list(range(n_windows, n_windows + move.windows))
            n_windows += move.windows
        else:
            stack = windows_with[move.room]
            taken = stack[-move.windows :]
            del stack[-move.windows :]
        windows.extend(taken if move.each == 1 else np.repeat(taken, move.each).tolist())
        windows_with[move.room - move.each * move.length].extend(taken)
    # Two bytes sort by counting, in linear time.
    short = capacity - piece_tokens
    by_length = np.argsort(short.astype(np.uint16) if capacity < 2**16 else short, kind="stable")
    window_of_piece = np.empty(piece_tokens.size, dtype=np.int64)
    window_of_piece[by_length] = windows
    return window_of_piece, n_windows


def _read(read: Read, document: int, start: int, n: int) -> NDArray:
    tokens = read(document, start, n)
    if len(tokens) != n:
        raise PackingError(
            f"document {document} gave {len(tokens)} tokens from token {start} on, expected {n}; it is not as long as "
            "when it was packed: pack the shard that is being read"
        )
    return tokens
