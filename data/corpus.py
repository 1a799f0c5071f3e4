"""A prepared corpus: a folder of token shards with a manifest, cut into windows of seq_len + 1 tokens.

Window w of a shard covers tokens w * seq_len to (w + 1) * seq_len inclusive: neighbours share one token, the last
target of one and the first input of the next, so that every token but a shard's first is a target once. Windows never
cross shards: a shard of n tokens has (n - 1) // seq_len of them, and its tail, seq_len tokens at most, is not read
(Corpus.tail_tokens says how many in all).
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from data.errors import DataError
from data.shards import Shard, ShardError, bin_path, idx_path

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
REPAIR = "restore it, or run launcher/prepare.py again, which makes missing shards anew"
MAX_OPEN_SHARDS = 256  # each holds two file descriptors; the usual limit of a process is 1024

Split = Literal["train", "valid"]


class CorpusError(DataError):
    """A folder that is not a whole prepared corpus, or not one of this version."""


class ShardEntry(BaseModel, frozen=True, extra="forbid"):
    """One shard as the manifest knows it; hashes are xxh3-64 in hexadecimal."""

    name: str  # PREFIX of PREFIX.bin and PREFIX.idx in the corpus folder
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt  # of the UTF-8 text that the tokens stand for
    bin_bytes: NonNegativeInt
    idx_bytes: NonNegativeInt
    bin_xxh3: str
    idx_xxh3: str


class SplitEntry(BaseModel, frozen=True, extra="forbid"):
    """The shards of one split, in reading order."""

    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class TokenizerEntry(BaseModel, frozen=True, extra="forbid"):
    """The tokenizer that the tokens belong to; its folder is tokenizer/ in the corpus folder."""

    fingerprint: str
    vocab_size: PositiveInt
    eos_id: NonNegativeInt


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """manifest.json, written last: a folder without one is not a corpus."""

    format_version: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerEntry
    dtype: str  # of the tokens in the .bin files
    source: dict[str, str | int]  # what the text came from
    seed: int  # of the held-out split
    skipped: dict[str, NonNegativeInt]  # documents left out, by reason
    splits: dict[Split, SplitEntry]


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a corpus folder. Raises CorpusError when folder or manifest is missing, broken or newer."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CorpusError(
            f"corpus folder {folder} does not exist; make it with: python launcher/prepare.py --config RECIPE"
        )
    if not path.is_file():
        raise CorpusError(
            f"{folder} has no {MANIFEST}, so it is not a finished corpus; finish it with: "
            "python launcher/prepare.py --config RECIPE"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if where == "format_version":
            raise CorpusError(
                f"{path} has format_version {first['input']!r}, this version reads {FORMAT_VERSION}; "
                "prepare the corpus again or use the Longhaul version that wrote it"
            ) from None
        raise CorpusError(
            f"{path} is damaged ({where + ': ' if where else ''}{first['msg']}); delete the file and run "
            "launcher/prepare.py again, which keeps the finished shards"
        ) from None


class Corpus:
    """One split of a prepared corpus as windows of seq_len + 1 tokens. Opening reads the manifest and file sizes."""

    def __init__(
        self, folder: Path, split: Split, seq_len: int, manifest: Manifest, shards: tuple[ShardEntry, ...]
    ) -> None:
        self.folder = folder
        self.split = split
        self.seq_len = seq_len
        self.manifest = manifest
        self.shards = shards
        counts = np.array([max(shard.tokens - 1, 0) // seq_len for shard in shards], dtype=np.int64)
        self._first_window = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])  # (shards + 1,)
        self.n_windows = int(self._first_window[-1])
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_bytes = sum(shard.bytes for shard in shards)
        self.tail_tokens = sum(
            shard.tokens - (int(count) * seq_len + 1 if count else 0)
            for shard, count in zip(shards, counts, strict=True)
        )
        self._open: OrderedDict[int, Shard] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # a loader's thread and its owner read at the same time

    @classmethod
    def open(cls, folder: str | Path, split: Split, seq_len: int) -> "Corpus":
        """Open one split.

        Raises CorpusError for what read_manifest refuses, a split that is not there, a missing shard, or one whose
        size differs from the manifest. The contents are checked by verify() alone.
        """
        if seq_len < 1:
            raise CorpusError(f"seq_len={seq_len}; expected at least 1")
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise CorpusError(
                f"{folder} has no split {split!r}, only {sorted(manifest.splits)}; a held-out split is made when "
                "data.valid_fraction is above 0"
            )
        shards = manifest.splits[split].shards
        for shard in shards:
            for file, expected in shard_files(Path(folder), shard):
                if not file.is_file():
                    raise CorpusError(f"{file} is missing but named in {MANIFEST}; {REPAIR}")
                if (size := file.stat().st_size) != expected:
                    raise CorpusError(f"{file} has {size} bytes, {MANIFEST} says {expected}; {REPAIR}")
        return cls(Path(folder), split, seq_len, manifest, shards)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token stands for, end-of-document tokens counted; 0 for an empty split."""
        return self.n_bytes / self.n_tokens if self.n_tokens else 0.0

    @property
    def fingerprint(self) -> str:
        """What the meaning of a window number depends on, part by part, so that a difference can be named."""
        shards = xxhash.xxh3_64()
        for shard in self.shards:
            shards.update(f"{shard.tokens}:{shard.bin_xxh3}:{shard.idx_xxh3};".encode())
        return (
            f"split={self.split} seq_len={self.seq_len} tokenizer={self.manifest.tokenizer.fingerprint} "
            f"shards={shards.hexdigest()}"
        )

    def window(self, i: int) -> NDArray[np.int64]:
        """Window i: (seq_len + 1,). Raises CorpusError outside range(n_windows)."""
        return self.windows([i])[0]

    def windows(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The windows at indices (n,): (n, seq_len + 1). Raises CorpusError outside range(n_windows)."""
        numbers = np.asarray(indices, dtype=np.int64)
        out = np.empty((numbers.size, self.seq_len + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(self._places(numbers)):
            out[row] = self._shard(shard).read(start, self.seq_len + 1)
        return out

    def documents(self, i: int) -> list[tuple[str, int]]:
        """(shard name, document number in it) of every document that has a token in window i, in order."""
        ((number, start),) = self._places(np.array([i], dtype=np.int64))
        shard = self._shard(number)
        # not merely the range between first and last: an empty document between them has no token here
        touched = np.unique(shard.document_at(np.arange(start, start + self.seq_len + 1)))
        return [(self.shards[number].name, int(document)) for document in touched]

    def verify(self) -> None:
        """Compare every file's hash with the manifest's. Raises CorpusError at the first that differs."""
        for shard in self.shards:
            for (file, _), expected in zip(
                shard_files(self.folder, shard), (shard.bin_xxh3, shard.idx_xxh3), strict=True
            ):
                if (found := file_xxh3(file)) != expected:
                    raise CorpusError(
                        f"{file} has hash {found}, {MANIFEST} says {expected}: it was changed or damaged; "
                        f"delete it, then {REPAIR}"
                    )

    def _places(self, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(shard number, first token) of each window."""
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.n_windows:
            raise CorpusError(
                f"windows {numbers.min()} to {numbers.max()} asked of {self.folder} ({self.split}), "
                f"which has {self.n_windows}"
            )
        shards = np.searchsorted(self._first_window, numbers, side="right") - 1
        starts = (numbers - self._first_window[shards]) * self.seq_len
        return list(zip(shards.tolist(), starts.tolist(), strict=True))

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            entry = self.shards[number]
            shard = Shard(self.folder / entry.name)
            if (shard.dtype.name, shard.n_tokens) != (self.manifest.dtype, entry.tokens):
                raise ShardError(
                    f"{self.folder / entry.name}: {shard.n_tokens} tokens of {shard.dtype.name}, {MANIFEST} says "
                    f"{entry.tokens} of {self.manifest.dtype}; delete it, then {REPAIR}"
                )
            self._open[number] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard


def shard_files(folder: Path, shard: ShardEntry) -> Sequence[tuple[Path, int]]:
    """(file, the size it must have) for the .bin and the .idx of a shard."""
    prefix = folder / shard.name
    return (bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)


def file_xxh3(path: Path) -> str:
    """xxh3-64 of a file in hexadecimal, read in blocks of 1 MiB."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
