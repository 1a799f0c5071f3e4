"""How the tokens of shards are cut into windows of seq_len + 1 tokens: in a row, or by whole documents put together.

A layout cuts shards into blocks and each block into windows. "windows": a shard is one block, and window w covers its
tokens w * seq_len to (w + 1) * seq_len inclusive: neighbours share one token, the last target of one and the first
input of the next, so that every token but a shard's first is a target once. A shard of n tokens has
(n - 1) // seq_len of them, and its tail, seq_len tokens at most, is not read. "best_fit": a block is BLOCK_DOCUMENTS
documents of a shard, packed by data/packing.py. The packing is a pure function of the documents' lengths and made when
it is needed; only how many windows each block has must be known before, and launcher/prepare.py counts that
(CORPUS/packing/best_fit-SEQ_LEN.json).
"""

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.manifest import CorpusError, Manifest, ShardEntry, Split
from data.packing import Packing, best_fit, count_windows, fill
from data.shards import Shard

log = logging.getLogger(__name__)

BLOCK_DOCUMENTS = 4096
COUNTS = "packing/best_fit-{}.json"  # with seq_len
_PACKINGS = 256  # kept in memory: some 100 KB each

IntArray = NDArray[np.int64]


class Span(NamedTuple):
    """Consecutive tokens of one document of a shard."""

    document: int
    first: int  # place of the first token in the document
    tokens: int


class Rows(NamedTuple):
    """Some windows, read."""

    tokens: NDArray[np.int64]  # (n, T + 1)
    documents: NDArray[np.int32] | None  # (n, T): number of each input's document in its row; None without masking
    counted: NDArray[np.bool_] | None  # (n, T): whether the target counts; None: all do


class Layout(Protocol):
    """What Corpus asks of a way to cut."""

    name: str
    counts_targets: bool  # whether some targets do not count, so that read says which
    block_shards: IntArray  # (blocks,) number of each block's shard, ascending
    windows_per_block: IntArray  # (blocks,)

    def read(self, shard: Shard, blocks: IntArray, windows: IntArray, places: IntArray, rows: Rows) -> None:
        """Write windows (n,) of blocks (n,) of one shard to the rows at places (n,)."""

    def spans(self, shard: Shard, block: int, window: int) -> list[Span]:
        """What a window of a block consists of, in order; an empty document has no token and is not named."""


class Contiguous:
    """Windows in a row, across documents."""

    name = "windows"

    def __init__(self, shards: tuple[ShardEntry, ...], seq_len: int, document_mask: bool) -> None:
        self.seq_len, self.counts_targets = seq_len, document_mask
        self.block_shards = np.arange(len(shards), dtype=np.int64)
        tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
        self.windows_per_block = np.maximum(tokens - 1, 0) // seq_len

    def read(self, shard: Shard, blocks: IntArray, windows: IntArray, places: IntArray, rows: Rows) -> None:
        length = self.seq_len + 1
        starts = windows * self.seq_len
        shard.read_rows(starts, length, rows.tokens, places)
        if rows.documents is None or rows.counted is None:
            return
        for place, start in zip(places.tolist(), starts.tolist(), strict=True):
            numbers = shard.document_numbers(start, length)
            rows.documents[place] = numbers[:-1] - numbers[0]
            rows.counted[place] = numbers[1:] == numbers[:-1]  # a document's first token cannot be foreseen in it

    def spans(self, shard: Shard, block: int, window: int) -> list[Span]:
        spans, start, end = [], window * self.seq_len, (window + 1) * self.seq_len + 1
        while start < end:
            document = shard.document_at(start)
            assert isinstance(document, int)
            first, stop = shard.token_span(document)
            spans.append(Span(document, start - first, min(stop, end) - start))
            start = stop
        return spans


class BestFit:
    """Whole documents put together, block by block."""

    name = "best_fit"
    counts_targets = True

    def __init__(self, counts: list[list[int]], seq_len: int, pad_id: int, document_mask: bool) -> None:
        """counts: windows of each block of each shard."""
        self.seq_len, self.pad_id, self.document_mask = seq_len, pad_id, document_mask
        blocks = np.array([len(of_shard) for of_shard in counts], dtype=np.int64)
        self.block_shards = np.repeat(np.arange(len(counts)), blocks)
        self.windows_per_block = np.array([n for of_shard in counts for n in of_shard], dtype=np.int64)
        self._in_shard = np.arange(len(self.block_shards)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        self._packings: OrderedDict[int, Packing] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Shard, blocks: IntArray, windows: IntArray, places: IntArray, rows: Rows) -> None:
        for place, block, window in zip(places.tolist(), blocks.tolist(), windows.tolist(), strict=True):
            tokens, documents, counted = self._row(shard, block, window)
            rows.tokens[place] = tokens[0]
            if rows.documents is not None:
                rows.documents[place] = documents[0]
            if rows.counted is not None:
                rows.counted[place] = counted[0]

    def _row(self, shard: Shard, block: int, window: int) -> tuple[NDArray, NDArray, NDArray]:
        base = self._first_document(block)

        def piece(document: int, start: int, count: int) -> NDArray:
            return shard.read(shard.token_span(base + document)[0] + start, count)

        return fill(self._packing(shard, block), window, piece, self.pad_id, self.document_mask)

    def spans(self, shard: Shard, block: int, window: int) -> list[Span]:
        packing, base = self._packing(shard, block), self._first_document(block)
        pieces = range(*packing.window_offsets[window : window + 2].tolist())
        return [
            Span(base + int(packing.piece_document[p]), int(packing.piece_start[p]), int(packing.piece_tokens[p]))
            for p in pieces
        ]

    def _first_document(self, block: int) -> int:
        return int(self._in_shard[block]) * BLOCK_DOCUMENTS

    def _packing(self, shard: Shard, block: int) -> Packing:
        with self._lock:
            if block not in self._packings:
                first = self._first_document(block)
                packing = best_fit(shard.lengths(first, first + BLOCK_DOCUMENTS), self.seq_len + 1)
                if packing.n_windows != self.windows_per_block[block]:
                    raise CorpusError(
                        f"{shard.prefix}: block {block} packs into {packing.n_windows} windows, its count says "
                        f"{self.windows_per_block[block]}; delete {counts_file(self.seq_len)} in the corpus folder and run "
                        "launcher/prepare.py again, which counts anew"
                    )
                self._packings[block] = packing
                if len(self._packings) > _PACKINGS:
                    self._packings.popitem(last=False)
            self._packings.move_to_end(block)
            return self._packings[block]


# -- the counts of best_fit ---------------------------------------------------------------------------------------------


def counts_file(seq_len: int) -> str:
    """Where the counts lie in a corpus folder."""
    return COUNTS.format(seq_len)


def count_best_fit(
    folder: Path, manifest: Manifest, seq_len: int, open_shard: Callable[[str, ShardEntry], Shard]
) -> None:
    """Count the windows of every block and write them into the corpus folder, unless they are there and sound.

    open_shard: gives a shard of a source. Reads the indices of the shards, no tokens.
    """
    path = folder / counts_file(seq_len)
    if path.is_file():
        if not (problem := counts_problem(path.read_bytes(), manifest)):
            return
        log.warning("%s %s; it is written again", path, problem)
    counts = {
        name: {
            split: [_count(open_shard(name, entry), seq_len) for entry in part.shards]
            for split, part in source.splits.items()
        }
        for name, source in manifest.sources.items()
    }
    content = {"block_documents": BLOCK_DOCUMENTS, "shards": _identity(manifest), "windows": counts}
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(path.name + ".tmp")
    with open(staging, "w", encoding="utf-8") as stream:
        json.dump({**content, "xxh3": _hash(content)}, stream)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)


def counts_problem(payload: bytes, manifest: Manifest) -> str:
    """What is wrong with the counts in a file's bytes; empty when they are as they were written, and of these shards."""
    try:
        content = json.loads(payload)
        expected, found = content.pop("xxh3"), _hash(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged ({error!r})"
    if found != expected:
        return f"is damaged (its content has hash {found}, it says {expected})"
    if (content["block_documents"], content["shards"]) != (BLOCK_DOCUMENTS, _identity(manifest)):
        return "counts the windows of other shards than the corpus has"
    return ""


def read_counts(payload: bytes, where: str, manifest: Manifest, source: str, split: Split) -> list[list[int]]:
    """The counts of one split of a source. Raises CorpusError when they are of other shards or damaged."""
    if problem := counts_problem(payload, manifest):
        raise CorpusError(f"{where} {problem}; run launcher/prepare.py on the corpus's folder again, which counts anew")
    counts: list[list[int]] = json.loads(payload)["windows"][source][split]
    return counts


def _count(shard: Shard, seq_len: int) -> list[int]:
    return [
        count_windows(shard.lengths(first, first + BLOCK_DOCUMENTS), seq_len + 1)
        for first in range(0, shard.n_documents, BLOCK_DOCUMENTS)
    ]


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


def _identity(manifest: Manifest) -> str:
    """A hash of all indices: the lengths that the counts were made from."""
    digest = xxhash.xxh3_64()
    for name, source in sorted(manifest.sources.items()):
        for split, part in sorted(source.splits.items()):
            digest.update(f"{name} {split} {' '.join(shard.idx_xxh3 for shard in part.shards)}\n".encode())
    return digest.hexdigest()
