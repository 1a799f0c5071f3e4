"""The loader: each sample once, at any world size and over any stops; and no way to hang."""

import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.loader as module
from data.corpus import Corpus, Reading
from data.dataset import Dataset, DatasetError
from data.loader import IGNORE, BatchError, Loader, digest, eval_batches
from data.mixture import Era, EraStage, MixtureError
from data.order import sample_window

T = 4


@pytest.fixture
def corpus(make_corpus):
    return Corpus.open(make_corpus([[30, 11], [0, 7, 25], [3], [50]]), "train", T)  # 10 + 7 + 0 + 12 windows


def dataset_of(corpus, seed=5):
    era = Era(start=0, stages=(EraStage(start=0, weights={corpus.name: 1.0}),), most={})
    return Dataset({corpus.name: corpus}, [era], seed, [], batch=1)


def loader_of(corpus, G=8, B=2, rank=0, ranks=1, cursor=None, **more):
    dataset = dataset_of(corpus)
    if cursor is not None:
        more["samples"] = dataset.go_on(cursor)
    return Loader(dataset, global_batch_size=G, micro_batch_size=B, dp_rank=rank, dp_size=ranks, **more)


def one_step(corpus, G, B, ranks, cursor):
    """The batches of all ranks for the step after cursor, and the cursor after it."""
    batches = []
    for rank in range(ranks):
        with loader_of(corpus, G, B, rank, ranks, cursor=cursor) as loader:
            batches.append(next(loader))
            after = loader.cursor()
    return batches, after


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shapes_and_places(corpus, ranks):
    """Micro-batch a of rank r holds samples g0 + (a * ranks + r) * B + b, and its tokens are those of the windows."""
    G, B = 24, 2
    for rank in range(ranks):
        with loader_of(corpus, G, B, rank, ranks) as loader:
            for step in range(3):
                batch = next(loader)
                A = G // (B * ranks)
                expected = [[[step * G + (a * ranks + rank) * B + b] for b in range(B)] for a in range(A)]
                assert batch.samples[..., None].tolist() == expected
                assert batch.samples.dtype == np.int64
                assert batch.tokens.shape == batch.targets.shape == (A, B, T)
                assert batch.tokens.dtype == batch.targets.dtype == torch.int64
                assert batch.n_targets == G * T
                assert batch.span == (step * G, (step + 1) * G)
                assert batch.documents is None
                both = torch.cat([batch.tokens, batch.targets[..., -1:]], dim=-1).reshape(-1, T + 1)
                assert batch.digest == digest(batch.samples, both.numpy())
                for a in range(A):
                    for b in range(B):
                        _, number = sample_window(int(batch.samples[a, b]), corpus.n_windows, 5)
                        window = corpus.window(number).tolist()
                        assert (batch.tokens[a, b].tolist(), batch.targets[a, b].tolist()) == (window[:-1], window[1:])
                assert loader.cursor()["samples"] == (step + 1) * G


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
@pytest.mark.fault(39)
def test_each_sample_once_over_stops_and_worlds(corpus, seed):
    """A run stopped and gone on with other ranks and micro-batches at random, over more than one epoch."""
    generator = random.Random(seed)
    G, cursor, seen, windows = 12, None, [], []
    while len(seen) < 60:
        ranks = generator.choice([1, 2, 3, 4])
        B = generator.choice([b for b in (1, 2, 3, 4, 6, 12) if G % (b * ranks) == 0])
        batches, cursor = one_step(corpus, G, B, ranks, cursor)
        step = [int(sample) for batch in batches for sample in batch.samples.ravel()]
        assert sorted(step) == list(range(len(seen), len(seen) + G))  # this step's samples, whatever the world
        seen += step
        windows += [row.tolist() for batch in batches for row in batch.tokens.reshape(-1, T)]
    assert len(seen) == len(set(seen)) == 60
    by_sample = [row for _, row in sorted(zip(seen, windows, strict=True))]
    every = corpus.windows(np.arange(corpus.n_windows))[:, :-1].tolist()
    for epoch in range(60 // corpus.n_windows):
        assert sorted(by_sample[epoch * corpus.n_windows :][: corpus.n_windows]) == sorted(every)


def test_cursor_counts_only_what_was_handed_out(corpus):
    with loader_of(corpus, prefetch=3) as loader:
        while loader._ready.qsize() < 3:
            pass  # three batches are ready, none was taken
        assert loader.cursor()["samples"] == 0
        assert loader.cursor()["sources"] == {"only": corpus.fingerprint}
        first = [next(loader) for _ in range(4)]
        cursor = loader.cursor()
    assert cursor["samples"] == 32
    with loader_of(corpus, cursor=cursor) as loader, loader_of(corpus, samples=32) as same:
        assert next(loader).samples.ravel().tolist() == next(same).samples.ravel().tolist() == list(range(32, 40))
    assert first[3].samples.ravel().tolist() == list(range(24, 32))


@pytest.mark.fault(40)
def test_cursor_of_other_data_is_refused(corpus, make_corpus):
    with loader_of(corpus) as loader:
        cursor = loader.cursor()
    other = Corpus.open(make_corpus([[30, 11], [0, 7, 25], [3], [51]], "other"), "train", T)
    with pytest.raises(
        DatasetError, match=r"trained on other data than .*other: shards of only was \w{16}, is \w{16}\. Go on with"
    ):
        loader_of(other, cursor=cursor)
    longer = Corpus.open(corpus.location, "train", T + 1)
    with pytest.raises(DatasetError, match=r": seq_len of only was 4, is 5\. Go on"):
        loader_of(longer, cursor=cursor)
    with pytest.raises(DatasetError, match=r": seed was 4, is 5\. Go on"):
        loader_of(corpus, cursor=cursor | {"seed": 4})
    with pytest.raises(DatasetError, match=r"is damaged or of another version \(Field required at \('seed',\)\)"):
        loader_of(corpus, cursor={key: value for key, value in cursor.items() if key != "seed"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"G": 10, "B": 2, "ranks": 2}, r"global_batch_size=10 is not a multiple .*nearest that are: 8, 12"),
        ({"G": 1, "B": 2}, "nearest that are: 2$"),
        ({"G": 0}, "global_batch_size=0 is not a multiple"),
        ({"G": 30}, r"only have 29 windows of 4 tokens, one step takes global_batch_size=30"),
        ({"B": 0}, "micro_batch_size=0; expected at least 1"),
        ({"rank": 2, "ranks": 2}, "dp_rank=2 of dp_size=2"),
        ({"rank": -1}, "dp_rank=-1 of dp_size=1"),
        ({"prefetch": 0}, "prefetch=0; expected at least 1"),
        ({"samples": -8}, "samples=-8; expected 0 or more"),
    ],
)
def test_refusals(corpus, change, match):
    with pytest.raises(BatchError, match=match):
        loader_of(corpus, **change)


def test_an_error_in_the_thread_reaches_the_step(corpus, monkeypatch):
    def fail(_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(corpus, "read", fail)
    loader = loader_of(corpus)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(loader)
    assert "fail" in [entry.name for entry in caught.traceback]  # from where it happened, not from the queue
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_read_together_are_those_read_one_by_one(corpus, monkeypatch, ranks):
    """Small steps are read many at a time, large ones alone."""
    read = {}
    for ahead in (1, 2**18):
        monkeypatch.setattr(module, "AHEAD_TOKENS", ahead)
        with loader_of(corpus, rank=ranks - 1, ranks=ranks) as loader:
            assert loader._most_steps == (1 if ahead == 1 else 2**18 // (8 * T // ranks))
            read[ahead] = [
                (b.tokens.tolist(), b.targets.tolist(), b.samples.tolist(), b.span, b.n_targets, b.digest)
                for b in (next(loader) for _ in range(40))
            ]
    assert read[1] == read[2**18]


def test_steps_before_one_that_cannot_be_read_are_given(corpus):
    """max_epochs ends the data in the middle of what is read together; cursor and order are as if read one by one."""
    era = Era(start=0, stages=(EraStage(start=0, weights={"only": 1.0}),), most={"only": 100})
    dataset = Dataset({"only": corpus}, [era], 5, [], batch=1)
    with Loader(dataset, global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=1) as loader:
        assert [next(loader).span[1] for _ in range(12)] == list(range(8, 97, 8))
        assert loader.cursor()["samples"] == 96
        with pytest.raises(MixtureError, match="has been read max_epochs times after 100 samples"):
            next(loader)


def test_a_dead_thread_does_not_hang_the_step(corpus, monkeypatch):
    monkeypatch.setattr(Loader, "_prefetch", lambda self, first: None)
    with pytest.raises(RuntimeError, match="thread is gone and left neither batch nor error"):
        next(loader_of(corpus))


def test_close_ends_the_thread(corpus):
    loader = loader_of(corpus)
    next(loader)
    loader.close()
    loader.close()  # twice is no error
    assert not any(thread.name == "data-prefetch" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


def test_a_program_that_forgets_to_close_ends_the_thread(make_corpus):
    """A daemon thread that the interpreter's end finds inside torch ends the process with SIGABRT, now and then."""
    program = (
        "import atexit, sys, threading\n"
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))\n"
        "from data.config import DataConfig; from data.dataset import Dataset; from data.loader import Loader\n"
        "sources = [{'kind': 'text', 'paths': ['-'], 'name': 'only'}]\n"
        "cfg = DataConfig.model_validate({'corpus': sys.argv[1], 'sources': sources})\n"
        "loader = Loader(Dataset.open(cfg, 4), global_batch_size=8, micro_batch_size=8, dp_rank=0, dp_size=1)\n"
        "next(loader)\n"
    )
    command = [sys.executable, "-c", program, make_corpus([[200]])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['MainThread']\n", "")


def test_describe_names_documents(corpus):
    with loader_of(corpus) as loader:
        lines = loader.describe(np.array([0, 30])).splitlines()
    for line, sample in zip(lines, (0, 30), strict=True):
        epoch, window = sample_window(sample, corpus.n_windows, 5)
        assert line.startswith(f"sample {sample}: only, epoch {epoch}, window {window}, documents of train-0000")
    assert [line.partition(", documents of ")[0] for line in lines][1].startswith("sample 30: only, epoch 1")


def test_describe_shortens_runs_of_documents(make_corpus):
    corpus = Corpus.open(make_corpus([[1, 1, 1, 0, 1, 1]]), "train", T)
    with loader_of(corpus, G=1, B=1) as loader:
        assert loader.describe(0) == "sample 0: only, epoch 0, window 0, documents of train-00000 0-2, 4-5"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory exists only beside an accelerator")
def test_batches_are_pinned(corpus):
    with loader_of(corpus) as loader:
        batch = next(loader)
    assert batch.tokens.is_pinned()
    assert batch.targets.is_pinned()


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_windows", [1, 7, 10, 29, 500])
@pytest.mark.parametrize("B", [1, 3, 4])
def test_eval_counts_each_window_once_at_any_world_size(corpus, max_windows, B):
    rows_by_world = []
    for ranks in (1, 2, 3, 4):
        batches = [list(eval_batches(corpus, max_windows, B, rank, ranks)) for rank in range(ranks)]
        assert len({len(of_rank) for of_rank in batches}) == 1  # a collective in the loop meets its partners
        rows = [
            (*tokens.tolist(), targets[-1].item())
            for of_rank in batches
            for both in of_rank
            for tokens, targets in zip(*both[:2], strict=True)
            if (targets != IGNORE).all()
        ]
        padded = sum((both[1] == IGNORE).all(dim=1).sum().item() for of_rank in batches for both in of_rank)
        assert len(rows) + padded == ranks * len(batches[0]) * B
        rows_by_world.append(sorted(rows))
    assert len(rows_by_world[0]) == len(set(rows_by_world[0])) == min(max_windows, 29)
    assert all(rows == rows_by_world[0] for rows in rows_by_world)


@pytest.mark.parametrize("B", [1, 2])
def test_targets_that_do_not_count_leave_the_tokens_alone(corpus, B):
    """A slice of a single row is contiguous as it is: targets were a view of the tokens, which got IGNORE too."""
    ranks = 29 // B  # one round for all windows but one, one for that and filling
    for rank in range(ranks):
        for tokens, targets, _ in eval_batches(corpus, 29, B, rank, ranks):
            assert int(tokens.min()) >= 0
            assert tokens.untyped_storage().data_ptr() != targets.untyped_storage().data_ptr()


def test_eval_windows_are_spread_and_fixed(corpus):
    first = [tokens.tolist() for tokens, _, _ in eval_batches(corpus, 6, 6, 0, 1)]
    assert first == [tokens.tolist() for tokens, _, _ in eval_batches(corpus, 6, 6, 0, 1)]
    assert first[0] != corpus.windows(np.arange(6))[:, :-1].tolist()  # not the beginning of the first shard


def test_eval_refusals(corpus, make_corpus):
    with pytest.raises(BatchError, match="max_windows=0; expected at least 1"):
        next(eval_batches(corpus, 0, 1, 0, 1))
    with pytest.raises(BatchError, match="dp_rank=1 of dp_size=1"):
        next(eval_batches(corpus, 1, 1, 1, 1))
    short = Corpus.open(make_corpus([[4], [3]], "short"), "train", T)
    with pytest.raises(BatchError, match="has no window of 4 tokens: its shards are shorter"):
        next(eval_batches(short, 1, 1, 0, 1))


def test_eval_takes_its_windows_from_few_shards(make_corpus):
    """Of a corpus read group by group, a few windows need the shards of the first group alone."""
    corpus = Corpus.open(make_corpus([[9]] * 20), "train", Reading(T, shuffle_shards=2))
    read = [tokens for tokens, _, _ in eval_batches(corpus, 4, 1, 0, 1)]
    assert len(read) == 4
    assert len(corpus._open) == 2


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_masked_batches(make_corpus, ranks):
    """Targets at the beginning of a document do not count, and each rank says how many of its own do."""
    corpus = Corpus.open(make_corpus([[3, 1, 8, 2, 2, 2, 2, 3, 3, 1, 2]]), "train", Reading(T, document_mask=True))
    n_targets = 0
    for rank in range(ranks):
        with loader_of(corpus, G=4, B=2, rank=rank, ranks=ranks) as loader:
            batch = next(loader)
            assert not loader.fixed_targets
        rows = corpus.read(sample_window(batch.samples.ravel(), corpus.n_windows, 5)[1])
        assert batch.documents.tolist() == rows.documents.reshape(batch.tokens.shape).tolist()
        assert ((batch.targets == IGNORE).numpy() == ~rows.counted.reshape(batch.tokens.shape)).all()
        assert batch.n_targets == rows.counted.sum() == (batch.targets != IGNORE).sum()
        n_targets += batch.n_targets
    assert 0 < n_targets < 4 * T
