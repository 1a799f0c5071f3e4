"""Corpora for the tests, written shard by shard without any text, and real texts."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, SplitEntry, TokenizerEntry
from data.shards import ShardWriter


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus([[3, 4], [10]], "name") -> folder with two train shards, of documents of 3, 4 and of 10 tokens.

    Token k of a source is k, so that a window shows where it was read; several sources as name=documents, each from a
    multiple of a million on.
    """

    def make(documents=None, name="corpus", dtype=np.int32, split="train", **sources):
        folder = tmp_path / name
        folder.mkdir()
        entries = {}
        for place, (source, shards_of) in enumerate((sources or {"only": documents}).items()):
            shards, first = [], place * 1_000_000
            for number, lengths in enumerate(shards_of):
                prefix = f"{split}-{number:05d}" if not sources else f"{source}/{split}-{number:05d}"
                (folder / prefix).parent.mkdir(exist_ok=True)
                with ShardWriter(folder / prefix, dtype) as writer:
                    for length in lengths:
                        writer.add(np.arange(first, first + length))
                        first += length
                    written = writer.close()
                shards.append(ShardEntry(name=prefix, bytes=4 * written.tokens, **written._asdict()))
            entries[source] = SourceEntry(
                kind="made up", about={}, left_out={}, splits={split: SplitEntry(shards=tuple(shards))}
            )
        manifest = Manifest(
            tokenizer=TokenizerEntry(fingerprint="0123456789abcdef", vocab_size=2**31 - 1, eos_id=2),
            dtype=np.dtype(dtype).name,
            seed=0,
            sources=entries,
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
