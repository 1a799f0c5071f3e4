"""What a run reads: each sample once over any changes, and nothing read again when the mixture changes on purpose."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.corpus import Corpus
from data.dataset import Dataset, DatasetError, open_valid
from data.loader import Loader, eval_batches
from data.manifest import CorpusError
from data.mixture import MixtureError

T = 4
SHARDS = {"prose": [[30, 11], [7, 25]], "poems": [[19, 2, 14], [8]], "code": [[60], [5, 6], [33]]}  # 10+7, 8+1, 14+2+8


@pytest.fixture
def folder(make_corpus):
    return make_corpus(**SHARDS)


def config(folder, weights, **more):
    """weights: by source, or None for none."""
    names = weights if isinstance(weights, dict) else dict.fromkeys(weights)
    sources = [
        {"kind": "text", "paths": ["-"], "name": name, **(value if isinstance(value, dict) else {"weight": value})}
        for name, value in names.items()
    ]
    return DataConfig.model_validate({"corpus": str(folder), "sources": sources, "seed": 3, **more})


def opened(folder, weights, batch=1, **more):
    return Dataset.open(config(folder, weights, **more), T, batch)


MIX = {"prose": 6.0, "poems": 3.0, "code": 1.0}


def test_sources_come_in_their_shares_and_orders(folder):
    dataset = opened(folder, MIX)
    samples = np.arange(4096)
    place = dataset.locate(samples)
    rows = dataset.read(samples).tokens
    for number, name in enumerate(dataset.names):
        of_source = rows[place.sources == number]
        corpus = dataset.corpora[name]
        _, windows = corpus.order(3)(np.arange(len(of_source)))
        assert of_source.tolist() == corpus.windows(windows).tolist()
        assert abs(len(of_source) - 4096 * MIX[name] / 10) <= 1
        assert dataset.epochs(4096)[name] == len(of_source) / corpus.n_windows
    shuffled = np.random.default_rng(0).permutation(4096)
    assert dataset.read(shuffled).tokens.tolist() == rows[shuffled].tolist()


def test_without_weights_a_sources_share_is_that_of_its_tokens(folder):
    dataset = opened(folder, ["prose", "poems", "code"])
    tokens = {name: sum(map(sum, shards)) for name, shards in SHARDS.items()}
    assert dataset.mixture.shares(0) == pytest.approx({name: n / sum(tokens.values()) for name, n in tokens.items()})
    warmer = opened(folder, ["prose", "poems", "code"], temperature=2.0).mixture.shares(0)
    roots = {name: n**0.5 for name, n in tokens.items()}
    assert warmer == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})


def test_temperature_evens_out_weights_and_stages(folder):
    stages = [{"from_tokens": 400 * T, "weights": {"prose": 9.0, "code": 1.0}}]
    dataset = opened(folder, {"prose": 16.0, "poems": 4.0, "code": 1.0}, temperature=2.0, stages=stages)
    assert dataset.mixture.shares(0) == pytest.approx({"prose": 4 / 7, "poems": 2 / 7, "code": 1 / 7})
    assert dataset.mixture.shares(400) == pytest.approx({"prose": 0.75, "poems": 0.0, "code": 0.25})
    given = np.bincount(dataset.locate(np.arange(400)).sources, minlength=3)
    assert np.abs(given - 400 * np.array([1, 2, 4]) / 7).max() < 40  # code, poems, prose


def test_the_order_of_names_in_a_config_changes_nothing(folder):
    there, back = opened(folder, MIX), opened(folder, dict(reversed(MIX.items())))
    assert there.read(np.arange(500)).tokens.tolist() == back.read(np.arange(500)).tokens.tolist()
    assert back.go_on(there.cursor(100)) == 100
    assert len(back.eras) == 1


def test_stages_begin_at_their_token(folder):
    dataset = opened(folder, MIX, stages=[{"from_tokens": 401 * T - 3, "weights": {"code": 1.0}}])
    sources = dataset.locate(np.arange(2000)).sources
    assert set(sources[401:].tolist()) == {dataset.names.index("code")}
    assert dataset.names.index("prose") in sources[399:401].tolist() or len(set(sources[:401].tolist())) == 3


def test_max_epochs(folder):
    dataset = opened(folder, {"prose": {"weight": 1.0, "max_epochs": 2.5}, "code": {"weight": 1.0}})
    counts = dataset.mixture.counts(10_000)
    assert counts["prose"] == int(2.5 * 17)
    lines = dataset.check_length(10_000)
    assert any(line.startswith("prose has been read max_epochs times at sample ") for line in lines)
    assert any(line.startswith("code is read 414.9 times; more than 4 help little") for line in lines)
    assert dataset.check_length(20) == []
    capped = opened(folder, {"prose": {"weight": 1.0, "max_epochs": 1.0}})
    assert capped.check_length(17) == []
    with pytest.raises(
        DatasetError, match="up to 18 samples, left-out ones counted, but max_epochs in data.sources admits 17; raise"
    ):
        capped.check_length(18)
    with pytest.raises(MixtureError, match="sample 17 is asked for"):
        capped.read(np.array([17]))


# -- the cursor --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
@pytest.mark.fault(39)
def test_exactly_once_over_any_world_and_any_change_on_purpose(folder, seed):
    """Stopped and gone on at random, with other ranks, batches, accumulation, and now and then other weights or sources:
    each source's samples are read in order, none twice, none left out."""
    generator = random.Random(seed)
    cursor, read = None, {name: [] for name in SHARDS}
    weights = MIX
    for _ in range(12):
        ranks = generator.choice([1, 2, 3, 4])
        B = generator.choice([1, 2])
        G = ranks * B * generator.choice([k for k in (1, 2, 3) if ranks * B * k <= 8])
        if generator.random() < 0.3:
            names = generator.sample(sorted(SHARDS), generator.randint(1, 3))
            weights = {name: generator.uniform(0.1, 5) for name in names}
        after = None
        for rank in range(ranks):
            dataset = opened(folder, weights)
            first = dataset.go_on(cursor) if cursor is not None else 0
            with Loader(dataset, global_batch_size=G, micro_batch_size=B, dp_rank=rank, dp_size=ranks, samples=first,
                        prefetch=generator.randint(1, 3)) as loader:  # fmt: skip
                for _ in range(2):
                    samples = next(loader).samples.ravel()
                    place = dataset.locate(samples)
                    for source, index in zip(place.sources.tolist(), place.indices.tolist(), strict=True):
                        read[dataset.mixture.names[source]].append(index)
                assert after in (None, loader.cursor())  # every rank says the same
                after = loader.cursor()
        cursor = after
    for name, indices in read.items():
        assert sorted(indices) == list(range(len(indices))), name


def test_a_run_that_goes_on_reads_what_it_would_have_read(folder):
    whole = opened(folder, MIX)
    part = opened(folder, MIX)
    assert part.go_on(whole.cursor(777)) == 777
    assert part.read(np.arange(777, 1500)).tokens.tolist() == whole.read(np.arange(777, 1500)).tokens.tolist()
    assert part.cursor(777) == whole.cursor(777)


def test_looking_back_after_a_change(folder, make_corpus):
    """With the last cursor the whole past is there, under whatever sources the config has now."""
    first = opened(folder, MIX)
    second = opened(folder, {"code": 1.0})
    second.go_on(first.cursor(100))
    cursor = second.cursor(300)
    for weights in (MIX, {"code": 1.0}, {"poems": 5.0}):
        later = Dataset.recall(config(folder, weights), T, 1, cursor)
        assert later.read(np.arange(100)).tokens.tolist() == first.read(np.arange(100)).tokens.tolist()
        assert later.read(np.arange(100, 300)).tokens.tolist() == second.read(np.arange(100, 300)).tokens.tolist()
    with pytest.raises(DatasetError, match=r"the run read \w+ before; put it back into data.sources"):
        second.read(np.arange(100))
    less = make_corpus(name="less", code=SHARDS["code"])
    with pytest.raises(
        DatasetError, match=r"the run read poems, prose, which .*/less no longer has; it has \['code'\]: prepare them"
    ):
        Dataset.recall(config(less, {"code": 1.0}), T, 1, cursor)


LATER = [{"from_tokens": 199 * T + 1, "weights": {"code": 1.0}}]  # from sample 200 on


def change_of(folder, before, now, first):
    """What is said when a run goes on from sample `first`; before, now: (weights, what else the config says)."""
    dataset = opened(folder, before[0], **before[1])
    later = opened(folder, now[0], **now[1])
    assert later.go_on(dataset.cursor(first)) == first
    said = later.change(first, config(folder, now[0], **now[1]).stages)
    going_on = opened(folder, now[0], **now[1])  # the same config once more: nothing is new
    assert going_on.go_on(later.cursor(first + 50)) == first + 50
    assert going_on.change(first + 50, []) == ([], [])
    return said


def test_a_change_of_the_mixture_is_told(folder):
    even = {"prose": 1.0, "poems": 2.0, "code": 1.0}
    assert change_of(folder, (MIX, {}), (even, {}), 100) == (
        ["the mixture of sources changes at sample 100: code 25.00%, poems 50.00%, prose 25.00%"],
        [],
    )
    assert change_of(folder, (MIX, {"stages": LATER}), (even, {"stages": LATER}), 100)[0][0].startswith(
        "the mixture of s"
    )
    assert change_of(folder, (MIX, {}), (MIX, {}), 100) == ([], [])
    assert opened(folder, MIX).change(0, []) == ([], [])  # a fresh run


def test_a_change_that_a_stage_hides_is_warned_of(folder):
    """The weights of data.sources do not matter while a stage of data.stages governs."""
    even = {"prose": 1.0, "poems": 2.0, "code": 1.0}
    lines, (warning,) = change_of(folder, (MIX, {"stages": LATER}), (even, {"stages": LATER}), 250)
    assert lines == []
    assert warning == (
        f"data.sources has other weights than before, but at sample 250 the stage from_tokens={199 * T + 1} of data.stages "
        "governs, with weights of its own: edit these and allow data.stages to change the mixture here. As it is, the "
        "change takes effect at no sample"
    )
    more = [*LATER, {"from_tokens": 400 * T, "weights": {"poems": 1.0}}]
    _, (warning,) = change_of(folder, (MIX, {"stages": LATER}), (even, {"stages": more}), 250)
    assert warning.endswith("As it is, the change takes effect from sample 400 on")


def test_a_change_that_comes_later_is_told(folder):
    more = [*LATER, {"from_tokens": 400 * T, "weights": {"poems": 1.0}}]
    assert change_of(folder, (MIX, {"stages": LATER}), (MIX, {"stages": more}), 250) == (
        ["the mixture of sources at sample 250 is what it was; the change takes effect from sample 400 on"], []
    )  # fmt: skip
    once = {"prose": {"weight": 1.0, "max_epochs": 1.0}}
    twice = {"prose": {"weight": 1.0, "max_epochs": 2.0}}
    assert change_of(folder, (once, {}), (twice, {}), 10)[0] == [
        "the mixture of sources at sample 10 is what it was; the change takes effect from sample 17 on"
    ]
    gone = [{"from_tokens": 50 * T, "weights": {"code": 1.0}}, *LATER]
    assert change_of(folder, (MIX, {"stages": LATER}), (MIX, {"stages": gone}), 250)[0] == [
        "the mixture of sources at sample 250 is what it was; the change takes effect at no sample"
    ]


@pytest.mark.fault(40)
def test_other_data_is_refused(folder, make_corpus):
    cursor = opened(folder, MIX).cursor(10)
    with pytest.raises(DatasetError, match=r"on other data than .*: seed was 3, is 4\. Go on with"):
        opened(folder, MIX, seed=4).go_on(cursor)
    other = make_corpus(name="other", **{**SHARDS, "poems": [[9, 2, 14], [9]]})
    with pytest.raises(DatasetError, match=r"shards of poems was \w{16}, is \w{16}\. Go on with .*new source name"):
        opened(other, MIX).go_on(cursor)
    with pytest.raises(DatasetError, match="seq_len of prose was 4, is 5; seq_len of poems"):
        Dataset.open(config(folder, MIX), T + 1).go_on(cursor)
    with pytest.raises(DatasetError, match="shuffle_shards of prose was None, is 1"):
        opened(folder, MIX, shuffle_shards=1).go_on(cursor)
    with pytest.raises(
        DatasetError, match=r"is damaged or of another version \(Extra inputs .* at \('fingerprint',\)\)"
    ):
        opened(folder, MIX).go_on({**cursor, "fingerprint": "of version 1"})


@pytest.mark.fault(40)
def test_a_source_that_comes_back_must_be_the_same(folder, make_corpus):
    """However long it was away: its index goes on where it was, so its text must be what it was."""
    cursor = opened(folder, MIX).cursor(100)
    for step in range(1, 4):
        without = opened(folder, {"code": 1.0})
        without.go_on(cursor)
        cursor = without.cursor(100 + 50 * step)
    assert opened(folder, MIX).go_on(cursor) == 250
    other = make_corpus(name="other", **{**SHARDS, "poems": [[9, 2, 14], [9]]})
    with pytest.raises(DatasetError, match=r"shards of poems was \w{16}, is \w{16}\. Go on with .*new source name"):
        opened(other, MIX).go_on(cursor)
    with pytest.raises(DatasetError, match=r"shards of poems was \w{16}, is \w{16}\. Go on with"):
        Dataset.recall(config(other, {"code": 1.0}), T, 1, cursor)


# -- what is left out --------------------------------------------------------------------------------------------------


def test_left_out_samples_are_passed_over(folder):
    dataset = opened(folder, MIX, skip=[{"samples": [10, 19]}, {"samples": [22, 22]}])
    samples, after = dataset.take(8, 6)
    assert (samples.tolist(), after) == ([8, 9, 20, 21, 23, 24], 25)
    assert dataset.take(0, 5)[1] == 5


def test_left_out_steps_are_those_of_the_log(folder):
    """Step numbers are those seen when the entry was written: an entry before has pushed them on."""
    dataset = opened(folder, MIX, batch=4, skip=[{"steps": [2, 3]}, {"steps": [4, 4]}])
    assert dataset.take(0, 12)[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19]
    first = opened(folder, MIX, batch=4, skip=[{"steps": [2, 3]}])
    step4, position = [], 0
    for _ in range(4):
        step4, position = first.take(position, 4)
    assert step4.tolist() == [20, 21, 22, 23]
    assert set(dataset.take(0, 100)[0].tolist()) == set(range(112)) - {*range(4, 12), *range(20, 24)}


@pytest.mark.parametrize(
    "overlapping",
    [[[10, 19], [15, 24]], [[15, 24], [10, 19]], [[10, 24], [12, 13]], [[10, 17], [18, 24]], [[10, 24]] * 2],
)
def test_overlapping_stretches_count_once(folder, overlapping):
    """Steps named after them were pushed on by their union, not by their sum."""
    skip = [{"samples": pair} for pair in overlapping]
    before = opened(folder, MIX, batch=4, skip=skip)
    step8 = before.take(before.take(0, 28)[1], 4)[0].tolist()
    after = opened(folder, MIX, batch=4, skip=[*skip, {"steps": [8, 8]}])
    assert step8 == [43, 44, 45, 46]
    assert set(range(100)) - set(after.take(0, 81)[0].tolist()) == {*range(10, 25), *step8}


@pytest.mark.parametrize("documents", [(0, 0), (1, 2), (0, 2)])
def test_left_out_documents_are_in_no_sample(folder, documents):
    entry = {"source": "poems", "shard": "poems/train-00000", "documents": list(documents)}
    dataset, whole = opened(folder, MIX, skip=[entry]), opened(folder, MIX)
    samples, after = dataset.take(0, 400)
    left = set(range(after)) - set(samples.tolist())
    assert left
    for sample in range(after):
        source, _, pieces = whole.pieces(sample)
        touched = any(
            (source, p.shard) == ("poems", "poems/train-00000") and documents[0] <= p.document <= documents[1]
            for p in pieces
        )
        assert touched == (sample in left)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=5),
    first=st.integers(0, 200),
    count=st.integers(-5, 200),
)
def test_the_end_of_a_run_is_known_before_it_is_read(folder, spans, first, count):
    skip = [{"samples": [low, low + more]} for low, more in spans]
    exact = opened(folder, MIX, skip=skip)
    assert exact.end_of(first, count) == (exact.take(first, count)[1] if count > 0 else first)
    documents = [{"source": "poems", "shard": "poems/train-00000", "documents": [n, n]} for n in (0, 1, 0)]
    bound = opened(folder, MIX, skip=[*skip, *documents])
    assert bound.end_of(first, count) >= (bound.take(first, count)[1] if count > 0 else first)


def test_a_finished_run_has_its_end_behind_it(folder):
    assert opened(folder, MIX, skip=[{"samples": [10, 19]}]).end_of(15, 0) == 15


def test_of_left_out_documents_the_end_is_exact_after_whole_epochs(folder):
    dataset = opened(folder, ["poems"], skip=[{"source": "poems", "shard": "poems/train-00000", "documents": [0, 0]}])
    assert dataset.corpora["poems"].n_windows == 9
    for epochs in (1, 2, 1000):
        assert dataset.end_of(0, 4 * epochs) == 9 * epochs  # 5 of the 9 windows are left out
        assert dataset.end_of(9, 4 * epochs) == 9 + 9 * epochs
        assert 9 * epochs - 5 <= dataset.take(0, 4 * epochs)[1] <= 9 * epochs


def test_skip_refusals(folder):
    with pytest.raises(DatasetError, match="data.skip leaves out every window of poems; take it out of data.sources"):
        opened(folder, MIX, skip=[{"source": "poems", "shard": f"poems/train-0000{n}", "documents": [0, 2 - 2 * n]}
                                  for n in (0, 1)])  # fmt: skip
    with pytest.raises(DatasetError, match=r"data.skip names songs; data.sources has \['prose', 'poems', 'code'\]"):
        opened(folder, MIX, skip=[{"source": "songs", "shard": "x", "documents": [0, 0]}])
    entry = {"source": "poems", "shard": "poems/train-00000", "documents": [0, 0]}
    with pytest.raises(
        DatasetError, match=r"names steps \[1, 2\] and also documents, after which steps cannot be told"
    ):
        opened(folder, MIX, skip=[{"steps": [1, 2]}, entry])


def test_a_stretch_is_passed_at_once_however_long(folder):
    N = 10**12
    dataset = opened(folder, MIX, skip=[{"samples": [3, N]}, {"samples": [N + 2, N + 4]}])
    samples, after = dataset.take(0, 6)
    assert samples.tolist() == [0, 1, 2, N + 1, N + 5, N + 6]
    assert after == N + 7


# -- held out ----------------------------------------------------------------------------------------------------------


def test_held_out_sources_are_those_that_have_some(make_corpus):
    assert open_valid(config(make_corpus(name="t", **SHARDS), MIX), T) == ({}, [])
    valid, lines = open_valid(
        config(make_corpus(name="v", split="valid", prose=[[9]], code=[[17]]), {"prose": 1.0, "code": 1.0}), T
    )
    assert {name: (type(corpus), corpus.n_windows) for name, corpus in valid.items()} == {
        "prose": (Corpus, 2),
        "code": (Corpus, 4),
    }
    assert lines == []


def test_a_held_out_split_too_short_for_a_window_is_told_and_not_evaluated(make_corpus):
    folder = make_corpus(name="v", split="valid", prose=[[9]], code=[[3], [2]])
    valid, lines = open_valid(config(folder, {"prose": 1.0, "code": 1.0}), T)
    assert list(valid) == ["prose"]
    assert lines == [
        "code is not evaluated: its 2 held-out shards of 5 tokens have no window of model.seq_len=4; prepare it with a "
        "larger data.valid_fraction or data.shard_bytes"
    ]


def test_describe_names_source_and_documents(folder):
    lines = opened(folder, MIX).describe([0, 1]).splitlines()
    assert lines[0].startswith("sample 0: ")
    assert ", epoch 0, window " in lines[0]
    assert "documents of " in lines[1]


# -- from a URL --------------------------------------------------------------------------------------------------------


def local_shards(cache):
    return len(list((cache / "shards").glob("*/shard.bin")))


def test_a_copy_at_a_url_reads_alike_with_few_shards_on_local_disk(make_corpus, tmp_path):
    """Two sources, five epochs: the same batches, and never more shards here than the cache may hold."""
    folder = make_corpus(prose=[[9 + n] for n in range(12)], code=[[5 + n, 6] for n in range(9)])
    weights = {"prose": 2.0, "code": 1.0}
    here = opened(folder, weights, shuffle_shards=2)
    cache = {"folder": str(tmp_path / "cache"), "shards": 12}
    there = opened(f"file://{folder}", weights, shuffle_shards=2, cache=cache)
    assert there.go_on(here.cursor(0)) == 0  # the same data, wherever it lies
    batches = {"global_batch_size": 6, "micro_batch_size": 3, "dp_rank": 0, "dp_size": 1}
    with Loader(here, **batches) as plain, Loader(there, **batches) as remote:
        for _ in range(60):
            assert next(remote).digest == next(plain).digest
            assert local_shards(tmp_path / "cache") <= 12
    stats = there.stats()
    assert stats["fetches"] >= 21
    assert stats["evictions"] > 0
    there.close()


def test_a_step_of_many_groups_and_an_evaluation_hold_one_group_at_a_time(make_corpus, tmp_path):
    """27 shards in groups of one, 16 of them in a step and all of them in an evaluation; the cache has room for three."""
    folder = make_corpus(prose=[[9 + n] for n in range(27)])
    cache = {"folder": str(tmp_path / "cache"), "shards": 3, "wait_s": 5.0}
    here = opened(folder, {"prose": 1.0}, shuffle_shards=1)
    there = opened(f"file://{folder}", {"prose": 1.0}, shuffle_shards=1, cache=cache)
    batches = {"global_batch_size": 40, "micro_batch_size": 20, "dp_rank": 0, "dp_size": 1}
    with Loader(here, **batches) as plain, Loader(there, **batches) as remote:
        for _ in range(8):
            assert next(remote).digest == next(plain).digest
            assert local_shards(tmp_path / "cache") <= 3
    there.corpora["prose"].hold(())
    for mine, theirs in zip(
        eval_batches(here.corpora["prose"], 100, 8, 0, 1),
        eval_batches(there.corpora["prose"], 100, 8, 0, 1),
        strict=True,
    ):
        assert mine[0].tolist() == theirs[0].tolist()
        assert local_shards(tmp_path / "cache") <= 3
    there.close()


def test_a_url_needs_groups_that_fit_the_cache(make_corpus, tmp_path):
    folder = make_corpus(prose=[[9], [9]], code=[[9]])
    url, cache = f"file://{folder}", {"folder": str(tmp_path / "cache"), "shards": 11}
    with pytest.raises(CorpusError, match=r"read over the network and data.shuffle_shards is not set"):
        opened(url, {"prose": 1.0}, cache=cache)
    with pytest.raises(
        CorpusError, match=r"data.shuffle_shards=2 of 2 sources at a URL needs 12 shards .*shards=11 allow"
    ):
        opened(url, {"prose": 1.0}, cache=cache, shuffle_shards=2)
    with pytest.raises(CorpusError, match=r"file:///.*/nothing has no manifest.json, so it is not a finished corpus"):
        opened(f"file://{tmp_path}/nothing", {"prose": 1.0}, cache=cache, shuffle_shards=2)
