"""A prepared corpus as windows: where each begins, what is in it, and which folders are refused."""

import json
import logging
import os
import time

import numpy as np
import pytest

from data import corpus as module
from data import shards
from data.cache import CacheConfig
from data.corpus import Corpus, Piece, Reading, read_manifest
from data.manifest import MANIFEST, CorpusError
from data.shards import ShardError


def test_windows_follow_each_other_and_never_cross_shards(make_corpus):
    """Shards of 11 and 8 tokens, 0..10 and 11..18; seq_len 3 gives 3 + 2 windows and tails of 1 and 1."""
    corpus = Corpus.open(make_corpus([[4, 7], [8]]), "train", reading=3)
    expected = [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [11, 12, 13, 14], [14, 15, 16, 17]]
    assert corpus.n_windows == 5
    assert [corpus.window(i).tolist() for i in range(5)] == expected
    assert corpus.windows([4, 0, 4]).tolist() == [expected[4], expected[0], expected[4]]
    assert (corpus.n_tokens, corpus.n_bytes, corpus.bytes_per_token) == (19, 76, 4.0)
    assert corpus.window(0).dtype == np.int64


@pytest.mark.parametrize("seq_len", [1, 2, 5, 7, 30])
def test_every_token_but_a_short_tail_is_read(make_corpus, seq_len):
    documents = [[3, 4, 1], [1], [], [7, 0, 8], [29]]
    corpus = Corpus.open(make_corpus(documents), "train", seq_len)
    read = {token for row in corpus.windows(np.arange(corpus.n_windows)).tolist() for token in row}
    end = 0
    for lengths in documents:
        start, end = end, end + sum(lengths)
        unread = [token for token in range(start, end) if token not in read]
        assert unread == list(range(end - len(unread), end))  # the shard's tail, and nothing else
        assert len(unread) <= seq_len
    assert end == corpus.n_tokens == 53
    assert corpus.n_windows == sum(max(sum(lengths) - 1, 0) // seq_len for lengths in documents)


def test_a_window_names_its_documents(make_corpus):
    """Documents of 4, 0, 1, 6 tokens: the empty one has no token in any window."""
    corpus = Corpus.open(make_corpus([[4, 0, 1, 6], [9]]), "train", reading=4)
    assert corpus.pieces(0) == [Piece("train-00000", 0, 0, 4), Piece("train-00000", 2, 0, 1)]  # tokens 0..4
    assert corpus.pieces(1) == [Piece("train-00000", 2, 0, 1), Piece("train-00000", 3, 0, 4)]  # tokens 4..8
    assert corpus.pieces(2) == [Piece("train-00001", 0, 0, 5)]
    assert corpus.pieces(3) == [Piece("train-00001", 0, 4, 5)]
    assert corpus.document("train-00000", 3).tolist() == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_documents(make_corpus, seed):
    """Documents are numbered from the row's first; the first token of a document is no target; nothing else changes."""
    rng = np.random.default_rng(seed)
    folder = make_corpus([rng.integers(0, 9, 30).tolist(), rng.integers(0, 3, 40).tolist()])
    plain, masked = Corpus.open(folder, "train", 7), Corpus.open(folder, "train", Reading(7, document_mask=True))
    everything = np.arange(plain.n_windows)
    assert plain.read(everything).documents is None
    rows = masked.read(everything)
    assert rows.tokens.tolist() == plain.windows(everything).tolist()
    for window in everything.tolist():
        of_token = [n for n, piece in enumerate(plain.pieces(window)) for _ in range(piece.tokens)]
        documents = [piece.document for piece in plain.pieces(window) for _ in range(piece.tokens)]
        assert rows.documents[window].tolist() == [document - documents[0] for document in documents[:-1]]
        assert rows.counted[window].tolist() == [a == b for a, b in zip(of_token, of_token[1:], strict=False)]


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_documents(make_corpus, seed):
    """The windows found are exactly those with a token of the documents."""
    rng = np.random.default_rng(seed)
    corpus = Corpus.open(make_corpus([rng.integers(0, 9, 20).tolist(), rng.integers(0, 9, 20).tolist()]), "train", 5)
    for _ in range(30):
        first = int(rng.integers(0, 20))
        documents = (first, int(rng.integers(first, 20)))
        expected = [
            window
            for window in range(corpus.n_windows)
            for piece in corpus.pieces(window)
            if piece.shard == "train-00001" and documents[0] <= piece.document <= documents[1]
        ]
        assert corpus.windows_of("train-00001", documents).tolist() == sorted(set(expected))
    with pytest.raises(CorpusError, match="has no shard 'train-7'; it has train-00000 to train-00001"):
        corpus.windows_of("train-7", (0, 0))
    with pytest.raises(CorpusError, match="train-00000 has documents 0 to 19, not 20"):
        corpus.windows_of("train-00000", (0, 20))


def test_sources_are_opened_by_name(make_corpus):
    folder = make_corpus(poems=[[9]], prose=[[5], [6]])
    assert Corpus.open(folder, "train", 4, source="prose").window(0).tolist() == list(range(1_000_000, 1_000_005))
    with pytest.raises(CorpusError, match=r"has the sources \['poems', 'prose'\]; name the one to open"):
        Corpus.open(folder, "train", 4)
    with pytest.raises(CorpusError, match=r"has no source 'songs', only \['poems', 'prose'\]"):
        Corpus.open(folder, "train", 4, source="songs")


@pytest.mark.fault(50)
def test_a_corpus_without_windows_has_no_order(make_corpus):
    with pytest.raises(CorpusError, match=r"only of .* \(train\) has no window of 9 tokens: its shards are shorter"):
        Corpus.open(make_corpus([[5], [6]]), "train", 9).order(0)


def test_uint16_tokens_come_as_int64(make_corpus):
    corpus = Corpus.open(make_corpus([[9]], dtype=np.uint16), "train", 8)
    assert corpus.window(0).tolist() == list(range(9))


def test_opening_reads_no_tokens(make_corpus):
    folder = make_corpus([[9], [9]])
    for file in folder.glob("*.bin"):
        size = file.stat().st_size
        file.write_bytes(b"\xff" * size)
    corpus = Corpus.open(folder, "train", reading=4)  # the contents are wrong, and nobody looked
    assert corpus.n_windows == 4
    assert not corpus._open
    with pytest.raises(CorpusError, match=r"train-00000.bin has hash .*it was changed or damaged; delete it, then"):
        corpus.verify()


def test_verify_passes_what_was_written_and_checks_the_index_too(make_corpus):
    folder = make_corpus([[9], [9]])
    corpus = Corpus.open(folder, "train", reading=4)
    corpus.verify()
    index = folder / "train-00001.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CorpusError, match=r"train-00001.idx has hash"):
        corpus.verify()


def test_open_shards_are_bounded(make_corpus, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 3)
    corpus = Corpus.open(make_corpus([[5]] * 10), "train", reading=4)
    before = len(os.listdir("/proc/self/fd"))
    for windows in (range(10), [9], [0], [9]):
        assert corpus.windows(windows).shape == (len(windows), 5)
    assert list(corpus._open) == [8, 0, 9]  # the least recently used went first
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3


def test_fingerprint_names_what_the_windows_depend_on(make_corpus):
    first = make_corpus([[4, 7], [8]], "a")
    corpus = Corpus.open(first, "train", 3)
    same, longer = Corpus.open(make_corpus([[4, 7], [8]], "b"), "train", 3), Corpus.open(first, "train", 4)
    other_cut, other_split = make_corpus([[7, 4], [8]], "c"), make_corpus([[4, 7], [8]], "d", split="valid")
    assert corpus.fingerprint.startswith(
        "split=train seq_len=3 tokenizer=0123456789abcdef packing=windows shuffle_shards=None shards="
    )
    assert same.fingerprint == corpus.fingerprint
    fingerprints = {
        corpus.fingerprint,
        longer.fingerprint,
        Corpus.open(first, "train", Reading(3, shuffle_shards=2)).fingerprint,
        Corpus.open(other_cut, "train", 3).fingerprint,
        Corpus.open(other_split, "valid", 3).fingerprint,
    }
    assert len(fingerprints) == 5


def test_missing_folder_manifest_and_split(make_corpus, tmp_path):
    with pytest.raises(CorpusError, match=r"corpus folder .*nowhere does not exist; make it with"):
        Corpus.open(tmp_path / "nowhere", "train", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"has no manifest.json, so it is not a finished corpus"):
        Corpus.open(tmp_path / "empty", "train", 4)
    cache = CacheConfig(folder=str(tmp_path / "cache"), retries=0, prefetch=0)
    with pytest.raises(
        CorpusError, match=r"file://.*empty has no manifest.json, .*; copy one there from the folder that"
    ):
        Corpus.open(f"file://{tmp_path}/empty", "train", Reading(4, cache=cache))
    folder = make_corpus([[9]])
    far = Reading(4, packing="best_fit", shuffle_shards=1, cache=cache)
    with pytest.raises(
        CorpusError, match=r"file://.*has no packing/best_fit-4.json: .*folder, .*, and copy the file to"
    ):
        Corpus.open(f"file://{folder}", "train", far)
    with pytest.raises(CorpusError, match=r"has no split 'valid' of only, only \['train'\]"):
        Corpus.open(folder, "valid", 4)
    with pytest.raises(CorpusError, match="seq_len=0; expected at least 1"):
        Corpus.open(folder, "train", 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text[: len(text) // 2], "is damaged .*delete the file and run"),
        (lambda text: "", "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "format_version": 1}), "format_version 1, this version reads 2"),
        (lambda text: json.dumps({**json.loads(text), "extra": 2}), r"is damaged \(extra: "),
        (
            lambda text: text.replace('"tokens":9', '"tokens":-9'),
            r"is damaged \(sources.only.splits.train.shards.0.tokens: ",
        ),
    ],
)
def test_broken_manifest(make_corpus, change, match):
    folder = make_corpus([[9]])
    (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))
    with pytest.raises(CorpusError, match=match):
        read_manifest(folder)


def test_missing_and_cut_shards(make_corpus):
    folder = make_corpus([[9], [9]])
    (folder / "train-00001.bin").write_bytes(bytes(35))
    with pytest.raises(CorpusError, match=r"train-00001.bin has 35 bytes, manifest.json says 36; restore it, or run"):
        Corpus.open(folder, "train", 4)
    (folder / "train-00000.idx").unlink()
    with pytest.raises(CorpusError, match=r"train-00000.idx is missing but named in manifest.json; restore it, or run"):
        Corpus.open(folder, "train", 4)


def test_shard_that_is_not_the_manifests(make_corpus):
    """Same sizes, other dtype: two uint16 tokens for each int32."""
    folder = make_corpus([[9]])
    index = bytearray((folder / "train-00000.idx").read_bytes())
    index[17] = 8  # uint16
    index[34:38] = (18).to_bytes(4, "little")
    (folder / "train-00000.idx").write_bytes(index)
    with pytest.raises(ShardError, match=r"18 tokens of uint16, manifest.json says 9; delete it"):
        Corpus.open(folder, "train", 4).window(0)


@pytest.mark.parametrize("i", [-1, 2])
def test_windows_outside(make_corpus, i):
    corpus = Corpus.open(make_corpus([[9]]), "train", 4)
    with pytest.raises(CorpusError, match=rf"windows {i} to {i} asked of .*which has 2"):
        corpus.window(i)


# -- shards that change ------------------------------------------------------------------------------------------------


def rewrite(path, content, later_s):
    """Write a file as it were later_s seconds from now."""
    path.write_bytes(content)
    then = time.time() + later_s
    os.utime(path, (then, then))


@pytest.mark.parametrize("change", ["rewritten", "cut", "appended"])
@pytest.mark.fault(48)
def test_a_shard_that_changes_while_it_is_read_ends_the_run(make_corpus, monkeypatch, change):
    monkeypatch.setattr(shards, "LOOK_EVERY_S", 0.0)
    folder = make_corpus([[30]])
    corpus = Corpus.open(folder, "train", 4)
    corpus.window(0)
    path = folder / "train-00000.bin"
    payload = path.read_bytes()
    rewrite(path, {"rewritten": bytes(len(payload)), "cut": payload[:4], "appended": payload * 2}[change], 2)
    with pytest.raises(
        ShardError, match=r"train-00000\.bin or \.idx was changed while it is read: .*Nothing may write to"
    ):
        corpus.window(1)


@pytest.mark.parametrize("how", ["removed", "renamed"])
@pytest.mark.fault(48)
def test_a_shard_that_goes_while_it_is_read_reads_on(make_corpus, monkeypatch, how):
    """The map keeps the content; whoever opens the corpus next is told."""
    monkeypatch.setattr(shards, "LOOK_EVERY_S", 0.0)
    folder = make_corpus([[30]])
    corpus = Corpus.open(folder, "train", 4)
    expected = corpus.window(6).tolist()
    path = folder / "train-00000.bin"
    path.unlink() if how == "removed" else path.rename(folder / "other.bin")
    assert corpus.window(6).tolist() == expected
    with pytest.raises(CorpusError, match=r"train-00000.bin is missing but named in manifest.json"):
        Corpus.open(folder, "train", 4)


@pytest.mark.fault(48)
def test_a_shard_rewritten_between_runs_is_compared_with_its_hash(make_corpus, caplog):
    """Of the same size, so that only its time tells; one that was only copied again is found equal, and said once."""
    folder = make_corpus([[30], [30]])
    for number in range(2):
        path = folder / f"train-0000{number}.bin"
        rewrite(path, path.read_bytes(), 5)
    corpus = Corpus.open(folder, "train", 4)
    with caplog.at_level(logging.WARNING):
        corpus.windows([0, 7, 8, 1])
    assert caplog.text.count("has shards that are newer than its manifest.json") == 1
    path = folder / "train-00001.bin"
    rewrite(path, bytes(path.stat().st_size), 5)
    corpus = Corpus.open(folder, "train", 4)
    corpus.window(0)
    with pytest.raises(
        CorpusError, match=r"train-00001.bin has hash \w{16}, manifest.json says \w{16}: it was changed"
    ):
        corpus.window(7)
