"""The order: a bijection for every n and key, its inverse, its cost, its chance, and its pinned values."""

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import MAX_N, WindowOrder, invert, permute, sample_window, stream_key, window_sample

KEYS = st.integers(0, 2**64 - 1)

GOLDEN_12 = [9, 3, 1, 7, 5, 8, 6, 2, 10, 0, 4, 11]
GOLDEN_HUGE = [980024028681739, 243900749472539, 540870830479642, 991302443925646, 810099856900284]
GOLDEN_LAST = 1746204034250007530
GOLDEN_SAMPLES = [[0, 0, 0, 1, 1, 1], [85, 60, 3, 38, 74, 55]]


@settings(max_examples=300)
@given(n=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection_and_invert_undoes_it(n, key):
    out = permute(np.arange(n), n, key)
    assert out.dtype == np.int64
    assert sorted(out.tolist()) == list(range(n))
    assert invert(out, n, key).tolist() == list(range(n))


@given(data=st.data(), n=st.integers(1, MAX_N), key=KEYS)
def test_invert_undoes_permute_at_any_size(data, n, key):
    index = data.draw(st.integers(0, n - 1))
    position = permute(index, n, key)
    assert type(position) is int
    assert 0 <= position < n
    assert invert(position, n, key) == index


@given(n=st.integers(1, MAX_N), keys=st.lists(KEYS, min_size=1, max_size=5))
def test_arrays_of_keys_broadcast(n, keys):
    together = permute(np.array([0, n - 1])[:, None], n, np.array(keys, dtype=np.uint64))
    assert together.tolist() == [[permute(index, n, key) for key in keys] for index in (0, n - 1)]


def test_cost_does_not_grow_with_n():
    """10**15 windows of 2,048 tokens are two quintillion tokens; a stored order of them would take 8 PB."""
    tracemalloc.start()
    began = time.perf_counter()
    sample_window(np.arange(10**15 + 5, 10**15 + 1029), 10**15, seed=3)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert seconds < 0.5  # 0.3 ms alone; the rest is for a busy machine


def test_positions_look_random():
    """Each statistic of a uniformly random permutation is normal or chi-square; a bound of 6 standard deviations.

    The correlation of index and position has standard deviation 1 / sqrt(n - 1). A 16 x 16 table of (index, position)
    buckets has chi-square with 15 x 15 degrees of freedom, whose standard deviation is sqrt(2 x 225). The table of
    64 buckets of displacements and that of steps between neighbours have 63. With 20 keys and 6 sigma, a good order
    fails with a chance below 1e-6, and the keys are fixed.
    """
    n = 2**14
    index = np.arange(n)
    for key in range(20):
        out = permute(index, n, key)
        assert abs(np.corrcoef(index, out)[0, 1]) < 6 / np.sqrt(n - 1)
        table = np.bincount(index // (n // 16) * 16 + out // (n // 16), minlength=256)
        assert ((table - n / 256) ** 2 / (n / 256)).sum() < 225 + 6 * np.sqrt(2 * 225)
        for differences in ((out - index) % n, np.diff(out) % n):
            counts = np.bincount(differences // (n // 64), minlength=64)
            expected = len(differences) / 64
            assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_permutations_are_all_reached_equally_often(n):
    """Over keys, each of the n! orders has the same chance: chi-square with n! - 1 degrees of freedom, 6 sigma."""
    orders = Counter(zip(*permute(np.arange(n)[:, None], n, np.arange(24_000)).tolist(), strict=True))
    every = list(itertools.permutations(range(n)))
    expected = 24_000 / len(every)
    statistic = sum((orders[order] - expected) ** 2 / expected for order in every)
    assert statistic < len(every) - 1 + 6 * np.sqrt(2 * (len(every) - 1))


def test_neighbouring_keys_share_no_more_than_chance():
    """Two random permutations agree in one place on average, in more than 9 with a chance of 1e-6 (Poisson)."""
    n = 10_000
    orders = [permute(np.arange(n), n, key) for key in (0, 1, 2, 3, 2**63, 2**64 - 1)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() <= 9


@given(
    samples=st.lists(st.integers(0, 10**12), min_size=1, max_size=9), n=st.integers(1, 10**6), seed=st.integers(0, 9)
)
def test_sample_window_and_back(samples, n, seed):
    epochs, windows = sample_window(np.array(samples), n, seed)
    assert epochs.tolist() == [sample // n for sample in samples]
    assert window_sample(epochs, windows, n, seed).tolist() == samples
    first = sample_window(samples[0], n, seed)
    assert first == (epochs[0], windows[0])
    assert window_sample(*first, n, seed) == samples[0]


def test_epochs_read_every_window_once_each_in_its_own_order():
    n = 1000
    epochs, windows = sample_window(np.arange(3 * n), n, seed=5)
    orders = [windows[epochs == epoch].tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert sample_window(np.arange(n), n, seed=6)[1].tolist() != orders[0]


def test_golden_values():
    """The order is part of every run's record: these values must never change, or checkpoints resume on other data."""
    assert permute(np.arange(12), 12, 0).tolist() == GOLDEN_12
    assert permute(np.arange(5), 10**15, 12345).tolist() == GOLDEN_HUGE
    assert permute(MAX_N - 1, MAX_N, 2**64 - 1) == GOLDEN_LAST
    assert [window.tolist() for window in sample_window(np.arange(97, 103), 100, seed=7)] == GOLDEN_SAMPLES


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: permute(5, 5, 0), r"index contains 5, outside range\(n\) with n=5"),
        (lambda: permute(-1, 5, 0), "index=-1; expected an integer from 0"),
        (lambda: permute(np.array([3, -2]), 5, 0), "index contains -2"),
        (lambda: permute(np.array([0.5]), 5, 0), "index has dtype float64; expected integers"),
        (lambda: invert(np.array([7]), 5, 0), r"position contains 7, outside range\(n\)"),
        (lambda: permute(0, 0, 0), "n=0; expected an integer from 1"),
        (lambda: permute(0, MAX_N + 1, 0), r"expected an integer from 1 to 2\*\*62"),
        (lambda: permute(0, 5, -1), "key=-1"),
        (lambda: permute(0, 5, 2**64), "key=18446744073709551616"),
        (lambda: sample_window(0, 0, 0), "n_windows=0; expected"),
        (lambda: sample_window(-1, 5, 0), "sample=-1"),
        (lambda: sample_window(0, 5, -3), "seed=-3"),
        (lambda: window_sample(-1, 0, 5, 0), "epoch=-1"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -- groups of shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shards_at_once", [1, 2, 3, 7, 50])
def test_groups_read_each_window_once_an_epoch_and_few_shards_at_a_time(seed, shards_at_once):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, 20)
    counts[0] = 3
    order = WindowOrder(counts, seed, shards_at_once)
    n = int(counts.sum())
    epochs, windows = order(np.arange(3 * n))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(n)]
    shard_of = np.repeat(np.arange(20), counts)
    orders = [windows[epoch * n : (epoch + 1) * n].tolist() for epoch in range(3)]
    assert all(sorted(one) == list(range(n)) for one in orders)
    assert orders[0] != orders[1] != orders[2]
    for epoch, one in enumerate(orders):
        groups = [order.group(epoch * n + i) for i in range(n)]
        assert [group for _, group in groups] == sorted(group for _, group in groups)
        for i, window in enumerate(one):
            assert shard_of[window] in order.shards(*groups[i])
        assert all(len(order.shards(*group)) <= shards_at_once for group in groups)
    last = order.group(n - 1)
    assert order.shards(0, last[1] + 1) == order.shards(1, 0)  # what comes after an epoch is the next one's beginning


def test_groups_are_random_access():
    order = WindowOrder(np.array([4, 5, 6, 7]), 3, 2)
    _, windows = order(np.arange(60))
    shuffled = np.random.default_rng(0).permutation(60)
    assert order(shuffled)[1].tolist() == windows[shuffled].tolist()


def test_without_groups_the_order_is_that_of_sample_window():
    order = WindowOrder(np.array([4, 5, 6]), 3)
    assert order(np.arange(40))[1].tolist() == sample_window(np.arange(40), 15, 3)[1].tolist()
    assert order.group(39) == (2, 0)
    assert order.shards(2, 0) == [0, 1, 2]


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the 2 shards have no window"):
        WindowOrder(np.array([0, 0]), 3)


def test_stream_keys_differ():
    keys = {stream_key(*numbers) for numbers in itertools.product(range(8), repeat=3)}
    assert len(keys) == 512
    assert stream_key(1, 2, 3) == 0x1129A4877030C490  # part of the format of a run
