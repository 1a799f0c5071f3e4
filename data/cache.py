"""A bounded folder of shards on the local disk, shared by the processes of a node.

FOLDER/lock            taken for an instant by whoever looks at or changes what is there (file locks: flock)
FOLDER/users           held shared by every process that has the cache open; its content names the session
FOLDER/waiting         held shared by who waits for room; fetching ahead stands back meanwhile
FOLDER/shards/KEY/     one shard; KEY is made of the hashes of its two files, so that runs and corpora may share a folder
    state              held shared by its readers, exclusively by who fills or checks it; JSON: what was checked, and when
    shard.bin .idx     under these names only when whole; .tmp while they come

All locks end with the process that holds them, whatever ends it, so nothing has to be cleaned up by hand: what a killed
process left behind is found unlocked and taken over. There are never more than `shards` folders KEY, and a shard in use
is never removed: a file that is unlinked while mapped would go on taking disk. Files are compared with their hashes when
they come, when a session first takes them (a session: from the first process that opens the folder to the last that
leaves it), and whenever size, inode or a time of change differ from those noted then.
"""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Self

import xxhash
from pydantic import BaseModel, Field, field_validator

from data.errors import DataError
from data.urls import ENVIRONMENT, secret_options

log = logging.getLogger(__name__)

SUFFIXES = (".bin", ".idx")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
KEY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StoreError(DataError):
    """Shards or their manifest cannot be had from where they lie, or not be kept on this node."""


class CacheConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How shards at a URL come to this node and stay there. Nothing of it matters for a local corpus."""

    # on a disk of this node; None: longhaul-cache-UID in the system's folder for temporary files
    folder: str | None = None
    # most shards in the folder at a time, for all processes of the node together; each must find what it has open
    shards: Annotated[int, Field(ge=1)] = 64
    prefetch: Annotated[int, Field(ge=0)] = 2  # threads of each process that fetch ahead; 0: shards come when asked for
    retries: Annotated[int, Field(ge=0)] = 12  # tries after a first that failed, until something arrives again
    backoff_s: Seconds = 0.5  # pause before the second try; doubles up to 30 s, and up to half of it is left out
    timeout_s: Seconds = 60.0  # for 8 MiB of a file to arrive; a read that takes longer counts as failed
    outage_s: Seconds = 600.0  # nothing arriving for so long ends the run, whatever retries says
    wait_s: Seconds = 1800.0  # longest wait for other processes: that they let go of a shard, or have fetched one
    # for the fsspec driver of the URL, such as {endpoint_url: ...} or {anon: true}. Not for credentials: this is saved
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        if found := secret_options(options):
            raise ValueError(
                f"data.cache.options has {', '.join(found)}, which would be saved with the run; {ENVIRONMENT}"
            )
        return options


class Files(NamedTuple):
    """What the two files of a shard must be: (.bin, .idx)."""

    sizes: tuple[int, int]
    hashes: tuple[str, str]  # xxh3-64 in hexadecimal

    @property
    def key(self) -> str:
        return "-".join(self.hashes)


class Busy(Enum):
    """Why a shard cannot be had at this moment."""

    FETCHING = "another process or thread is fetching or checking it"
    FULL = "every shard in the cache is in use"


class Lease:
    """A shard that stays where it is until release(), or the end of a with block: prefix.bin and prefix.idx.

    Release it when nothing of it is mapped any more: only then may its place on disk go to another shard.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix

    def release(self) -> None:
        """Let go of the shard; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Held(Lease):
    """A shard of the cache on which this process has a lock. ready: it may be read, and the lock is shared.

    Otherwise the lock is exclusive (or shared, when others read the shard already), and the holder must make() it ready
    or drop() it.
    """

    def __init__(self, cache: "Cache", folder: Path, state: FileIO, files: Files, *, ready: bool, shared: bool) -> None:
        super().__init__(folder / "shard")
        self._cache, self._folder, self._state, self._files = cache, folder, state, files
        self.ready, self.shared = ready, shared

    @property
    def filled(self) -> bool:
        """Both files are there, of the right sizes."""
        return _signature(self._folder, self._files.sizes) is not None

    def sound(self) -> bool:
        """Both files have the right hashes. Reads them."""
        paths = (Path(f"{self.prefix}{suffix}") for suffix in SUFFIXES)
        return all(file_xxh3(path) == expected for path, expected in zip(paths, self._files.hashes, strict=True))

    def empty(self) -> None:
        """Remove what is there."""
        for path in self._folder.iterdir():
            if path.name != "state":
                path.unlink()

    @contextmanager
    def write(self, suffix: str) -> Iterator[FileIO]:
        """The file to be, under a temporary name until the block ends without an error."""
        path = Path(f"{self.prefix}{suffix}")
        with open(f"{path}.tmp", "wb", buffering=0) as stream:
            yield stream
        os.replace(f"{path}.tmp", path)

    def make_ready(self, *, ahead: bool = False) -> None:
        """Note that the files are as they should be, and share the lock. ahead: nobody has asked for the shard yet."""
        with self._cache.alone():  # a lock changes over in two steps; nobody can come in between
            self._cache.note(self._folder, self._state, self._files.sizes, ahead=ahead)
            fcntl.flock(self._state, fcntl.LOCK_SH)
        self.ready = self.shared = True

    def drop(self) -> None:
        """Give the place back: what could not be fetched takes no room. Needs the exclusive lock."""
        with self._cache.alone():
            _remove(self._folder)
            self.release()

    def release(self) -> None:
        if self._state.closed:
            return
        if self.ready:
            _touch(self._state)
        fcntl.flock(self._state, fcntl.LOCK_UN)  # said, as a forked child may have the file open too
        self._state.close()


class Cache:
    """The shards in a folder. Several processes and threads may each open the same one.

    Raises StoreError when the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path | None, shards: int, wait_s: float = 1800.0) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.shards, self.wait_s = shards, wait_s
        self.evictions = 0  # by this process
        self._places = self.folder / "shards"
        try:
            self._places.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder is None and self.folder.stat().st_uid != os.getuid():
                raise PermissionError(errno.EACCES, "it belongs to another user")
            self._users = _lock_file(self.folder / "users")
            with self.alone():
                self._session = self._join()
                self._make_room(shards, ahead=False)  # of an earlier run that was allowed more
        except OSError as error:
            raise self.explain(error) from None

    def close(self) -> None:
        """Leave the session. Leases stay valid until they are released."""
        self._users.close()

    def claim(self, files: Files, *, ahead: bool = False) -> Held | Busy:
        """A lock on a shard, or why there is none now; never waits. ahead: it is only to be fetched ahead of its use.

        Who gets a shard that is not ready has a place for it and must fill or drop it. To make room the least recently
        used shard goes that nobody holds; those fetched ahead go last, and never for another fetched ahead.
        """
        folder = self._places / files.key
        with self.alone():
            if not (folder / "state").exists():  # under this lock alone is it made or removed
                if ahead and self._someone_waits():
                    return Busy.FULL
                if folder.exists():
                    _remove(folder)  # its remover was killed
                if not self._make_room(self.shards - 1, ahead):
                    return Busy.FULL
                folder.mkdir()
            state = _lock_file(folder / "state")
            held = self._lock(folder, state, files)
            if held is None:
                state.close()
                return Busy.FETCHING
            if held.ready:
                self._note_use(state, ahead)
            return held

    def evict(self) -> bool:
        """Remove one shard that nobody holds, whatever the bound; False when there is none."""
        with self.alone():
            return self._evict(ahead=False)

    def unmark(self, files: Files) -> None:
        """A shard that was fetched ahead here is not going to be asked for: it may go before others."""
        with self.alone():
            path = self._places / files.key / "state"
            if path.exists():
                with _lock_file(path) as state:
                    if (known := _read_state(state)).get("ahead") == os.getpid():
                        _write_state(state, known | {"ahead": 0})

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts no process fetches ahead."""
        with _lock_file(self.folder / "waiting") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            try:
                yield
            finally:
                fcntl.flock(stream, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process or thread looks at the folder meanwhile. Raises StoreError after wait_s of waiting."""
        with _lock_file(self.folder / "lock") as stream:
            end, pause = time.monotonic() + self.wait_s, 0.0005
            while not _try_lock(stream, fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise StoreError(
                        f"{self.folder / 'lock'} has been locked for {self.wait_s:g} s, which takes an instant as a rule; "
                        "look for a stopped process that uses this cache, or name another folder in data.cache.folder"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            try:
                yield
            finally:
                fcntl.flock(stream, fcntl.LOCK_UN)

    def explain(self, error: OSError) -> StoreError:
        """What a failed operation on the folder means for the user."""
        if error.errno in NO_SPACE:
            return StoreError(
                f"cache folder {self.folder}: no space left on its disk, and no shard in it that is not in use; free some "
                f"space, name a folder on a larger disk in data.cache.folder, or lower data.cache.shards={self.shards}"
            )
        return StoreError(
            f"cache folder {self.folder} cannot be used ({error.strerror or error}); name a folder in data.cache.folder "
            "that this user can write, on a disk of this node"
        )

    def note(self, folder: Path, state: FileIO, sizes: tuple[int, int], *, ahead: bool) -> None:
        """Write down that the files in folder were found right. Only under alone()."""
        files = _signature(folder, sizes)
        _write_state(state, {"session": self._session, "files": files, "ahead": os.getpid() if ahead else 0})

    def _join(self) -> str:
        """The session's name: a new one if nobody else has the folder open."""
        first = _try_lock(self._users, fcntl.LOCK_EX)
        name = secrets.token_hex(8) if first else os.pread(self._users.fileno(), 64, 0).decode()
        if first:
            self._users.truncate(0)
            os.pwrite(self._users.fileno(), name.encode(), 0)
        fcntl.flock(self._users, fcntl.LOCK_SH)
        return name

    def _lock(self, folder: Path, state: FileIO, files: Files) -> Held | None:
        known, found = _read_state(state), _signature(folder, files.sizes)
        checked = found is not None and known.get("session") == self._session and known.get("files") == found
        if checked and _try_lock(state, fcntl.LOCK_SH):
            return Held(self, folder, state, files, ready=True, shared=True)
        if not checked and _try_lock(state, fcntl.LOCK_EX):
            return Held(self, folder, state, files, ready=False, shared=False)
        if found is not None and not checked and _try_lock(state, fcntl.LOCK_SH):  # others read it
            return Held(self, folder, state, files, ready=False, shared=True)
        return None

    def _note_use(self, state: FileIO, ahead: bool) -> None:
        known = _read_state(state)
        if bool(known.get("ahead")) != ahead:
            _write_state(state, known | {"ahead": os.getpid() if ahead else 0})

    def _make_room(self, at_most: int, ahead: bool) -> bool:
        """Evict until at_most shards are left; False if too few can go."""
        while len(self._folders()) > at_most:
            if not self._evict(ahead):
                return False
        return True

    def _evict(self, ahead: bool) -> bool:
        candidates = []
        for folder in self._folders():
            with _lock_file(folder / "state") as state:
                wanted = _is_running(_read_state(state).get("ahead", 0))
                candidates.append((wanted, os.fstat(state.fileno()).st_mtime_ns, folder))
        for wanted, _, folder in sorted(candidates):
            if wanted and ahead:
                continue
            with _lock_file(folder / "state") as state:
                if _try_lock(state, fcntl.LOCK_EX):
                    _remove(folder)
                    self.evictions += 1
                    log.debug("cache %s: removed %s", self.folder, folder.name)
                    return True
        return False

    def _folders(self) -> list[Path]:
        return [self._places / name for name in sorted(os.listdir(self._places)) if KEY.fullmatch(name)]

    def _someone_waits(self) -> bool:
        with _lock_file(self.folder / "waiting") as stream:
            return not _try_lock(stream, fcntl.LOCK_EX)


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"longhaul-cache-{os.getuid()}"


def file_xxh3(path: Path, on_read: Callable[[int], None] = lambda n_bytes: None) -> str:
    """xxh3-64 of a file in hexadecimal, read in blocks of 1 MiB; on_read is told their bytes."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()


_open_files: "weakref.WeakSet[FileIO]" = weakref.WeakSet()


def _lock_file(path: Path) -> FileIO:
    """A file for locks, made if need be. A lock belongs to this open file: not to the process, nor to its threads."""
    stream = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    _open_files.add(stream)
    return stream


def _close_in_child() -> None:
    """A forked child shares its parent's locks and would keep them when the parent is killed."""
    for stream in list(_open_files):
        stream.close()


os.register_at_fork(after_in_child=_close_in_child)


def _try_lock(stream: FileIO, kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _touch(state: FileIO) -> None:
    """Used now. Said in nanoseconds: the kernel's own mark counts in steps of some milliseconds."""
    now = time.time_ns()
    os.utime(state.fileno(), ns=(now, now))


def _read_state(state: FileIO) -> dict[str, Any]:
    """What is known of a shard; nothing, if it is new or its writer was killed."""
    try:
        known = json.loads(os.pread(state.fileno(), 4096, 0))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _write_state(state: FileIO, known: dict[str, Any]) -> None:
    payload = json.dumps(known).encode()
    state.truncate(0)
    os.pwrite(state.fileno(), payload, 0)
    _touch(state)


def _signature(folder: Path, sizes: tuple[int, int]) -> list[list[int]] | None:
    """What changes when one of the files does, as JSON has it; None if one is missing or of another size."""
    signature = []
    for suffix, size in zip(SUFFIXES, sizes, strict=True):
        try:
            found = os.stat(f"{folder}/shard{suffix}")
        except FileNotFoundError:
            return None
        if found.st_size != size:
            return None
        signature.append([found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    return signature


def _remove(folder: Path) -> None:
    for path in sorted(folder.iterdir()):  # "state" comes last: its lock is held until nothing else is left
        path.unlink()
    folder.rmdir()


def _is_running(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, and alive
    return True
