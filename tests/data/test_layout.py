"""Best-fit corpora: each token a target once, the counts beside the corpus, and refusals when they do not belong to it."""

import numpy as np
import pytest

from data import layout as module
from data.corpus import Corpus, CorpusFolder, Reading, open_shard
from data.layout import count_best_fit, counts_file
from data.manifest import CorpusError
from data.packing import best_fit
from data.store import open_store

T = 9


def count(folder, seq_len=T):
    corpus = CorpusFolder(folder, Reading(seq_len))
    store = open_store(folder, corpus.reading.cache)
    count_best_fit(folder, corpus.manifest, seq_len, lambda _, entry: open_shard(store, entry)[0])


@pytest.fixture(params=[4096, 3])
def block(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", request.param)
    return request.param


def random_documents(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30, rng.integers(1, 25)).tolist() for _ in range(4)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mask", [True, False])
def test_each_token_is_a_target_once(make_corpus, block, seed, mask):
    documents = random_documents(seed)
    folder = make_corpus(documents)
    count(folder)
    corpus = Corpus.open(folder, "train", Reading(T, packing="best_fit", document_mask=mask))
    rows = corpus.read(np.arange(corpus.n_windows))
    targets = rows.tokens[:, 1:][rows.counted]
    assert len(set(targets.tolist())) == len(targets)
    firsts, first = set(), 0
    left_out = set()
    for length in (length for shard in documents for length in shard):
        if length:
            firsts.add(first)
        if length == 1:
            left_out.add(first)
        first += length
    inner = set(range(first)) - firsts
    assert inner <= set(targets.tolist())
    if mask:
        assert set(targets.tolist()) == inner  # and a document's first token is foreseen by nobody
        assert rows.documents.shape == (corpus.n_windows, T)
    else:
        assert rows.documents is None
        assert set(targets.tolist()) <= set(range(first)) - left_out
    packed = [
        best_fit(shard[at : at + block], T + 1).n_windows for shard in documents for at in range(0, len(shard), block)
    ]
    assert corpus.n_windows == sum(packed)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_name_what_a_window_holds(make_corpus, block, seed):
    documents = random_documents(seed)
    folder = make_corpus(documents)
    count(folder)
    corpus = Corpus.open(folder, "train", Reading(T, packing="best_fit"))
    for window in range(corpus.n_windows):
        row = corpus.window(window).tolist()
        pieces = corpus.pieces(window)
        expected = [t for p in pieces for t in corpus.document(p.shard, p.document)[p.first : p.first + p.tokens]]
        assert row == expected + [corpus.tokenizer.eos_id] * (T + 1 - len(expected))
    touched = [w for w in range(corpus.n_windows) if any(p.document == 0 for p in corpus.pieces(w) if "1" in p.shard)]
    assert corpus.windows_of("train-00001", (0, 0)).tolist() == touched


def test_counts_are_made_once_and_belong_to_their_shards(make_corpus):
    folder = make_corpus([[5, 6], [7]])
    reading = Reading(T, packing="best_fit")
    with pytest.raises(
        CorpusError, match=r"has no packing/best_fit-9.json: data.packing=best_fit at this model.seq_len"
    ):
        Corpus.open(folder, "train", reading)
    count(folder)
    file = folder / counts_file(T)
    before = file.stat().st_ino
    count(folder)
    assert file.stat().st_ino == before
    Corpus.open(folder, "train", reading)
    good, other = file.read_bytes(), make_corpus([[5, 6], [8]], "other")
    count(other)
    file.write_bytes((other / counts_file(T)).read_bytes())
    with pytest.raises(CorpusError, match=r"best_fit-9.json counts the windows of other shards than the corpus has"):
        Corpus.open(folder, "train", reading)
    count(folder)
    assert file.read_bytes() == good


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: "", r"is damaged \(JSONDecodeError"),
        (lambda text: text[:-5], r"is damaged \(JSONDecodeError"),
        (lambda text: text + "\xff", r"is damaged \(UnicodeDecodeError"),
        (lambda text: "[]", r"is damaged \(TypeError"),
        (lambda text: "{}", r"is damaged \(KeyError"),
        (lambda text: text.replace("[[2]", "[[3]"), r"is damaged \(its content has hash \w{16}, it says \w{16}\)"),
        (lambda text: text.replace(str(module.BLOCK_DOCUMENTS), "7"), r"is damaged \(its content has hash"),
        (lambda text: text.replace('"shards": "', '"shards": "0'), r"is damaged \(its content has hash"),
    ],
)
def test_damaged_counts_are_refused_and_counted_again(make_corpus, caplog, change, match):
    folder = make_corpus([[5, 6], [7]])
    count(folder)
    file, reading = folder / counts_file(T), Reading(T, packing="best_fit")
    good = file.read_text()
    file.write_text(change(good), encoding="latin1")
    assert file.read_text("latin1") != good
    with pytest.raises(
        CorpusError, match=rf"best_fit-9.json {match}.*; run launcher/prepare.py on the corpus's folder"
    ):
        Corpus.open(folder, "train", reading)
    count(folder)
    assert [record.message.endswith("; it is written again") for record in caplog.records] == [True]
    assert file.read_text() == good
    Corpus.open(folder, "train", reading).window(0)


def test_counts_of_another_way_to_pack_are_noticed(make_corpus, monkeypatch):
    """As of another version: they are whole, and wrong."""
    folder = make_corpus([[5, 6], [7]])
    with monkeypatch.context() as other:
        other.setattr(module, "count_windows", lambda lengths, seq_len: 3)
        count(folder)
    corpus = Corpus.open(folder, "train", Reading(T, packing="best_fit"))
    with pytest.raises(
        CorpusError,
        match=r"train-00000: block 0 packs into 2 windows, its count says 3; delete packing/best_fit-9.json",
    ):
        corpus.window(0)


def test_the_fingerprint_tells_packings_apart(make_corpus):
    folder = make_corpus([[5, 6], [7]])
    count(folder)
    packed, plain = (Corpus.open(folder, "train", Reading(T, packing=how)) for how in ("best_fit", "windows"))
    assert "packing=best_fit" in packed.fingerprint
    assert "packing=windows" in plain.fingerprint
