"""Where a corpus lies: a local folder, whose files are used in place, or a URL, whose shards come to a cache on this node.

    with open_store("s3://bucket/corpus", CacheConfig(shards=32)) as store:
        manifest = store.read("manifest.json")
        store.prefetch(entries)              # what is read next, in this order; returns at once
        with store.shard(entries[0]) as lease:
            shard = Shard(lease.prefix)      # mapped: stop using it before the lease ends

Each process opens a store of its own; the processes of a node share the cache (data/cache.py). A shard is fetched once
for all of them, by whoever asks first, while the others wait.
"""

import logging
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol, Self

from data.cache import NO_SPACE, SUFFIXES, Busy, Cache, CacheConfig, Files, Held, Lease, StoreError
from data.remote import MissingError, Remote, Stopped, Tries

__all__ = ["CacheConfig", "Lease", "MissingError", "Store", "StoreError", "is_url", "open_store"]

log = logging.getLogger(__name__)

FULL_POLL_S = 0.2  # between looks of the prefetch threads whether there is room again
MAX_POLL_S = 0.1  # between looks of a caller that waits for another process
CLOSE_S = 1.0  # a prefetch in the middle of a read is left to itself after so long
HASH = re.compile(r"[0-9a-f]{16}")


class ShardFiles(Protocol):
    """What is to be known of a shard before it is read; data.manifest.ShardEntry has it."""

    @property
    def name(self) -> str: ...
    @property
    def bin_bytes(self) -> int: ...
    @property
    def bin_xxh3(self) -> str: ...
    @property
    def idx_bytes(self) -> int: ...
    @property
    def idx_xxh3(self) -> str: ...


class Store(ABC):
    """The files of a corpus. location: folder or URL for messages, without credentials."""

    location: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file, whole. Raises MissingError when there is none, StoreError when it cannot be read."""

    @abstractmethod
    def shard(self, entry: ShardFiles) -> Lease:
        """A shard as local files, of the right sizes and, from a URL, hashes. Release it when it is not used any more.

        Waits until it is there. Raises StoreError (a MissingError when it is not in the store) when it cannot be had.
        """

    def prefetch(self, entries: Iterable[ShardFiles]) -> None:  # noqa: B027 - a local folder has nothing to do
        """Begin to fetch these shards, in this order, in the background; earlier wishes that are not here are forgotten.

        Never waits and never raises for the store: what cannot be fetched is tried again by shard().
        """

    def stats(self) -> dict[str, float]:
        """Of this process: fetched_bytes, fetches (shards), retries, hits, evictions, wait_s (of callers of shard())."""
        return dict.fromkeys(("fetched_bytes", "fetches", "retries", "hits", "evictions", "wait_s"), 0.0)

    def close(self) -> None:  # noqa: B027 - nor has it anything to close
        """End what runs in the background. Leases stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_url(location: str | Path) -> bool:
    return "://" in str(location)


def open_store(location: str | Path, cache: CacheConfig) -> Store:
    """The store at a local folder or a URL that fsspec knows (s3:// gs:// https:// hf:// file:// ...).

    A file:// URL is read through the cache, as suits a slow folder that all nodes share.
    Raises StoreError for an unknown kind of URL, a missing driver, or a cache folder that cannot be used.
    """
    return RemoteStore(str(location), cache) if is_url(location) else LocalStore(Path(location))


class LocalStore(Store):
    """A folder of this machine; nothing is copied, so a lease holds nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)

    def read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise MissingError(f"{path} does not exist; restore it, or correct data.corpus") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk") from None

    def shard(self, entry: ShardFiles) -> Lease:
        for suffix, expected in zip(SUFFIXES, (entry.bin_bytes, entry.idx_bytes), strict=True):
            path = self.folder / f"{entry.name}{suffix}"
            try:
                found = path.stat().st_size
            except OSError as error:
                raise MissingError(
                    f"{path} cannot be found ({error.strerror}) but is named in the manifest; restore it, or prepare the "
                    "corpus again, which makes missing shards anew"
                ) from None
            if found != expected:
                raise StoreError(
                    f"{path} has {found} bytes, the manifest says {expected}; it was changed or damaged: restore it, or "
                    "delete it and prepare the corpus again"
                )
        return Lease(self.folder / entry.name)


class RemoteStore(Store):
    """Shards at a URL, through the cache of this node. shard() and prefetch() may be called from several threads."""

    def __init__(self, location: str, cfg: CacheConfig) -> None:
        self._cfg, self._pid = cfg, os.getpid()
        self._remote = Remote(location, cfg)
        self.location = self._remote.location
        self._cache = Cache(cfg.folder, cfg.shards, cfg.wait_s)
        self._closing = threading.Event()
        self._stats, self._stats_lock = super().stats(), threading.Lock()
        self._ahead = _Prefetch(self, cfg) if cfg.prefetch else None

    def read(self, name: str) -> bytes:
        self._check_process()
        with self._asked_for():
            return self._remote.read(name, self._tries())

    def shard(self, entry: ShardFiles) -> Lease:
        self._check_process()
        files, began = _files(entry), time.monotonic()
        try:
            held = self._cache.claim(files)
            if isinstance(held, Held) and held.ready:
                self._count(hits=1)
                return held
            with self._asked_for():
                return self._wait(entry, files, held)
        except OSError as error:
            raise self._cache.explain(error) from None
        finally:
            self._count(wait_s=time.monotonic() - began)

    def prefetch(self, entries: Iterable[ShardFiles]) -> None:
        self._check_process()
        if self._ahead is not None:
            self._ahead.wish([(entry, _files(entry)) for entry in entries])

    def stats(self) -> dict[str, float]:
        with self._stats_lock:
            return self._stats | {"evictions": float(self._cache.evictions)}

    def close(self) -> None:
        if self._closing.is_set() or os.getpid() != self._pid:
            return
        self._closing.set()
        if self._ahead is not None:
            self._ahead.close()
        self._cache.close()

    def fetch_ahead(self, entry: ShardFiles, files: Files) -> bool:
        """One try to have a shard in the cache; False when there is no room. Raises what ends the try."""
        held = self._cache.claim(files, ahead=True)
        if isinstance(held, Held):
            self._fill(held, entry, files, ahead=True)
            held.release()
        return held is not Busy.FULL

    def forget(self, files: Files) -> None:
        """A shard that was to be fetched ahead is not wished for any more."""
        try:
            self._cache.unmark(files)
        except (StoreError, OSError) as error:  # a mark only helps; a folder that is gone is told by shard()
            log.debug("cache folder %s: %s", self._cache.folder, error)

    def _wait(self, entry: ShardFiles, files: Files, held: Held | Busy) -> Lease:
        """Ask the cache until it gives the shard, and fetch it if it falls to this process."""
        end, pause = time.monotonic() + self._cfg.wait_s, 0.002
        with ExitStack() as sign:
            while True:
                if isinstance(held, Held) and self._fill(held, entry, files):
                    return held
                if held is Busy.FULL:
                    sign.close()
                    sign.enter_context(self._cache.waiting())  # or what becomes free would be taken to fetch ahead
                if self._closing.is_set():
                    self._say_closed()
                if time.monotonic() > end:
                    self._give_up(entry, held)
                time.sleep(pause)
                pause = min(2 * pause, MAX_POLL_S)
                held = self._cache.claim(files)

    def _fill(self, held: Held, entry: ShardFiles, files: Files, *, ahead: bool = False) -> bool:
        """Make a shard ready that was claimed. False if it must be claimed again; its lock is released then."""
        if held.ready:
            return True
        try:
            if held.filled:
                if held.sound():
                    held.make_ready(ahead=ahead)
                    return True
                if held.shared:  # others read it, and it can go when they are done
                    held.release()
                    return False
                log.warning("%s: its copy in the cache is damaged; it is fetched again", self._remote.url(entry.name))
            self._fetch(held, entry, files, ahead)
            held.make_ready(ahead=ahead)
            return True
        except BaseException:
            if not held.shared:
                held.drop()
            held.release()
            raise

    def _fetch(self, held: Held, entry: ShardFiles, files: Files, ahead: bool) -> None:
        tries = self._tries(retries=0 if ahead else None)
        while True:
            held.empty()
            try:
                for suffix, size, xxh3 in zip(SUFFIXES, files.sizes, files.hashes, strict=True):
                    with held.write(suffix) as stream:
                        self._remote.copy(f"{entry.name}{suffix}", size, xxh3, stream, tries)
            except Stopped:
                self._say_closed()
            except OSError as error:  # of the disk: the remote's are StoreErrors
                held.empty()
                if ahead or error.errno not in NO_SPACE or not self._cache.evict():
                    raise
                log.warning("cache folder %s: its disk is full; a shard was removed from it", self._cache.folder)
            else:
                self._count(fetches=1, fetched_bytes=sum(files.sizes))
                return

    def _tries(self, retries: int | None = None) -> Tries:
        return Tries(self._cfg, retries=retries, on_retry=lambda: self._count(retries=1), stop=self._closing)

    @contextmanager
    def _asked_for(self) -> Iterator[None]:
        """Meanwhile nothing else is begun to be fetched ahead: the line belongs to who waits."""
        if self._ahead is None:
            yield
        else:
            with self._ahead.paused():
                yield

    def _count(self, **amounts: float) -> None:
        with self._stats_lock:
            for name, amount in amounts.items():
                self._stats[name] += amount

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the store {self.location} was opened in process {self._pid} and is used in process {os.getpid()}; open "
                "one in each process, after it was forked"
            )
        if self._closing.is_set():
            self._say_closed()

    def _say_closed(self) -> NoReturn:
        raise StoreError(f"the store {self.location} was closed; open it again to read from it")

    def _give_up(self, entry: ShardFiles, held: Held | Busy) -> NoReturn:
        what = f"{self._remote.url(entry.name)} could not be had for {self._cfg.wait_s:g} s (data.cache.wait_s)"
        if held is Busy.FULL:
            raise StoreError(
                f"{what}: each of the {self._cfg.shards} shards that cache folder {self._cache.folder} may hold is in use "
                "by a process of this node; raise data.cache.shards to at least what they have open together, or lower "
                "data.shuffle_shards"
            )
        raise StoreError(
            f"{what}: another process has been at it all the time; look for a stopped process that uses cache folder "
            f"{self._cache.folder}, or name another folder in data.cache.folder"
        )


class Wish(NamedTuple):
    """A shard to be fetched ahead."""

    place: int  # among the wishes
    entry: ShardFiles
    files: Files


class _Prefetch:
    """Threads that fetch what is wished for, one shard after the other, and stand back for what is asked for."""

    def __init__(self, store: RemoteStore, cfg: CacheConfig) -> None:
        self._store, self._cfg = store, cfg
        self._wishes: deque[Wish] = deque()
        self._kept: set[Files] = set()  # what was wished for, so that it is marked in the cache until it is used
        self._change = threading.Condition()
        self._asked_for, self._closed, self._stop = 0, False, threading.Event()
        self._threads: list[threading.Thread] = []

    def wish(self, wishes: list[tuple[ShardFiles, Files]]) -> None:
        with self._change:
            self._wishes = deque(Wish(place, entry, files) for place, (entry, files) in enumerate(wishes))
            forgotten = self._kept - {files for _, files in wishes}
            self._kept = {files for _, files in wishes}
            self._start()
            self._change.notify_all()
        for files in forgotten:
            self._store.forget(files)

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._change:
            self._asked_for += 1
        try:
            yield
        finally:
            with self._change:
                self._asked_for -= 1
                self._change.notify_all()

    def close(self) -> None:
        self.wish([])
        with self._change:
            self._closed = True
            self._stop.set()
            self._change.notify_all()
        end = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _start(self) -> None:
        while len(self._threads) < self._cfg.prefetch:
            name = f"data-fetch-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
            self._threads[-1].start()

    def _run(self) -> None:
        failed = 0
        while (wish := self._next()) is not None:
            try:
                if not self._store.fetch_ahead(wish.entry, wish.files):
                    self._put_back(wish)
                    self._stop.wait(FULL_POLL_S)
                elif wish.files not in self._kept:  # forgotten while it came
                    self._store.forget(wish.files)
                failed = 0
            except (StoreError, OSError) as error:  # told by shard(), if it still happens when the shard is needed
                failed += 1
                log.debug("%s: not fetched ahead: %s", wish.entry.name, error)
                self._stop.wait(min(self._cfg.backoff_s * 2**failed, 30.0))

    def _next(self) -> Wish | None:
        with self._change:
            while not self._closed and (not self._wishes or self._asked_for):
                self._change.wait()
            return None if self._closed else self._wishes.popleft()

    def _put_back(self, wish: Wish) -> None:
        with self._change:
            if wish.files in self._kept and wish.files not in {other.files for other in self._wishes}:
                self._wishes = deque(sorted([*self._wishes, wish], key=lambda wish: wish.place))


def _files(entry: ShardFiles) -> Files:
    """Raises StoreError for what cannot be hashes: they name the shard's folder in the cache."""
    files = Files((entry.bin_bytes, entry.idx_bytes), (entry.bin_xxh3, entry.idx_xxh3))
    if not all(HASH.fullmatch(xxh3) for xxh3 in files.hashes):
        raise StoreError(
            f"shard {entry.name!r} has the hashes {files.hashes}, which are not xxh3-64 in hexadecimal (16 of 0-9a-f); "
            "the manifest is damaged: restore it, or prepare the corpus again"
        )
    return files
