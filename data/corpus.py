"""One split of one source of a prepared corpus, as numbered windows of seq_len + 1 tokens, wherever its shards lie."""

import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from data.cache import SUFFIXES, CacheConfig, Lease, default_folder, file_xxh3
from data.hf_tokenizer import JSON_FILE
from data.layout import BestFit, Contiguous, Layout, Rows, Span, counts_file, read_counts
from data.manifest import MANIFEST, CorpusError, Manifest, ShardEntry, SourceEntry, Split, parse_manifest
from data.order import WindowOrder
from data.shards import Shard, ShardError, bin_path, idx_path
from data.store import MissingError, Store, is_url, open_store
from data.tokenizer import CONFIG_FILE, MODEL_FILE, Tokenizer, load_tokenizer
from data.tokenizer_base import write_folder

log = logging.getLogger(__name__)

REPAIR = "restore it, or run launcher/prepare.py again, which makes missing shards anew"
TOKENIZER_FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE)
MAX_OPEN_SHARDS = 256  # each holds two file descriptors; the usual limit of a process is 1024
GROUPS_LOCAL = 3  # of a source read from a URL: the one in use, the next, and the first of its held-out split


class Piece(NamedTuple):
    """Consecutive tokens of one document in a window."""

    shard: str
    document: int  # number in the shard
    first: int  # place of the first token in the document
    tokens: int


@dataclass(frozen=True)
class Reading:
    """How a corpus is to be read: what the meaning of a window number depends on, and where shards are kept."""

    seq_len: int
    packing: Literal["windows", "best_fit"] = "windows"
    document_mask: bool = False
    shuffle_shards: int | None = None  # see data.order.WindowOrder
    cache: CacheConfig = field(default_factory=CacheConfig)


class CorpusFolder:
    """A prepared corpus, opened: its manifest, and the stores that its sources' shards are read from.

    location: a folder or a URL.    Raises CorpusError when folder or manifest is missing, broken or newer, and
    StoreError when a URL cannot be read.
    """

    def __init__(self, location: str | Path, reading: Reading) -> None:
        self.location, self.reading = str(location), reading
        self._stores: dict[str, Store] = {}
        if not is_url(location) and not Path(location).is_dir():
            raise CorpusError(
                f"corpus folder {location} does not exist; make it with: python launcher/prepare.py --config RECIPE"
            )
        try:
            payload = self._store(self.location).read(MANIFEST)
        except MissingError:
            todo = (
                "copy one there from the folder that launcher/prepare.py wrote it to, the manifest last"
                if is_url(location)
                else "finish it with: python launcher/prepare.py --config RECIPE"
            )
            raise CorpusError(f"{location} has no {MANIFEST}, so it is not a finished corpus; {todo}") from None
        self.manifest = parse_manifest(payload, f"{location}/{MANIFEST}")

    def split(self, source: str | None, split: Split) -> "Corpus":
        """One split of a source; None: of the only one.

        Raises CorpusError for a source or split that is not there, a missing shard, or one whose size differs from the
        manifest (of a local folder; a URL's are checked when they are fetched).
        """
        manifest = self.manifest
        if source is None and len(manifest.sources) > 1:
            raise CorpusError(f"{self.location} has the sources {sorted(manifest.sources)}; name the one to open")
        name = source or next(iter(manifest.sources))
        if name not in manifest.sources:
            raise CorpusError(
                f"{self.location} has no source {name!r}, only {sorted(manifest.sources)}; prepare it first"
            )
        entry = manifest.sources[name]
        if split not in entry.splits:
            raise CorpusError(
                f"{self.location} has no split {split!r} of {name}, only {sorted(entry.splits)}; a held-out split is made "
                "when data.valid_fraction is above 0"
            )
        place = self.location if entry.folder is None else entry.folder
        if is_url(place):
            self._check_cache(place)
        else:
            _check_sizes(Path(place), entry.splits[split].shards)
        written_ns = None if is_url(self.location) else os.stat(Path(self.location) / MANIFEST).st_mtime_ns
        return Corpus(self._store(place), name, split, manifest, self._layout(name, split), self.reading, written_ns)

    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer. That of a URL is copied to the cache folder once. Raises TokenizerError, StoreError."""
        if not is_url(self.location):
            return load_tokenizer(Path(self.location) / "tokenizer")
        kept = Path(self.reading.cache.folder or default_folder()) / "tokenizers" / self.manifest.tokenizer.fingerprint
        if not kept.exists():
            files = {}
            for name in TOKENIZER_FILES:
                with suppress(MissingError):
                    files[name] = self._store(self.location).read(f"tokenizer/{name}")
            mine = kept.with_name(f"{kept.name}.{os.getpid()}")
            write_folder(mine, files)
            try:
                os.rename(mine, kept)
            except OSError:  # another process of this node was quicker
                shutil.rmtree(mine)
        return load_tokenizer(kept)

    def close(self) -> None:
        """End what fetches in the background."""
        for store in self._stores.values():
            store.close()

    def _store(self, place: str) -> Store:
        if place not in self._stores:
            self._stores[place] = open_store(place, self.reading.cache)
        return self._stores[place]

    def _check_cache(self, place: str) -> None:
        reading, remote = self.reading, sum(is_url(e.folder or self.location) for e in self.manifest.sources.values())
        if reading.shuffle_shards is None:
            raise CorpusError(
                f"{place} is read over the network and data.shuffle_shards is not set, so that every shard would be needed "
                "at all times; set it to the number of shards that are shuffled together, such as 8"
            )
        if (needed := GROUPS_LOCAL * reading.shuffle_shards * remote) > reading.cache.shards:
            raise CorpusError(
                f"data.shuffle_shards={reading.shuffle_shards} of {remote} sources at a URL needs {needed} shards on local "
                f"disk ({GROUPS_LOCAL} groups a source), data.cache.shards={reading.cache.shards} allows fewer; raise "
                "that or lower data.shuffle_shards"
            )

    def _layout(self, name: str, split: Split) -> Layout:
        reading, manifest = self.reading, self.manifest
        if reading.packing == "windows":
            return Contiguous(manifest.sources[name].splits[split].shards, reading.seq_len, reading.document_mask)
        file = counts_file(reading.seq_len)
        try:
            payload = self._store(self.location).read(file)
        except MissingError:
            copy = ", and copy the file to the URL" if is_url(self.location) else ""
            raise CorpusError(
                f"{self.location} has no {file}: data.packing=best_fit at this model.seq_len has not been counted yet; run "
                f"launcher/prepare.py with this recipe on the corpus's folder, which does it in passing{copy}"
            ) from None
        counts = read_counts(payload, f"{self.location}/{file}", manifest, name, split)
        return BestFit(counts, reading.seq_len, manifest.tokenizer.eos_id, reading.document_mask)


class Corpus:
    """One split of one source, as windows. No token is read before a window is asked for."""

    def __init__(
        self,
        store: Store,
        name: str,
        split: Split,
        manifest: Manifest,
        layout: Layout,
        reading: Reading,
        written_ns: int | None,
    ) -> None:
        """Use Corpus.open or CorpusFolder.split.  written_ns: when the manifest was, if it is local."""
        self.name, self.split, self.seq_len = name, split, reading.seq_len
        self.store, self.location = store, store.location
        self.remote = is_url(store.location)
        self.tokenizer = manifest.tokenizer
        self.shards = manifest.sources[name].splits[split].shards
        self.document_mask, self.counts_targets = reading.document_mask, layout.counts_targets
        self.shards_at_once = reading.shuffle_shards
        self._layout = layout
        self._written_ns = written_ns
        self._proved: set[str] = set()  # shards newer than that which have the right hashes
        self._first_window = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(layout.windows_per_block)])
        self.windows_per_shard = np.bincount(
            layout.block_shards, weights=layout.windows_per_block, minlength=len(self.shards)
        ).astype(np.int64)
        self.n_windows = int(self._first_window[-1])
        self.n_tokens = sum(shard.tokens for shard in self.shards)
        self.n_bytes = sum(shard.bytes for shard in self.shards)
        self._open: OrderedDict[int, tuple[Shard, Lease]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # a loader's thread and its owner read at the same time

    @classmethod
    def open(cls, location: str | Path, split: Split, reading: Reading | int, source: str | None = None) -> "Corpus":
        """One split of a source of the corpus at location. reading: or just the seq_len.  Raises as CorpusFolder does."""
        if isinstance(reading, int):
            reading = Reading(reading)
        if reading.seq_len < 1:
            raise CorpusError(f"seq_len={reading.seq_len}; expected at least 1")
        return CorpusFolder(location, reading).split(source, split)

    @property
    def most_files(self) -> int:
        """File descriptors that reading holds at most: .bin and .idx of each open shard, of a URL its lock, too."""
        if self.remote and self.shards_at_once is not None:
            return 3 * min(len(self.shards), GROUPS_LOCAL * self.shards_at_once)
        return 2 * min(len(self.shards), MAX_OPEN_SHARDS)

    def order(self, seed: int) -> WindowOrder:
        """In which order the windows are read. Raises CorpusError when there is none."""
        if not self.n_windows:
            raise CorpusError(
                f"{self.name} of {self.location} ({self.split}) has no window of {self.seq_len} tokens: its shards are "
                "shorter; use a shorter seq_len, or prepare with more text or a larger data.shard_bytes"
            )
        return WindowOrder(self.windows_per_shard, seed, self.shards_at_once)

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
            f"split={self.split} seq_len={self.seq_len} tokenizer={self.tokenizer.fingerprint} "
            f"packing={self._layout.name} shuffle_shards={self.shards_at_once} shards={shards.hexdigest()}"
        )

    def window(self, i: int) -> NDArray[np.int64]:
        """Window i: (seq_len + 1,). Raises CorpusError outside range(n_windows)."""
        return self.windows([i])[0]

    def windows(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The windows at indices (n,): (n, seq_len + 1). Raises CorpusError outside range(n_windows)."""
        return self.read(indices).tokens

    def read(self, windows: ArrayLike) -> Rows:
        """The windows (n,), with their documents and counted targets where the reading has such."""
        numbers = np.atleast_1d(np.asarray(windows, dtype=np.int64))
        rows = self._rows(numbers.size)
        self._fill(numbers, np.arange(numbers.size), rows)
        return rows

    def read_in_order(self, order: WindowOrder, indices: NDArray[np.int64], windows: NDArray[np.int64]) -> Rows:
        """read(windows), where windows (n,) are what samples indices (n,) of an order read.

        Of a source at a URL only the shards of one group are held at a time, and those of the last one stay held.
        """
        if not self.remote:
            return self.read(windows)
        rows, groups = self._rows(windows.size), [order.group(index) for index in indices.tolist()]
        for group in sorted(set(groups)):
            self.hold(order.shards(*group))
            places = np.flatnonzero([other == group for other in groups])
            self._fill(windows[places], places, rows)
        return rows

    def _rows(self, n: int) -> Rows:
        """Room for n windows."""
        return Rows(
            np.empty((n, self.seq_len + 1), dtype=np.int64),
            np.empty((n, self.seq_len), dtype=np.int32) if self.document_mask else None,
            np.empty((n, self.seq_len), dtype=np.bool_) if self.counts_targets else None,
        )

    def _fill(self, numbers: NDArray[np.int64], places: NDArray[np.int64], rows: Rows) -> None:
        """Read windows (n,) to the rows at places (n,), shard by shard."""
        blocks, windows = self._places(numbers)
        shards = self._layout.block_shards[blocks]
        by_shard = np.argsort(shards, kind="stable")
        for mine in np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1):
            if mine.size:
                shard = self._shard(int(shards[mine[0]]))
                self._layout.read(shard, blocks[mine], windows[mine], places[mine], rows)

    def pieces(self, i: int) -> list[Piece]:
        """What window i consists of, in order; an empty document has no token and is not named."""
        block, window = (int(values[0]) for values in self._places(np.array([i], dtype=np.int64)))
        number = int(self._layout.block_shards[block])
        spans = self._layout.spans(self._shard(number), block, window)
        return [Piece(self.shards[number].name, *span) for span in spans]

    def windows_of(self, shard_name: str, documents: tuple[int, int]) -> NDArray[np.int64]:
        """All windows that have a token of the documents first to last of a shard, ascending.

        Raises CorpusError for a shard that is not there or documents that it does not have.
        """
        names = [shard.name for shard in self.shards]
        if shard_name not in names:
            raise CorpusError(
                f"{self.name} ({self.split}) has no shard {shard_name!r}; it has {names[0]} to {names[-1]}"
            )
        number = names.index(shard_name)
        shard = self._shard(number)
        if documents[1] >= shard.n_documents:
            raise CorpusError(f"{shard_name} has documents 0 to {shard.n_documents - 1}, not {documents[1]}")

        def touches(span: Span) -> bool:
            return documents[0] <= span.document <= documents[1]

        return np.array(
            [
                int(self._first_window[block]) + window
                for block in np.flatnonzero(self._layout.block_shards == number).tolist()
                for window in range(int(self._layout.windows_per_block[block]))
                if any(map(touches, self._layout.spans(shard, block, window)))
            ],
            dtype=np.int64,
        )

    def document(self, shard_name: str, document: int) -> NDArray[np.int64]:
        """The tokens of a document, (n,)."""
        number = next(n for n, shard in enumerate(self.shards) if shard.name == shard_name)
        return self._shard(number).document(document).astype(np.int64)

    def hold(self, numbers: Iterable[int]) -> None:
        """Of a source at a URL: let go of every open shard but these, so that its place in the cache can be reused."""
        kept = set(numbers)
        with self._lock:
            for number in [number for number in self._open if number not in kept]:
                self._close(number)

    def verify(self) -> None:
        """Compare every local file's hash with the manifest's. Raises CorpusError at the first that differs."""
        for shard in self.shards:
            self._compare(shard)

    def _compare(self, entry: ShardEntry) -> None:
        files, hashes = shard_files(Path(self.location), entry), (entry.bin_xxh3, entry.idx_xxh3)
        for (file, _), expected in zip(files, hashes, strict=True):
            if (found := file_xxh3(file)) != expected:
                raise CorpusError(
                    f"{file} has hash {found}, {MANIFEST} says {expected}: it was changed or damaged; "
                    f"delete it, then {REPAIR}"
                )

    def _places(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(block, window in it) of each window, (n,) both."""
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.n_windows:
            raise CorpusError(
                f"windows {numbers.min()} to {numbers.max()} asked of {self.name} in {self.location} ({self.split}), "
                f"which has {self.n_windows}"
            )
        blocks = np.searchsorted(self._first_window, numbers, side="right") - 1
        return blocks, numbers - self._first_window[blocks]

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if number not in self._open:
                self._open[number] = self._map(self.shards[number])
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._close(next(iter(self._open)))
            self._open.move_to_end(number)
            shard = self._open[number][0]
        if not self.remote:  # what comes through the cache is checked there
            shard.check_unchanged()
        return shard

    def _map(self, entry: ShardEntry) -> tuple[Shard, Lease]:
        """A shard, mapped; a local one that was changed after the manifest was written is compared with its hashes."""
        shard, lease = open_shard(self.store, entry)
        newer = self._written_ns is not None and shard.changed_ns > self._written_ns
        if self.remote or not newer or entry.name in self._proved:
            return shard, lease
        if not self._proved:
            log.warning(
                "%s has shards that are newer than its %s; each is compared with its hash when it is first read, which "
                "takes time. Copy a corpus with cp -p or rsync -t to spare that",
                self.location, MANIFEST,
            )  # fmt: skip
        self._compare(entry)
        self._proved.add(entry.name)
        return shard, lease

    def _close(self, number: int) -> None:
        shard, lease = self._open.pop(number)
        del shard  # its files are unmapped with it, and only then may their place go to others
        lease.release()


def open_shard(store: Store, entry: ShardEntry) -> tuple[Shard, Lease]:
    """A shard of a store, mapped, and the lease to release after it. Raises ShardError when it is not the entry's."""
    lease = store.shard(entry)
    shard = Shard(lease.prefix)
    if shard.n_tokens != entry.tokens:
        raise ShardError(
            f"{lease.prefix}: {shard.n_tokens} tokens of {shard.dtype.name}, {MANIFEST} says {entry.tokens}; "
            f"delete it, then {REPAIR}"
        )
    return shard, lease


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a corpus folder. Raises CorpusError when folder or manifest is missing, broken or newer."""
    return CorpusFolder(folder, Reading(1)).manifest


def shards_folder(corpus: Path, source: SourceEntry) -> Path:
    """The local folder from which a source's shards are named."""
    return Path(source.folder) if source.folder is not None else corpus


def shard_files(folder: Path, shard: ShardEntry) -> Sequence[tuple[Path, int]]:
    """(file, the size it must have) for the .bin and the .idx of a shard."""
    prefix = folder / shard.name
    return (bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)


def _check_sizes(folder: Path, shards: tuple[ShardEntry, ...]) -> None:
    """Of every file: thousands at each start, so by plain strings; path objects would double the time to open."""
    for shard in shards:
        for suffix, expected in zip(SUFFIXES, (shard.bin_bytes, shard.idx_bytes), strict=True):
            file = f"{folder}/{shard.name}{suffix}"
            try:
                size = os.stat(file).st_size
            except OSError:
                raise CorpusError(f"{file} is missing but named in {MANIFEST}; {REPAIR}") from None
            if size != expected:
                raise CorpusError(f"{file} has {size} bytes, {MANIFEST} says {expected}; {REPAIR}")
