"""The order of samples as a function: a keyed permutation of range(n) that is computed, never stored.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) works on
index = left * B + right, with left in range(A), right in range(B), A the smallest number with A * A >= n and B the
smallest with A * B >= n. An index that leaves range(n) is sent through again until it is back inside ("cycle walking").
A * B exceeds n by less than A, so that walks are rare for large n, and any index of any n costs the same operations.

The values are part of the format of a run, since a checkpoint holds a count of samples and no order;
tests/data/test_order.py pins them.
"""

import math
from collections.abc import Callable
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_N = 2**62

_ROUNDS = 12  # alternating, each half six times: with 8, the orders of 5 elements were measurably not equally likely
_GOLDEN = 0x9E3779B97F4A7C15
_U64 = 0xFFFF_FFFF_FFFF_FFFF

IntArray = NDArray[np.int64]
_Words = NDArray[np.uint64]
_Step = Callable[[_Words, int, int, list[_Words]], _Words]


def _mix(x: _Words) -> _Words:
    """The finaliser of SplitMix64: a bijection of 64-bit words; every input bit moves about half the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(values: ArrayLike | int, name: str) -> _Words:
    """Integers from 0 to 2**64 - 1 as a uint64 array of at least one dimension: 0-d arithmetic warns on overflow."""
    if isinstance(values, int):
        if not 0 <= values <= _U64:
            raise ValueError(f"{name}={values}; expected an integer from 0 to 2**64 - 1")
        return np.array([values], dtype=np.uint64)
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError(f"{name} contains {int(array.min())}; expected integers from 0 to 2**64 - 1")
    return array.astype(np.uint64)


def _indices(index: ArrayLike | int, n: int, name: str) -> _Words:
    words = _words(index, name)
    if not 1 <= n <= MAX_N:
        raise ValueError(f"n={n}; expected an integer from 1 to 2**62")
    if words.size and int(words.max()) >= n:
        raise ValueError(f"{name} contains {int(words.max())}, outside range(n) with n={n}")
    return words


def _offset(half: _Words, round_key: _Words, side: int) -> _Words:
    """A pseudo-random number in range(side) from one half and the round's key; side <= 2**31, so the product fits."""
    return ((_mix(half ^ round_key) >> np.uint64(32)) * np.uint64(side)) >> np.uint64(32)


def _forward(x: _Words, a: int, b: int, keys: list[_Words]) -> _Words:
    left, right = np.divmod(x, np.uint64(b))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _offset(right, key, a)) % np.uint64(a)
        else:
            right = (right + _offset(left, key, b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _backward(x: _Words, a: int, b: int, keys: list[_Words]) -> _Words:
    left, right = np.divmod(x, np.uint64(b))
    for number in reversed(range(len(keys))):
        if number % 2 == 0:
            left = (left + np.uint64(a) - _offset(right, keys[number], a)) % np.uint64(a)
        else:
            right = (right + np.uint64(b) - _offset(left, keys[number], b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _walk(step: _Step, index: ArrayLike | int, n: int, key: ArrayLike | int, name: str) -> IntArray:
    words = _indices(index, n, name)
    words, key_words = np.broadcast_arrays(words, _words(key, "key"))
    a = math.isqrt(n - 1) + 1  # the smallest a with a * a >= n
    b = -(-n // a)
    key_words = _mix(key_words + np.uint64(_GOLDEN))
    keys = [_mix(key_words + np.uint64((number * _GOLDEN) & _U64)) for number in range(1, _ROUNDS + 1)]
    out = step(words, a, b, keys)
    while (outside := out >= np.uint64(n)).any():
        out[outside] = step(out[outside], a, b, [key[outside] for key in keys])
    return out.astype(np.int64)


@overload
def permute(index: int, n: int, key: int) -> int: ...
@overload
def permute(index: ArrayLike, n: int, key: ArrayLike | int) -> IntArray: ...
def permute(index: ArrayLike | int, n: int, key: ArrayLike | int) -> IntArray | int:
    """Where the permutation of range(n) chosen by key sends index.

    index: an integer or an array of integers in range(n).    n: from 1 to 2**62.
    key: from 0 to 2**64 - 1; one, or an array that broadcasts with index.
    Returns an int for two ints, else int64 of the broadcast shape. Time and memory do not depend on n.
    Raises ValueError for an index outside range(n), or n or key out of bounds.
    """
    out = _walk(_forward, index, n, key, "index")
    return int(out[0]) if isinstance(index, int) and isinstance(key, int) else out


@overload
def invert(position: int, n: int, key: int) -> int: ...
@overload
def invert(position: ArrayLike, n: int, key: ArrayLike | int) -> IntArray: ...
def invert(position: ArrayLike | int, n: int, key: ArrayLike | int) -> IntArray | int:
    """The index that permute sends to position: invert(permute(i, n, key), n, key) == i.  Arguments as for permute."""
    out = _walk(_backward, position, n, key, "position")
    return int(out[0]) if isinstance(position, int) and isinstance(key, int) else out


def _epoch_keys(epoch: _Words, seed: int) -> _Words:
    return _mix(_mix(_words(seed, "seed")) + epoch * np.uint64(_GOLDEN))


@overload
def sample_window(sample: int, n_windows: int, seed: int) -> tuple[int, int]: ...
@overload
def sample_window(sample: ArrayLike, n_windows: int, seed: int) -> tuple[IntArray, IntArray]: ...
def sample_window(sample: ArrayLike | int, n_windows: int, seed: int) -> tuple[IntArray | int, IntArray | int]:
    """Which window a sample reads: (epoch, window), with epoch = sample // n_windows and an order of its own per epoch.

    sample: global sample number, counted from 0 over the whole run; an integer or an array of integers.
    n_windows: windows in the corpus, from 1 to 2**62.    seed: from 0 to 2**64 - 1.
    """
    if not 1 <= n_windows <= MAX_N:
        raise ValueError(f"n_windows={n_windows}; expected an integer from 1 to 2**62")
    words = _words(sample, "sample")
    epoch, index = np.divmod(words, np.uint64(n_windows))
    window = permute(index, n_windows, _epoch_keys(epoch, seed))
    if isinstance(sample, int):
        return int(epoch[0]), int(window[0])
    return epoch.astype(np.int64), window


@overload
def window_sample(epoch: int, window: int, n_windows: int, seed: int) -> int: ...
@overload
def window_sample(epoch: ArrayLike, window: ArrayLike, n_windows: int, seed: int) -> IntArray: ...
def window_sample(epoch: ArrayLike | int, window: ArrayLike | int, n_windows: int, seed: int) -> IntArray | int:
    """The sample that reads window in epoch; the inverse of sample_window."""
    epochs = _words(epoch, "epoch")
    index = invert(np.atleast_1d(window), n_windows, _epoch_keys(epochs, seed))
    sample = epochs.astype(np.int64) * n_windows + index
    return int(sample[0]) if isinstance(epoch, int) and isinstance(window, int) else sample


def stream_key(*numbers: int) -> int:
    """A key for permute from integers (each of 0 to 2**64 - 1): other numbers, or in another order, another key."""
    key = _words(0, "key")
    for number in numbers:
        key = _mix(_mix(key ^ _words(number, "number")) + np.uint64(_GOLDEN))
    return int(key[0])


class WindowOrder:
    """The windows of a source in the order in which its samples read them, epoch after epoch.

    shards_at_once None: each epoch is one permutation of all windows. K: the shards are permuted, and the windows of
    each K shards that follow each other are permuted among themselves, so that K shards at a time are enough to read
    an epoch in order. A call costs the same at any position; K needs a table of the shards for each epoch in use.
    """

    def __init__(self, windows_per_shard: IntArray, seed: int, shards_at_once: int | None = None) -> None:
        """windows_per_shard: (shards,), in the order of the windows' numbers. Raises ValueError when all are 0."""
        self._first_window = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(windows_per_shard)])
        self.n_windows = int(self._first_window[-1])
        if self.n_windows < 1:
            raise ValueError(f"the {len(windows_per_shard)} shards have no window; expected at least one")
        self.seed, self.shards_at_once = seed, shards_at_once
        self._epochs: dict[int, _ShardOrder] = {}

    def __call__(self, index: ArrayLike) -> tuple[IntArray, IntArray]:
        """(epoch, window) that samples index (n,) of the source read: two arrays (n,)."""
        if self.shards_at_once is None:
            return sample_window(index, self.n_windows, self.seed)
        epochs, within = np.divmod(np.atleast_1d(np.asarray(index, dtype=np.int64)), self.n_windows)
        windows = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = self._in_epoch(epoch).windows(within[here])
        return epochs, windows

    def group(self, index: int) -> tuple[int, int]:
        """(epoch, group) of sample index: all shards that its neighbours in the order lie in are shards(epoch, group)."""
        epoch, within = divmod(index, self.n_windows)
        return epoch, 0 if self.shards_at_once is None else self._in_epoch(epoch).group_of(within)

    def shards(self, epoch: int, group: int) -> list[int]:
        """The shards of a group, by number; the group after an epoch's last is the next epoch's first."""
        if self.shards_at_once is None:
            return list(range(len(self._first_window) - 1))
        order = self._in_epoch(epoch)
        if group >= order.n_groups:
            order, group = self._in_epoch(epoch + 1), 0
        return order.shards[group * self.shards_at_once : (group + 1) * self.shards_at_once].tolist()

    def _in_epoch(self, epoch: int) -> "_ShardOrder":
        if epoch not in self._epochs:
            assert self.shards_at_once is not None
            if len(self._epochs) > 3:  # neighbours in time; more than two epochs in one step are rare
                self._epochs.clear()
            self._epochs[epoch] = _ShardOrder(self._first_window, self.shards_at_once, stream_key(self.seed, epoch))
        return self._epochs[epoch]


class _ShardOrder:
    """One epoch of a WindowOrder with groups of shards."""

    def __init__(self, first_window: IntArray, shards_at_once: int, key: int) -> None:
        counts = np.diff(first_window)
        readable = np.flatnonzero(counts)  # a shard without a window would only take a place in a group
        self.shards = readable[permute(np.arange(len(readable)), len(readable), key)]
        self._first_window, self._size, self._key = first_window, shards_at_once, key
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts[self.shards])])
        self.n_groups = -(-len(self.shards) // shards_at_once)
        bounds = np.minimum(np.arange(self.n_groups + 1) * shards_at_once, len(self.shards))
        self._group_starts = self._starts[bounds]

    def group_of(self, within: int) -> int:
        return int(np.searchsorted(self._group_starts, within, side="right")) - 1

    def windows(self, within: IntArray) -> IntArray:
        groups = np.searchsorted(self._group_starts, within, side="right") - 1
        places = np.empty_like(within)  # along the epoch's shards, one after the other
        for group in np.unique(groups).tolist():
            here = groups == group
            start, end = int(self._group_starts[group]), int(self._group_starts[group + 1])
            key = stream_key(self._key, group)
            places[here] = start + permute(within[here] - start, end - start, key)
        rows = np.searchsorted(self._starts, places, side="right") - 1
        return self._first_window[self.shards[rows]] + places - self._starts[rows]
