"""Sources that are tokens already: entered where they lie, checked, and of one tokenizer."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus import Corpus
from data.layout import counts_file
from data.manifest import MANIFEST
from data.prepare import Part, PrepareError, prepare, prepare_part, report
from data.shards import ShardError, ShardWriter
from data.tokenizer import TokenizerConfig, load_tokenizer, train


def texts(count, seed):
    return [f"text {number} of {seed}, with a few words in it" for number in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """first/ and second/: corpora of one tokenizer; other/: of another; tokens/a, tokens/sub/b: pairs of the first one."""
    folder = tmp_path_factory.mktemp("prepared")
    for number, name in enumerate(("first", "second", "other")):
        lines = [text * 9 for text in texts(300, name)]
        tokenizer = TokenizerConfig(vocab_size=300, train_bytes=2**16)
        if name != "second":
            train([(lines, 2**16)], folder / f"{name}-tokenizer", tokenizer)
        (folder / f"{name}-texts").mkdir()
        for i, text in enumerate(texts(40, number)):
            (folder / f"{name}-texts" / f"{i:02d}.txt").write_text(text)
        parts = [f"{name}-texts/{i}*.txt" for i in range(2)] if name == "second" else [f"{name}-texts/*.txt"]
        path = folder / ("other-tokenizer" if name == "other" else "first-tokenizer")
        prepare(DataConfig.model_validate({
            "corpus": str(folder / name), "workers": 1, "valid_fraction": 0.2,
            "sources": [{"kind": "text", "name": f"{name}-{i}", "paths": [str(folder / part)]}
                        for i, part in enumerate(parts)],
            "tokenizer": {"vocab_size": 300, "path": str(path)},
        }))  # fmt: skip
    (folder / "tokens" / "sub").mkdir(parents=True)
    write_pair(folder / "tokens" / "a", [[5, 6, 2], [7] * 2000, []])
    write_pair(folder / "tokens" / "sub" / "b", [[299, 0]], np.int32)
    return folder


def write_pair(prefix, documents, dtype=np.uint16):
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))


def config(folder, place, *sources, **more):
    found = [source | {key: str(place / source[key]) for key in ("path",) if key in source} for source in sources]
    for source in found:
        if "prefix" in source:
            source["prefix"] = [str(place / prefix) for prefix in source["prefix"]]
    return DataConfig.model_validate({"corpus": str(folder), "sources": found, "workers": 1, **more})


FIRST = {"kind": "corpus", "path": "first"}
PAIRS = {"kind": "megatron", "prefix": ["tokens/a", "tokens/sub/b"]}


def text_of(place):
    return {"kind": "text", "paths": [str(place / "other-texts" / "*.txt")]}


def test_a_corpus_and_pairs_and_text_in_one(place, tmp_path):
    """Nothing is copied; the tokens are those of the files where they lie, and the text has the corpus's tokenizer."""
    manifest = prepare(config(tmp_path / "mix", place, FIRST, text_of(place), valid_fraction=0.2))
    made = prepare(config(tmp_path / "all", place, FIRST, PAIRS, text_of(place), valid_fraction=0.2,
                          tokenizer={"vocab_size": 300, "path": str(place / "first-tokenizer")}))  # fmt: skip
    assert manifest.tokenizer.fingerprint == load_tokenizer(place / "first" / "tokenizer").fingerprint
    assert not list((tmp_path / "all").glob("corpus*")) + list((tmp_path / "all").glob("megatron"))
    assert made.sources["corpus"].folder == str(place / "first")
    assert made.sources["corpus"].model_copy(update={"folder": None}) == manifest.sources["corpus"].model_copy(
        update={"folder": None}
    )
    assert made.sources["megatron"].folder == str(place / "tokens")
    assert [shard.name for shard in made.sources["megatron"].splits["train"].shards] == ["a", "sub/b"]
    assert [shard.documents for shard in made.sources["megatron"].splits["train"].shards] == [3, 1]
    assert list(made.sources["megatron"].splits) == ["train"]
    assert made.sources["text"] == manifest.sources["text"]
    for source in made.sources:
        Corpus.open(tmp_path / "all", "train", 4, source).verify()
    tokens = Corpus.open(tmp_path / "all", "train", 4, "megatron")
    assert tokens.window(0).tolist() == [5, 6, 2, 7, 7]
    lines = report(made).splitlines()
    assert next(line.split() for line in lines if line.startswith("megatron")) == [
        "megatron", "train", "4", "-", "2,005", "-"
    ]  # fmt: skip
    assert prepare_part(config(tmp_path / "mix", place, FIRST, text_of(place), valid_fraction=0.2), Part()) == manifest


def test_a_corpus_of_a_corpus_keeps_the_place_of_the_shards(place, tmp_path):
    prepare(config(tmp_path / "one", place, {"kind": "corpus", "path": "second", "source": "second-1"}))
    two = prepare(config(tmp_path / "two", place, {"kind": "corpus", "path": str(tmp_path / "one")}))
    assert two.sources["corpus"].folder == str(place / "second")
    Corpus.open(tmp_path / "two", "train", 4).verify()


def test_a_corpus_at_a_url(place, tmp_path):
    cache = {"folder": str(tmp_path / "cache"), "shards": 4}
    source = {"kind": "corpus", "name": "far", "path": f"file://{place}/first"}
    made = prepare(DataConfig.model_validate(
        {"corpus": str(tmp_path / "corpus"), "sources": [source, text_of(place)], "workers": 1, "cache": cache,
         "valid_fraction": 0.2}
    ))  # fmt: skip
    assert made.sources["far"].folder == f"file://{place}/first"
    assert load_tokenizer(tmp_path / "corpus" / "tokenizer").fingerprint == made.tokenizer.fingerprint


def test_pairs_are_done_by_parts_and_looked_at_once(place, tmp_path):
    tokenizer = {"vocab_size": 300, "path": str(place / "first-tokenizer")}
    cfg = config(tmp_path / "corpus", place, PAIRS, tokenizer=tokenizer)
    assert prepare_part(cfg, Part(1, 2)) is None
    manifest = prepare_part(cfg, Part(0, 2))
    assert prepare(config(tmp_path / "one", place, PAIRS, tokenizer=tokenizer)) == manifest
    assert prepare(cfg) == manifest


def test_windows_of_best_fit_are_counted(place, tmp_path):
    cfg = config(tmp_path / "corpus", place, FIRST, text_of(place), packing="best_fit", valid_fraction=0.2)
    prepare_part(cfg, Part(), seq_len=16)
    path = tmp_path / "corpus" / counts_file(16)
    before = path.read_bytes()
    for damage in (b"", before.replace(b'"windows": {"corpus": {"train": [[', b'"windows": {"corpus": {"train": [[1')):
        path.write_bytes(damage)
        prepare_part(cfg, Part(), seq_len=16)
        assert path.read_bytes() == before != damage


@pytest.mark.parametrize(
    ("sources", "more", "match"),
    [
        ([FIRST, {"kind": "corpus", "name": "o", "path": "other"}], {},
         r"source 'o' \(.*other\) was made with the tokenizer \w+, source 'corpus' \(.*first\) has \w+; one corpus has one"),
        ([FIRST], {"tokenizer": {"vocab_size": 300, "path": "other-tokenizer"}},
         r"source 'corpus' \(.*first\) was made with the tokenizer \w+, data.tokenizer.path=.*other-tokenizer has \w+"),
        ([FIRST], {"tokenizer": {"vocab_size": 512}},
         r"vocab_size=512, but the tokenizer of source 'corpus' \(.*first\) has 300; set data.tokenizer.vocab_size=300"),
        ([PAIRS], {}, r"has tokens alone and nothing says which tokenizer made them; set data.tokenizer.path"),
        ([PAIRS, {"kind": "embedded"}], {}, r"has a megatron source, whose tokens belong to a tokenizer that exists"),
        ([{"kind": "corpus", "path": "second"}], {}, r"second has the sources second-0, second-1; name one of them as"),
        ([{"kind": "corpus", "path": "second", "source": "x"}], {}, r"second has no source 'x', only second-0, second-1"),
        ([{"kind": "corpus", "path": "tokens"}], {}, r"tokens has no manifest.json, so it is not a finished corpus"),
    ],
)  # fmt: skip
def test_sources_that_do_not_fit_together(place, tmp_path, sources, more, match):
    more = {
        key: value | ({"path": str(place / value["path"])} if "path" in value else {}) for key, value in more.items()
    }
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path / "corpus", place, *sources, **more))
    assert not (tmp_path / "corpus").exists()


def test_pairs_that_are_none(place, tmp_path):
    tokenizer = {"vocab_size": 300, "path": str(place / "first-tokenizer")}
    write_pair(tmp_path / "large", [[1, 2], [300]])
    large = {"kind": "megatron", "prefix": [str(tmp_path / "large")]}
    with pytest.raises(
        PrepareError, match=r"large.bin has tokens from 1 to 300, the tokenizer in .* has 300; set data"
    ):
        prepare(config(tmp_path / "corpus", place, large, tokenizer=tokenizer))
    missing = {"kind": "megatron", "prefix": [str(tmp_path / "missing")]}
    with pytest.raises(ShardError, match=r"missing.idx does not exist"):
        prepare(config(tmp_path / "other", place, missing, tokenizer=tokenizer))
    far = DataConfig.model_validate({"corpus": str(tmp_path / "far"), "tokenizer": tokenizer,
                                     "sources": [{"kind": "megatron", "prefix": ["s3://bucket/a"]}]})  # fmt: skip
    with pytest.raises(
        PrepareError, match=r"s3://bucket/a is a URL, and a megatron source is read where it lies; copy"
    ):
        prepare(far)
    write_pair(tmp_path / "floats", [[1]])
    content = bytearray((tmp_path / "floats.idx").read_bytes())
    content[17] = 7  # float32
    (tmp_path / "floats.idx").write_bytes(content)
    with pytest.raises(ShardError, match=r"holds float32; tokens are integers"):
        prepare(config(tmp_path / "floating", place, {"kind": "megatron", "prefix": [str(tmp_path / "floats")]},
                       tokenizer=tokenizer))  # fmt: skip


def test_another_corpus_with_a_shard_missing(place, tmp_path):
    shutil.copytree(place / "first", tmp_path / "first")
    next((tmp_path / "first").rglob("train-*.bin")).unlink()
    with pytest.raises(
        PrepareError, match=r"source 'corpus': .*bin is missing or not of \d+ bytes, .*prepare that corpus"
    ):
        prepare(config(tmp_path / "corpus", tmp_path, FIRST))
    assert not (tmp_path / "corpus" / MANIFEST).exists()


@pytest.mark.fault(48)
def test_pairs_that_change_under_a_finished_corpus_are_refused(place, tmp_path):
    tokenizer = {"vocab_size": 300, "path": str(place / "first-tokenizer")}
    write_pair(tmp_path / "a", [[1, 2]])
    cfg = config(tmp_path / "corpus", tmp_path, {"kind": "megatron", "prefix": ["a"]}, tokenizer=tokenizer)
    prepare(cfg)
    write_pair(tmp_path / "a", [[1, 2, 3]])
    with pytest.raises(
        PrepareError, match=r"(?s)begun with other options or other text.*source.megatron.bin_bytes: 4 in"
    ):
        prepare(cfg)
    assert Path(cfg.corpus, "plan.json").exists()
