"""Files wherever they are: found by paths, globs and URLs, opened only if unchanged, unpacked in bounded memory.

A path with :// goes through fsspec (s3:// gs:// https:// hf:// and all that it knows); any other is a local file.
"""

import glob
import os
import re
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import fsspec
import zstandard

from data.errors import DataError
from data.urls import missing_driver, redact

Options = dict[str, str | int | bool]  # of a remote file system, as fsspec passes them on

CHUNK = 2**20  # bytes read, or unpacked, at a time
HEAD = 2**16  # bytes of a file looked at when it is listed
LISTERS = 16  # threads that list remote files; each waits for answers most of the time
READ_AHEAD = 2**22  # bytes asked of a remote store at once
ZSTD_INPUT = 2**10  # bytes given to zstd at a time: they unpack to 32 MiB at the very most
COUNTED = 2**28  # bytes in which lines are counted to name one in an error message; farther in, its offset must do
GZIP, ZSTD = "gzip", "zstd"
ENDINGS = {".gz": GZIP, ".gzip": GZIP, ".zst": ZSTD, ".zstd": ZSTD}
MAGIC = {GZIP: b"\x1f\x8b", ZSTD: b"\x28\xb5\x2f\xfd"}
OTHERS = {rb"BZh[1-9]1AY&SY": "bzip2", rb"\xfd7zXZ\x00": "xz", rb"PK\x03\x04": "zip", rb"\x04\x22\x4d\x18": "lz4"}


class SourceError(DataError):
    """A source with nothing in it, that cannot be reached, or that changes while it is read."""


class Damaged(Exception):
    """Packed bytes that cannot be unpacked any further. whole: what came before is complete to its last byte."""

    def __init__(self, what: str, whole: bool = False) -> None:
        super().__init__(what)
        self.whole = whole


class File(NamedTuple):
    """A file as it was when the source was listed."""

    name: str  # of its document, or what the names of its documents begin with
    path: str
    n_bytes: int  # as stored
    stamp: str  # its time of modification or the store's mark of its contents
    text_bytes: int  # unpacked; of a packed file an estimate
    atoms: int  # what can be read by itself: bytes, stripes, row groups, record batches or rows; 1: the file as a whole
    packing: str = ""  # GZIP, ZSTD, or none
    problem: str = ""  # what keeps the whole file from being read


# -- listing -----------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return "://" in path


def list_paths(patterns: list[str], options: Options) -> list[str]:
    """The files that paths, globs (** crosses folders, and no circle of links is followed) and URLs name, each once,
    sorted. Raises SourceError when one of them names nothing, or the file system cannot be asked.
    """
    found: set[tuple[str, str]] = set()  # (spelling that is the same for each, as it was named)
    for pattern in patterns:
        matches = _match_remote(pattern, options) if is_remote(pattern) else _match_local(pattern)
        if not matches:
            where = "" if is_remote(pattern) else f" (from {os.getcwd()})"
            raise SourceError(f"{pattern!r} matches no file{where}; correct the path or leave it out")
        found.update({_one_spelling(path): path for path in matches}.items())
    first: dict[str, str] = {}
    for same, path in sorted(found):
        first.setdefault(same, path)
    return sorted(first.values())  # in the order of what is written


def _one_spelling(path: str) -> str:
    """The same for ./a, a, its absolute path and its file:// URL. A link is another file: that may be meant."""
    local = path.removeprefix("file://")
    return path if is_remote(local) else os.path.abspath(local)


def _match_local(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.lexists(expanded):
        return [expanded]
    matches = _expand(expanded)
    files = [match for match in matches if not os.path.isdir(match)]
    if matches and not files:
        raise SourceError(f"{pattern!r} matches folders only; name files, for example with {pattern}/**/*.txt")
    return files


def _expand(pattern: str) -> list[str]:
    """glob.glob, but without going round in circles of symbolic links."""
    head, crosses, tail = pattern.partition("**")
    if not crosses or (head and not head.endswith("/")) or (tail and not tail.startswith("/")):
        return glob.glob(pattern)
    roots = glob.glob(head) if head else ["."]
    found = [match for root in roots for folder in _folders(root) for match in _expand(folder + (tail or "/*"))]
    return [match.removeprefix("./") for match in found] if not head else found


def _folders(root: str) -> Iterator[str]:
    """root and the folders below it, also through links unless they lead to a folder that they lie in."""
    seen: dict[str, frozenset[tuple[int, int]]] = {root.rstrip("/") or "/": frozenset()}
    for folder, subfolders, _ in os.walk(root.rstrip("/") or "/", onerror=_refuse_folder, followlinks=True):
        state = os.stat(folder)
        above = seen.pop(folder) | {(state.st_dev, state.st_ino)}
        for name in list(subfolders):
            path = os.path.join(folder, name)
            below = os.stat(path)
            if name.startswith(".") or (below.st_dev, below.st_ino) in above:
                subfolders.remove(name)
            else:
                seen[path] = above
        yield glob.escape(folder.rstrip("/"))


def _refuse_folder(error: OSError) -> None:
    raise SourceError(f"{error.filename} cannot be listed: {error.strerror}; repair it or leave it out")


def _match_remote(pattern: str, options: Options) -> list[str]:
    magic = "*[" if pattern.startswith("http") else "*?["  # a ? in a web address begins its query
    if "::" in pattern:
        raise SourceError(f"{pattern!r} chains file systems, which is not supported; unpack or mount what is inside")
    with refusing(pattern, "listed"):
        system, path = fsspec.url_to_fs(pattern, **options)
        if not any(sign in pattern for sign in magic):
            return [system.unstrip_protocol(path)]  # so that an address has one spelling
        found = system.glob(path, detail=True)
        return [system.unstrip_protocol(name) for name, about in found.items() if about["type"] == "file"]


def map_paths(work: Any, paths: list[str]) -> list[Any]:
    """[work(path), ...], by several threads where paths are remote."""
    if not any(is_remote(path) for path in paths):
        return [work(path) for path in paths]
    with ThreadPoolExecutor(LISTERS) as pool:
        return list(pool.map(work, paths))


def stat(path: str, options: Options) -> tuple[int, str]:
    """(bytes, stamp) of a file. Raises SourceError for what is not there, not a file, or does not say its size."""
    if is_remote(path):
        return _stat_remote(path, options)
    with refusing(path, "read"):
        state = os.stat(path)
    if os.path.isdir(path):
        raise SourceError(f"{path} is a folder; name files, or all in a folder as {path}/**/*.txt")
    if not os.path.isfile(path):
        raise SourceError(f"{path} is not a file but a pipe, socket or device; write it to a file first")
    return state.st_size, str(state.st_mtime_ns)


def _stat_remote(path: str, options: Options) -> tuple[int, str]:
    with refusing(path, "read"):
        system, inner = fsspec.url_to_fs(path, **options)
        system.invalidate_cache()
        about = system.info(inner)
    if about.get("type") == "directory":
        raise SourceError(f"{path} is a folder; name files, or all in a folder as {path.rstrip('/')}/**")
    if about.get("size") is None:
        raise SourceError(f"{path}: its server does not say its size; fetch the file and name the local copy")
    marks = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    return int(about["size"]), next((str(about[mark]) for mark in marks if about.get(mark)), "")


# -- opening -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_unchanged(file: File, options: Options) -> Iterator[IO[bytes]]:
    """The file's bytes. Raises SourceError if it is not as it was listed, before or (read to its end) after reading."""
    _check_unchanged(file, options)
    with open_file(file.path, options) as stream:
        yield stream
    _check_unchanged(file, options)


def _check_unchanged(file: File, options: Options) -> None:
    n_bytes, stamp = stat(file.path, options)
    if (n_bytes, stamp) != (file.n_bytes, file.stamp):
        change = "another time of change" if n_bytes == file.n_bytes else f"{n_bytes} now"
        raise SourceError(
            f"{file.path} had {file.n_bytes} bytes when it was listed and has {change}; let nothing write to the "
            "source while it is prepared, delete the unfinished corpus folder and start again"
        )


@contextmanager
def open_file(path: str, options: Options) -> Iterator[IO[bytes]]:
    with refusing(path, "read"):
        if is_remote(path):
            system, inner = fsspec.url_to_fs(path, **options)
            stream = system.open(inner, "rb", block_size=READ_AHEAD)
        else:
            stream = open(path, "rb")  # noqa: SIM115
    with stream:
        yield stream


@contextmanager
def refusing(path: str, verb: str) -> Iterator[None]:
    """Turn what a file system raises into SourceError: drivers of remote ones raise classes of their own, too."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise SourceError(f"{path}: {missing_driver(path, error)}") from None
    except Exception as error:
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        reason = redact(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")  # or where it led to
        todo = (
            "check the address, the network and the credentials in the environment" if is_remote(path) else "repair it"
        )
        raise SourceError(f"{path} cannot be {verb}: {reason}; {todo}, or leave it out") from None


def chunks(stream: IO[bytes], path: str, stop: int | None = None) -> Iterator[bytes]:
    """What follows in stream, CHUNK bytes at a time, up to the file's byte `stop`."""
    at = stream.tell() if stop is not None else 0
    while stop is None or at < stop:
        with refusing(path, "read"):
            data = stream.read(CHUNK if stop is None else min(CHUNK, stop - at))
        if not data:
            return
        at += len(data)
        yield data


# -- packed files ------------------------------------------------------------------------------------------------------


def packing_of(path: str, head: bytes) -> tuple[str, str]:
    """(packing, problem) of a file, by its first bytes and, where these are of no packing, its name.

    Raises SourceError for a packing that cannot be read.
    """
    for packing, magic in MAGIC.items():
        if head.startswith(magic):
            return packing, ""
    if len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return ZSTD, ""  # a skippable frame, as some packers put first
    for pattern, other in OTHERS.items():
        if re.match(pattern, head):
            raise SourceError(f"{path} is packed with {other}; unpack it, or pack it with gzip or zstd instead")
    named = ENDINGS.get(os.path.splitext(path)[1].lower())
    if named is None:
        return "", ""
    got = f"begins with 0x{head[:4].hex()}" if head else "is empty"
    problem = f"is named as {named} and {got}; expected 0x{MAGIC[named].hex()}; pack it again or correct its name"
    return "", problem


def unpacked_size(n_bytes: int, head: bytes, packing: str) -> int:
    """Bytes that a packed file unpacks to, guessed from its first HEAD bytes."""
    made = used = 0
    try:
        if packing == GZIP:
            decoder = zlib.decompressobj(31)
            made = len(decoder.decompress(head, 64 * HEAD))
            used = len(head) - len(decoder.unconsumed_tail) - len(decoder.unused_data)
        else:
            unpacker = zstandard.ZstdDecompressor().decompressobj()
            while used < len(head) and made < 64 * HEAD and not unpacker.eof:
                made += len(unpacker.decompress(head[used : used + ZSTD_INPUT]))
                used = min(used + ZSTD_INPUT, len(head))
    except (zlib.error, zstandard.ZstdError):
        return n_bytes
    return max(1, n_bytes * made // max(used, 1))


def unpacked(stream: IO[bytes], file: File) -> Generator[bytes]:
    """The file's bytes, unpacked, a bounded number at a time. Raises Damaged where no more can be unpacked.

    Members of gzip and frames of zstd may follow each other, and zeros the last one (as on tapes). A turned bit may
    unpack to other text that only the checksum at the end gives away.
    """
    if not file.packing:
        yield from chunks(stream, file.path)
        return
    source = _Rest(chunks(stream, file.path))
    unpack = _gunzip if file.packing == GZIP else _unzstd
    try:
        while True:
            yield from unpack(source)
            if not source.skip_zeros():
                return
            if packing_of("", source.peek(4))[0] != file.packing:
                raise Damaged(f"is followed by 0x{source.peek(4).hex()}, which is not {file.packing}", whole=True)
    except (zlib.error, zstandard.ZstdError) as error:
        doubt = "; what was read of it before may be wrong, too" if "check" in str(error) else ""
        raise Damaged(f"is damaged ({error}{doubt})") from None


class _Rest:
    """What is left to unpack."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts, self.data = parts, b""

    def take(self) -> bytes:
        data, self.data = self.data or next(self.parts, b""), b""
        return data

    def peek(self, n: int) -> bytes:
        while len(self.data) < n and (part := next(self.parts, b"")):
            self.data += part
        return self.data[:n]

    def skip_zeros(self) -> bool:
        """Whether there is anything but zeros left; stands at it."""
        while self.peek(1):
            self.data = self.data.lstrip(b"\0")
            if self.data:
                return True
        return False


def _gunzip(source: _Rest) -> Iterator[bytes]:
    decoder, data = zlib.decompressobj(31), b""
    while not decoder.eof:
        data = data or source.take()
        out = decoder.decompress(data, CHUNK)
        if out:
            yield out
        elif not data:  # nothing in, nothing out: the end, and not the member's
            raise Damaged("is cut short")
        data = decoder.unconsumed_tail
    source.data = decoder.unused_data


def _unzstd(source: _Rest) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor().decompressobj()
    while data := source.take():
        for first in range(0, len(data), ZSTD_INPUT):
            out = decoder.decompress(data[first : first + ZSTD_INPUT])
            if out:
                yield out
            if decoder.eof:
                source.data = decoder.unused_data + data[first + ZSTD_INPUT :]
                return
    raise Damaged("is cut short")


# -- lines -------------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Whole lines of a file."""

    offset: int  # bytes (unpacked) before the first of them
    lines_before: int  # of those that were counted, from where the reading began
    payload: bytes


class Long(NamedTuple):
    """A line that goes on in another read and is longer than the limit; nothing of it is held."""

    offset: int
    lines_before: int


class Loss(NamedTuple):
    """From here on the file is lost."""

    offset: int
    lines_before: int
    what: str


class LineReader:
    """The lines that begin in given stretches of a stream, in blocks, without ever holding much more than a limit."""

    def __init__(self, parts: Iterator[bytes], offset: int, limit: int) -> None:
        """parts: the stream from its byte `offset` on.    limit: bytes of a line, beyond which the rest is dropped."""
        self._parts, self._limit, self._data = parts, limit, b""
        self._offset, self._lines = offset, 0  # of the first byte of _data; line ends before it
        self._ended = False
        self._damage: Damaged | None = None

    def blocks(self, stretches: Iterator[tuple[int, int]]) -> Iterator[Block | Long | Loss]:
        """The lines that begin in [start, stop) of each stretch; the stretches ascend, and may go beyond the end."""
        inside = False  # a line that began before the stretch
        for start, stop in stretches:
            if self._offset < start:  # else the one before ended in a line that began in it
                self._skip_to(start - 1)
                inside = True
            if inside:
                inside = not self._skip_line(stop)
            if not inside and self._offset < stop and not self._at_end():
                yield from self._take(stop)
            if self._at_end() and self._offset < stop:
                if self._damage is not None and self._offset >= start:
                    yield Loss(self._offset, self._lines, str(self._damage))
                return

    def _at_end(self) -> bool:
        return not self._data and not self._more()

    def _more(self) -> bool:
        part = self._next()
        self._data = self._data + part if self._data else part
        return bool(part)

    def _next(self) -> bytes:
        if self._ended:
            return b""
        try:
            part = next(self._parts, b"")
        except Damaged as damage:
            self._damage, part = damage, b""
        self._ended = not part
        return part

    def _drop(self, n: int) -> None:
        self._lines += self._data.count(b"\n", 0, n)
        self._offset += min(n, len(self._data))
        self._data = self._data[n:]

    def _skip_to(self, target: int) -> None:
        while self._offset < target and not self._at_end():
            self._drop(target - self._offset)

    def _skip_line(self, stop: int) -> bool:
        """Whether the line that goes on here ends before stop; otherwise some byte from there on is reached."""
        while self._offset < stop and not self._at_end():
            end = self._data.find(b"\n") + 1
            self._drop(end or len(self._data))
            if end:
                return True
        return False

    def _take(self, stop: int) -> Iterator[Block | Long]:
        """Lines up to the one in which byte stop - 1 lies, and that line."""
        need = stop - self._offset
        while len(self._data) < need and self._more():
            pass
        end = self._data.find(b"\n", need - 1) + 1
        if end:
            yield self._cut(end)
            return
        if begin := self._data.rfind(b"\n") + 1:
            yield self._cut(begin)
        if self._data:
            yield from self._take_long()

    def _cut(self, end: int) -> Block:
        block = Block(self._offset, self._lines, self._data[:end])
        self._data = self._data[end:]
        self._offset += end
        self._lines += block.payload.count(b"\n")
        return block

    def _take_long(self) -> Iterator[Block | Long]:
        """The line that _data is the beginning of, without its end; of one beyond the limit nothing is kept."""
        offset, lines, parts, length = self._offset, self._lines, [self._data], len(self._data)
        self._data, ended = b"", False
        while not ended and (part := self._next()):
            line, newline, self._data = part.partition(b"\n")
            length, ended = length + len(line), bool(newline)
            if length <= self._limit:
                parts.append(line)
            else:
                parts.clear()
        self._offset += length + ended
        self._lines += ended
        if not ended and self._damage is not None and not self._damage.whole:
            return  # it is not all there
        if length > self._limit:
            yield Long(offset, lines)
            return
        payload = b"".join(parts)
        parts.clear()  # or a long line would be held twice while it is read
        yield Block(offset, lines, payload)


def count_lines(path: str, options: Options, stop: int) -> int | None:
    """Line ends in the first `stop` bytes of a file that is not packed; None where that is too far to count."""
    if stop > COUNTED:
        return None
    with open_file(path, options) as stream:
        return sum(part.count(b"\n") for part in chunks(stream, path, stop))
