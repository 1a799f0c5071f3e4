"""The mixture: exact shares, every source read in order without a gap, whatever changes when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import UNIT, Era, EraStage, Mixture, MixtureError, temper


def era(*stages, start=0, **most):
    """era({"a": 1}, (500, {"b": 1}), a=30): weights from 0 on, others from sample 500 on, a read 30 times at most."""
    pairs = [stage if isinstance(stage, tuple) else (0, stage) for stage in stages]
    return Era(start=start, stages=tuple(EraStage(start=at, weights=weights) for at, weights in pairs), most=most)


def everything(mixture, n):
    """For each source the indices that the first n samples read, in order; checked to be 0, 1, 2, ... each."""
    sources, indices = mixture.locate(np.arange(n))
    for source in range(len(mixture.names)):
        assert indices[sources == source].tolist() == list(range(np.count_nonzero(sources == source)))
    return sources


weights = st.dictionaries(st.sampled_from("abcde"), st.floats(1e-2, 1e2), min_size=1)


@settings(max_examples=60, deadline=None)
@given(stages=st.lists(st.tuples(st.integers(1, 9000), weights), max_size=3), first=weights, seed=st.integers(0, 2**63),
       most=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3000)))  # fmt: skip
def test_every_source_is_read_in_order_without_a_gap(stages, first, seed, most):
    stages = sorted(dict(stages).items())
    mixture = Mixture("abcde", [era(first, *stages, **most)], seed)
    n = 12_000 if mixture.end is None else min(12_000, mixture.end)
    sources = everything(mixture, n)
    counts = np.bincount(sources, minlength=5)
    assert all(counts["abcde".index(name)] <= limit for name, limit in most.items())
    for g in (0, 1, 777, 1024, n // 2, n):
        if g <= n:
            assert list(mixture.counts(g).values()) == np.bincount(sources[:g], minlength=5).tolist()


@settings(max_examples=60, deadline=None)
@given(weights=weights, seed=st.integers(0, 2**63), blocks=st.integers(1, 10**12))
def test_shares_are_exact_after_every_block_however_many(weights, seed, blocks):
    names = sorted(weights)
    mixture = Mixture(names, [era(weights)], seed)
    samples = blocks * mixture.segments[0].block
    counts, total = mixture.counts(samples), sum(weights.values())
    assert sum(counts.values()) == samples
    for name, share in zip(names, mixture.segments[0].shares, strict=True):
        assert abs(counts[name] - samples * share / UNIT) <= 1 + samples * 1e-15
        assert abs(share / UNIT - weights[name] / total) < 1e-11


def test_any_position_is_reached_at_once():
    mixture = Mixture("ab", [era({"a": 1, "b": 2})], 0)
    far = 10**15 + np.arange(3000)
    sources, indices = mixture.locate(far)
    before = mixture.counts(10**15)
    for source, name in enumerate("ab"):
        expected = before[name] + np.arange(np.count_nonzero(sources == source))
        assert indices[sources == source].tolist() == expected.tolist()


def test_sources_take_turns_in_a_keyed_order():
    one, other = (Mixture("ab", [era({"a": 1, "b": 1})], seed).locate(np.arange(2048))[0] for seed in (1, 2))
    assert one.tolist() != other.tolist()
    assert one[:1024].tolist() != one[1024:].tolist()
    longest = max(len(run) for run in "".join(map(str, one.tolist())).replace("01", "0 1").replace("10", "1 0").split())
    assert 4 < longest < 30  # neither in turns nor in long stretches


def test_a_stage_begins_at_its_sample():
    mixture = Mixture("abc", [era({"a": 1, "b": 1}, (1500, {"c": 1}))], 0)
    sources = everything(mixture, 4000)
    assert set(sources[:1500].tolist()) == {0, 1}
    assert set(sources[1500:].tolist()) == {2}
    assert mixture.shares(1499) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert mixture.shares(1500) == {"a": 0.0, "b": 0.0, "c": 1.0}


def test_a_source_at_its_limit_leaves_its_place_to_the_others():
    mixture = Mixture("abc", [era({"a": 2, "b": 1, "c": 1}, a=700)], 0)
    sources = everything(mixture, 6000)
    assert mixture.exhausted == [(mixture.segments[1].start, "a")]
    last = mixture.segments[1].start
    assert np.count_nonzero(sources == 0) == np.count_nonzero(sources[:last] == 0) == 700
    assert sources[last - 1] == 0
    assert abs(np.count_nonzero(sources[last : last + 4096] == 1) - 2048) <= 1


def test_all_at_their_limit_end_the_mixture():
    mixture = Mixture("ab", [era({"a": 1, "b": 2}, (9000, {"a": 1}), a=20, b=30)], 0)
    assert mixture.end == 50
    assert sorted(name for _, name in mixture.exhausted) == ["a", "b"]
    everything(mixture, 50)
    with pytest.raises(
        MixtureError, match=r"sample 50 is asked for, but every source has been read max_epochs times af"
    ):
        mixture.locate(np.array([3, 50]))


@pytest.mark.parametrize("seed", range(8))
def test_eras_repeat_nothing(seed):
    """Weights and sources change at a checkpoint: each source goes on behind what it gave before."""
    rng = np.random.default_rng(seed)
    eras, start = [], 0
    for _ in range(4):
        names = rng.permutation(list("abcd"))[: rng.integers(1, 5)].tolist()
        eras.append(era({name: float(rng.uniform(0.1, 5)) for name in names}, start=start))
        start += int(rng.integers(1, 3000))
    mixture = Mixture("abcd", eras, seed)
    sources = everything(mixture, start + 2000)
    for one, following in zip(eras, [*eras[1:], None], strict=True):
        end = following.start if following else start + 2000
        assert {"abcd"[s] for s in sources[one.start : end].tolist()} <= one.stages[0].weights.keys()
    # the past does not depend on what comes later
    for n in range(1, 4):
        earlier = Mixture("abcd", eras[:n], seed)
        assert earlier.locate(np.arange(eras[n].start))[0].tolist() == sources[: eras[n].start].tolist()


def test_an_era_has_the_stage_of_its_time():
    stages = ({"a": 1}, (1000, {"b": 1}), (2000, {"c": 1}))
    mixture = Mixture("abc", [era(*stages), era(*stages, start=1500)], 0)
    sources = everything(mixture, 3000)
    assert sources.tolist() == [0] * 1000 + [1] * 1000 + [2] * 1000


def test_a_name_more_changes_nothing():
    """A source that a later config adds must not move what was read before."""
    eras = [era({"a": 1, "c": 3})]
    assert Mixture("ac", eras, 5).locate(np.arange(5000))[1].tolist() == (
        Mixture("abcd", eras, 5).locate(np.arange(5000))[1].tolist()
    )


def test_where_two_mixtures_part():
    def parts(one, other, sample):
        return Mixture("abc", [one], 0).differs_from(Mixture("abc", [other], 0), sample)

    staged = era({"a": 1}, (1000, {"b": 1}), (2000, {"c": 1}))
    assert parts(staged, staged, 0) is None
    assert parts(staged, era({"b": 1}), 0) == 0
    assert parts(staged, era({"b": 1}), 1500) == 2000
    assert parts(era({"b": 1}), staged, 1500) == 2000
    assert parts(staged, era({"c": 1}), 2000) is None
    assert parts(era({"a": 1}, a=30), era({"a": 1}, a=50), 10) == 30  # the first has an end there
    assert (
        parts(era({"a": 1, "b": 1}, a=30), era({"a": 1, "b": 1}), 0)
        == (Mixture("abc", [era({"a": 1, "b": 1}, a=30)], 0).exhausted[0][0])
    )


def test_a_share_too_small_is_refused():
    with pytest.raises(MixtureError, match=r"the share of b in the mixture is 1.00e-07; expected at least 9.54e-07"):
        Mixture("ab", [era({"a": 1, "b": 1e-7})], 0)


def test_temperature():
    assert temper({"a": 9, "b": 1}, 1) == pytest.approx({"a": 0.9, "b": 0.1})
    assert temper({"a": 9, "b": 1}, 2) == pytest.approx({"a": 0.75, "b": 0.25})
    assert temper({"a": 1e300, "b": 1e300}, 0.01) == {"a": 0.5, "b": 0.5}
    assert temper({"a": 9, "b": 1}, 1e9)["b"] == pytest.approx(0.5)
