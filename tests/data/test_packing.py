"""Packing: every token a target once, windows as a slow best fit makes them, rows with what belongs to what."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import SHORTEST, PackingError, best_fit, count_windows, document_numbers, fill

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
CAPACITY = st.integers(2, 17)
PAD = -1


def corpus_of(lengths):
    """A token for every place: document * 1000 + place, so that a token tells where it is from."""
    return lambda document, start, n: np.arange(start, start + n) + 1000 * document


def pieces_of(packing):
    """Per window its pieces: (document, first token, tokens)."""
    columns = (packing.piece_document, packing.piece_start, packing.piece_tokens)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    offsets = packing.window_offsets.tolist()
    return [rows[first:last] for first, last in zip(offsets, offsets[1:], strict=False)]


def slow_best_fit(lengths, capacity):
    """The rooms left in the windows, by the plain algorithm: one piece at a time, every window looked at."""
    pieces = []
    for length in lengths:
        while length > capacity:
            pieces.append(capacity)
            length -= capacity - 1
        if length >= SHORTEST:
            pieces.append(length)
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= piece]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= piece
    return rooms


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_every_token_but_each_documents_first_is_a_target_once(lengths, capacity):
    packing = best_fit(lengths, capacity)
    rows, documents, counted = fill(packing, range(packing.n_windows), corpus_of(lengths), PAD, mask=True)
    targets = Counter(rows[:, 1:][counted].tolist())
    assert targets == Counter(1000 * d + i for d, length in enumerate(lengths) for i in range(1, length))
    inputs, after = rows[:, :-1][counted], rows[:, 1:][counted]
    assert (after == inputs + 1).all()  # the token before it in its own document predicts it
    for numbers, row in zip(documents, rows, strict=True):
        for number in np.unique(numbers):
            held = row[:-1][numbers == number]
            assert len({token // 1000 for token in held}) == 1, "one number, two documents"


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_only_too_long_documents_are_cut_and_every_token_is_in_a_window(lengths, capacity):
    packing = best_fit(lengths, capacity)
    windows = pieces_of(packing)
    held = Counter((d, i) for window in windows for d, start, n in window for i in range(start, start + n))
    assert held.keys() == {(d, i) for d, n in enumerate(lengths) if n >= SHORTEST for i in range(n)}
    by_document = {}
    for window in windows:
        assert sum(n for *_, n in window) <= capacity
        assert window == sorted(window)
        for document, start, n in window:
            by_document.setdefault(document, []).append((start, n))
    for document, pieces in by_document.items():
        pieces.sort()
        if lengths[document] <= capacity:
            assert pieces == [(0, lengths[document])]
        assert all(a + n == b + 1 for (a, n), (b, _) in zip(pieces, pieces[1:], strict=False)), "one token is shared"
        assert all(n == capacity for _, n in pieces[:-1])
    assert packing.n_left_out == sum(length < SHORTEST for length in lengths)
    assert packing.n_pad == packing.n_windows * capacity - sum(held.values())


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_windows_are_those_of_a_slow_best_fit(lengths, capacity):
    packing = best_fit(lengths, capacity)
    rooms = [capacity - sum(n for *_, n in window) for window in pieces_of(packing)]
    assert sorted(rooms) == sorted(slow_best_fit(lengths, capacity))
    assert count_windows(lengths, capacity) == packing.n_windows == len(rooms)


@pytest.mark.parametrize("seed", range(4))
def test_many_documents_as_a_slow_best_fit_packs_them(seed):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(3, 1.2, 1500).astype(int), 900)
    rooms = [129 - sum(n for *_, n in window) for window in pieces_of(best_fit(lengths, 129))]
    assert sorted(rooms) == sorted(slow_best_fit(lengths.tolist(), 129))


def test_a_packing_by_hand():
    """Capacity 6: 9 tokens are cut into 6 and 4 of which one is shared; the 2 fits beside the 4, the 3s together."""
    packing = best_fit([3, 9, 0, 2, 1, 3], 6)
    assert pieces_of(packing) == [[(1, 0, 6)], [(1, 5, 4), (3, 0, 2)], [(0, 0, 3), (5, 0, 3)]]
    assert (packing.n_windows, packing.n_left_out, packing.n_tokens, packing.n_pad) == (3, 2, 18, 0)
    rows, documents, counted = fill(packing, [2, 1], corpus_of([3, 9, 0, 2, 1, 3]), PAD, mask=True)
    assert rows.tolist() == [[0, 1, 2, 5000, 5001, 5002], [1005, 1006, 1007, 1008, 3000, 3001]]
    assert documents.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert counted.tolist() == [[True, True, False, True, True], [True, True, True, False, True]]
    assert (rows.dtype, documents.dtype, counted.dtype) == (np.int64, np.int32, np.bool_)


def test_padding_has_a_document_of_its_own_and_is_no_target():
    packing = best_fit([3, 2], 9)
    rows, documents, counted = fill(packing, 0, corpus_of([3, 2]), 7, mask=False)
    assert rows.tolist() == [[0, 1, 2, 1000, 1001, 7, 7, 7, 7]]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert counted.tolist() == [[True, True, True, True, False, False, False, False]]  # 2 -> 1000 counts
    assert packing.efficiency == 5 / 9


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_without_masking_only_documents_first_tokens_are_added(lengths, capacity):
    packing = best_fit(lengths, capacity)
    windows = range(packing.n_windows)
    masked = fill(packing, windows, corpus_of(lengths), PAD, mask=True)
    plain = fill(packing, windows, corpus_of(lengths), PAD, mask=False)
    assert (masked[0] == plain[0]).all()
    assert (masked[1] == plain[1]).all()
    assert (masked[2] <= plain[2]).all()
    added = plain[2] & ~masked[2]
    assert (plain[0][:, 1:][added] % 1000 == 0).all()
    ends = {1000 * d + length - 1 for d, length in enumerate(lengths)}
    assert set(plain[0][:, :-1][added].tolist()) <= ends
    repeated = Counter(plain[0][:, 1:][plain[2]].tolist())
    assert not repeated or max(repeated.values()) == 1, "a token is a target twice"


def test_packing_depends_on_its_arguments_alone():
    lengths = np.random.default_rng(3).integers(0, 300, 4000)
    once = best_fit(lengths, 65)
    for other in (best_fit(lengths.tolist(), 65), best_fit(lengths.astype(np.uint16), 65)):
        for name in ("window_offsets", "piece_document", "piece_start", "piece_tokens"):
            assert getattr(once, name).dtype == np.int64
            assert np.array_equal(getattr(once, name), getattr(other, name))


def test_golden_packing():
    """A block's packing says what a window number means: it must never change, or checkpoints resume on other data."""
    packing = best_fit([5, 11, 3, 3, 8, 2, 4, 6, 1, 7], 8)
    assert pieces_of(packing) == [
        [(1, 0, 8)],
        [(4, 0, 8)],
        [(9, 0, 7)],
        [(5, 0, 2), (7, 0, 6)],
        [(0, 0, 5), (2, 0, 3)],
        [(1, 7, 4), (6, 0, 4)],
        [(3, 0, 3)],
    ]


def test_long_windows_sort_by_more_than_two_bytes():
    lengths = [70_000, 66_000, 4_000, 2, 65_537]
    assert pieces_of(best_fit(lengths, 70_000)) == [
        [(0, 0, 70_000)],
        [(1, 0, 66_000), (2, 0, 4_000)],
        [(3, 0, 2), (4, 0, 65_537)],
    ]


@pytest.mark.parametrize("lengths", [[], [0], [1], [0] * 1000, np.ones(10**6, dtype=np.int32)])
def test_documents_without_a_target_make_no_window(lengths):
    packing = best_fit(lengths, 8)
    assert (packing.n_windows, packing.n_tokens, packing.n_pad, packing.efficiency) == (0, 0, 0, 1.0)
    assert packing.n_left_out == len(lengths)
    assert packing.window_offsets.tolist() == [0]
    assert count_windows(lengths, 8) == 0
    rows, documents, counted = fill(packing, [], corpus_of(lengths), PAD, mask=True)
    assert (rows.shape, documents.shape, counted.shape) == ((0, 8), (0, 7), (0, 7))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 30))
def test_document_numbers_of_a_contiguous_window(data, seq_len):
    starts = sorted(data.draw(st.lists(st.integers(0, seq_len), max_size=12)))
    documents, counted = document_numbers(starts, seq_len)
    owner = [sum(start <= i for start in {s for s in starts if s > 0}) for i in range(seq_len + 1)]
    assert documents.tolist() == owner[:-1]
    assert counted.tolist() == [owner[i] == owner[i + 1] for i in range(seq_len)]
    assert (documents.dtype, counted.dtype) == (np.int32, np.bool_)


def test_both_ways_agree_on_the_same_row():
    lengths = [4, 3, 5, 2]
    packing = best_fit(lengths, 14)
    assert packing.n_windows == 1
    _, documents, counted = fill(packing, [0], corpus_of(lengths), PAD, mask=True)
    starts = np.cumsum([0, *lengths])[:-1]
    again, also = document_numbers(starts, 13)
    assert documents[0].tolist() == again.tolist()
    assert counted[0].tolist() == also.tolist()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: best_fit([3], 1), "capacity=1; expected at least 2 tokens, which is seq_len 1"),
        (lambda: count_windows([3], 0), "capacity=0; expected at least 2"),
        (lambda: best_fit([3, -4], 8), "document 1 has length -4; expected 0 or more"),
        (lambda: best_fit([2.5], 8), r"lengths have shape \(1,\) and dtype float64; expected integers"),
        (lambda: best_fit([[2, 3]], 8), r"lengths have shape \(1, 2\) and dtype int64; expected integers"),
        (lambda: fill(best_fit([3], 8), [1], corpus_of([3]), 0, True), "windows 1 to 1 asked of a packing of 1"),
        (lambda: fill(best_fit([3], 8), [-1], corpus_of([3]), 0, True), "windows -1 to -1 asked .* expected 0 to 0"),
        (
            lambda: fill(best_fit([3], 8), [0], lambda *_: np.arange(2), 0, True),
            "document 0 gave 2 tokens from token 0 on, expected 3",
        ),
        (lambda: document_numbers([0, 9], 8), "positions 0 to 9 of a window of seq_len=8; expected 0 to 8"),
        (lambda: document_numbers([-1], 8), "positions -1 to -1 of a window of seq_len=8"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(PackingError, match=match):
        call()


def test_hundreds_of_thousands_of_documents_are_packed_tightly():
    """0.1 s here; a search through all open windows for each document would outlast the test's limit of time."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.3, 300_000).astype(int), 10**6)
    packing = best_fit(lengths, 2049)
    assert packing.efficiency > 0.999
    assert count_windows(lengths, 2049) == packing.n_windows
