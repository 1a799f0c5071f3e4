"""Corpora for the tests, written shard by shard without any text, and one tokenizer trained on real files."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.corpus import MANIFEST, Manifest, ShardEntry, SplitEntry, TokenizerEntry
from data.shards import ShardWriter
from data.tokenizer import TokenizerConfig, train


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus([[3, 4], [10]], "name") -> folder with two train shards, of documents of 3, 4 and of 10 tokens.

    Token k of the split is k, so that a window shows where it was read.
    """

    def make(documents, name="corpus", dtype=np.int32, split="train"):
        folder = tmp_path / name
        folder.mkdir()
        shards, first = [], 0
        for number, lengths in enumerate(documents):
            with ShardWriter(folder / f"{split}-{number:05d}", dtype) as writer:
                for length in lengths:
                    writer.add(np.arange(first, first + length))
                    first += length
                written = writer.close()
            shards.append(ShardEntry(name=f"{split}-{number:05d}", bytes=4 * written.tokens, **written._asdict()))
        manifest = Manifest(
            tokenizer=TokenizerEntry(fingerprint="0123456789abcdef", vocab_size=2**31 - 1, eos_id=2),
            dtype=np.dtype(dtype).name,
            source={"kind": "made up"},
            seed=0,
            skipped={},
            splits={split: SplitEntry(shards=tuple(shards))},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        return folder

    return make


def library_texts(*folders: str) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for folder in folders for path in sorted((root / folder).glob("*.py"))]


@pytest.fixture(scope="session")
def texts():
    return library_texts("json", "asyncio", "email")


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request, texts, tmp_path_factory):
    cfg = TokenizerConfig(model_type=request.param, vocab_size=1000, train_bytes=2**18)
    return train(texts, tmp_path_factory.mktemp("tokenizers") / request.param, cfg)
