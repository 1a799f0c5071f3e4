"""Every file of a corpus is looked at, wherever it lies; each that differs is named, with what to do."""

import json
import shutil

import numpy as np
import pytest

from data.config import DataConfig
from data.manifest import CorpusError
from data.prepare import Part, PrepareError, prepare_part
from data.shards import ShardWriter
from data.tokenizer import TokenizerConfig, train
from data.verify import verify


def config(folder, **changes):
    """A text, pairs in another folder and a source of another corpus; best_fit is counted."""
    return DataConfig.model_validate({
        "corpus": str(folder / "corpus"),
        "sources": [
            {"kind": "text", "paths": [f"{folder}/texts/*.txt"]},
            {"kind": "megatron", "prefix": [f"{folder}/pairs/a"]},
            {"kind": "corpus", "path": f"{folder}/first", "source": "text"},
        ],
        "tokenizer": {"vocab_size": 300, "path": f"{folder}/tokenizer"},
        "valid_fraction": 0.2, "packing": "best_fit", "workers": 1, **changes,
    })  # fmt: skip


def prepare(cfg):
    return prepare_part(cfg, Part(), seq_len=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    texts = [f"text {number}, with a few words in it" for number in range(40)]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:02d}.txt").write_text(text)
    train([(texts * 40, 2**16)], folder / "tokenizer", TokenizerConfig(vocab_size=300, train_bytes=2**16))
    (folder / "pairs").mkdir()
    with ShardWriter(folder / "pairs" / "a", np.uint16) as writer:
        writer.add(np.arange(100))
    cfg = config(folder)
    prepare(cfg.model_copy(update={"corpus": f"{folder}/first", "sources": cfg.sources[:1]}))
    prepare(cfg)
    return folder


@pytest.fixture
def copy(place, tmp_path):
    """The corpora, where they may be damaged."""
    shutil.copytree(place, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.json"):
        path.write_text(path.read_text().replace(str(place), str(tmp_path / "copy")))
    return tmp_path / "copy"


def flip(path):
    """Another bit in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_files_are_looked_at(place):
    found = verify(f"{place}/corpus")
    shards = [
        path
        for name in ("corpus", "first", "pairs")
        for path in (place / name).rglob("*.*")
        if path.suffix in (".bin", ".idx")
    ]
    assert (found.files, found.at_urls, found.wrong) == (len(shards) + 1, [], [])
    assert found.n_bytes == sum(path.stat().st_size for path in shards)
    assert {path.parent.name for path in shards} == {"text", "pairs"}
    assert sum("valid" in path.name for path in shards) == 4


@pytest.mark.parametrize(
    ("pattern", "todo"),
    [
        ("corpus/text/train-*.bin", "delete it and run launcher/prepare.py again, which makes it anew from its text"),
        ("corpus/text/valid-*.idx", "delete it and run launcher/prepare.py again, which makes it anew from its text"),
        ("first/text/valid-*.bin", "restore it: source 'corpus' is used where it lies"),
        ("pairs/a.idx", "restore it: source 'megatron' is used where it lies"),
    ],
)
def test_a_file_that_differs_is_named(copy, pattern, todo):
    (path,) = copy.glob(pattern)
    whole = path.read_bytes()
    flip(path)
    (line,) = verify(f"{copy}/corpus").wrong
    assert line.startswith(f"{path} has hash ")
    assert line.endswith(f"; {todo}")
    path.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, manifest.json says {len(whole)}" in verify(f"{copy}/corpus").wrong[0]
    path.unlink()
    assert verify(f"{copy}/corpus").wrong[0].startswith(f"{path} cannot be read (No such file or directory); ")
    path.write_bytes(whole)
    assert verify(f"{copy}/corpus").wrong == []


def test_all_that_differ_are_named_and_what_is_said_mends_them(place, tmp_path):
    cfg = config(place, corpus=f"{tmp_path}/own")
    prepare(cfg)
    paths = [*tmp_path.glob("own/text/*.bin"), *tmp_path.glob("own/packing/*.json")]
    for path in paths:
        flip(path)
    found = verify(cfg.corpus).wrong
    assert len(found) == len(paths) == 3
    assert "best_fit-16.json is damaged (" in found[-1]
    assert found[-1].endswith("; run launcher/prepare.py again, which counts anew")
    for path in paths[:2]:
        path.unlink()
    prepare(cfg)
    assert verify(cfg.corpus).wrong == []


def test_the_tokenizer_is_looked_at(copy):
    flip(copy / "corpus" / "tokenizer" / "tokenizer.model")
    (line,) = verify(f"{copy}/corpus").wrong
    assert "tokenizer.model has fingerprint" in line
    assert line.endswith("; every run of this corpus has a copy, as runs/NAME/tokenizer")
    shutil.rmtree(copy / "corpus" / "tokenizer")
    other = train(
        [(["other text"] * 40, 2**16)],
        copy / "corpus" / "tokenizer",
        TokenizerConfig(vocab_size=270, train_bytes=2**16),
    )
    (line,) = verify(f"{copy}/corpus").wrong
    assert f"corpus/tokenizer has the fingerprint {other.fingerprint}, manifest.json says" in line


def test_a_source_at_a_url_is_told_and_not_read(copy):
    manifest = copy / "corpus" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["sources"]["corpus"]["folder"] = "s3://bucket/first"
    manifest.write_text(json.dumps(content))
    found = verify(f"{copy}/corpus")
    assert (found.at_urls, [line for line in found.wrong if "best_fit" not in line]) == (["corpus"], [])


def test_what_cannot_be_verified(place, tmp_path):
    with pytest.raises(
        PrepareError, match=r"data.corpus=s3://b/c is a URL, and what lies there is compared .* fetched; ver"
    ):
        verify("s3://b/c")
    with pytest.raises(CorpusError, match=r"texts has no manifest.json, so it is not a finished corpus; finish it"):
        verify(f"{place}/texts")
