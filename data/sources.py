"""Where documents come from. A source lists its documents and cuts them into units before any text is tokenized.

A unit is a run of consecutive documents of about data.shard_bytes; it becomes one shard whoever works on it, so that
the shards do not depend on the number of workers. Units are plain values that travel to worker processes.
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import xxhash
from pydantic import BaseModel, Field

from data.errors import DataError

LEAVE_OUT = "repair it or leave it out of data.source"


class SourceError(DataError):
    """A source with nothing in it, or with something that cannot be read as text."""


class EmbeddedConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The .py files of the running Python's standard library, its tests too, without installed packages: some 30 MB."""

    kind: Literal["embedded"] = "embedded"


class TextConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Local UTF-8 text files, one document each."""

    kind: Literal["text"] = "text"
    paths: Annotated[list[str], Field(min_length=1)]  # files or globs; ** crosses folders; each must match something


SourceConfig = Annotated[EmbeddedConfig | TextConfig, Field(discriminator="kind")]


class Document(NamedTuple):
    """One text, and its name within the source."""

    name: str
    text: str


class Skipped(NamedTuple):
    """A document left out, and why in one word: "empty" or "undecodable"."""

    name: str
    reason: str


class File(NamedTuple):
    """A file as it was when the source was listed."""

    name: str
    path: str
    n_bytes: int


class Unit(NamedTuple):
    """Consecutive documents that make one shard."""

    number: int
    files: tuple[File, ...]
    skip_undecodable: bool  # or refuse what is not UTF-8

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True)
class Source:
    """The listed files of a source, in a fixed order."""

    kind: str
    files: tuple[File, ...]
    skip_undecodable: bool  # or refuse what is not UTF-8
    fingerprint: str  # of names, sizes and modification times: notices a source that changes under a half-made corpus

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def describe(self) -> dict[str, str | int]:
        """What the manifest says of the source."""
        about: dict[str, str | int] = {"kind": self.kind, "documents": len(self.files), "bytes": self.n_bytes}
        return about | ({"python": platform.python_version()} if self.kind == "embedded" else {})

    def units(self, shard_bytes: int) -> list[Unit]:
        """The documents cut into equal stretches of about shard_bytes; a document is where its middle is."""
        total, count = self.n_bytes, max(1, round(self.n_bytes / shard_bytes))
        groups: dict[int, list[File]] = {}
        offset = 0
        for file in self.files:
            groups.setdefault((offset + file.n_bytes // 2) * count // total, []).append(file)
            offset += file.n_bytes
        return [Unit(number, tuple(files), self.skip_undecodable) for number, files in enumerate(groups.values())]


def open_source(cfg: EmbeddedConfig | TextConfig) -> Source:
    """List the files of a source. Raises SourceError when nothing matches, a file cannot be read, or all are empty."""
    found = _list_library() if isinstance(cfg, EmbeddedConfig) else _list_text(cfg)
    files = []
    digest = xxhash.xxh3_64()
    for name, path in found:
        try:
            state = os.stat(path)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror}; repair it or leave it out of data.source"
            ) from None
        if not os.path.isfile(path):
            raise SourceError(f"{path} is not a file; name files, or all in a folder as {path}/**/*.txt")
        files.append(File(name, path, state.st_size))
        digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
    if not any(file.n_bytes for file in files):
        raise SourceError(
            f"all {len(files)} files of data.source are empty, the first is {files[0].path}; name files with text"
        )
    return Source(cfg.kind, tuple(files), isinstance(cfg, EmbeddedConfig), digest.hexdigest())


def documents(unit: Unit) -> Iterator[Document | Skipped]:
    """The unit's documents in order.

    Raises SourceError for a file that cannot be read, changed since it was listed, or is not UTF-8 (where refused).
    """
    for file in unit.files:
        payload = _read(file)
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            if unit.skip_undecodable:
                yield Skipped(file.name, "undecodable")
                continue
            raise SourceError(_not_utf8(file, payload, error)) from None
        yield Document(file.name, text) if text else Skipped(file.name, "empty")


def _list_library() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise SourceError(
            f"{root} has no .py files: this Python comes without the sources of its library; use another Python, or "
            "data.source.kind=text with files of your own"
        )
    return sorted((path.relative_to(root).as_posix(), str(path)) for path in found)


def _list_text(cfg: TextConfig) -> list[tuple[str, str]]:
    found: set[str] = set()
    for pattern in cfg.paths:
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True)
        if not matches:
            raise SourceError(
                f"data.source.paths: {pattern!r} matches no file (from {os.getcwd()}); correct it or leave it out"
            )
        is_pattern = not os.path.lexists(expanded)
        found.update(match for match in matches if not (is_pattern and os.path.isdir(match)))
    if not found:
        raise SourceError(f"data.source.paths: {cfg.paths} match folders only; name files, for example with /**/*.txt")
    return sorted((path, path) for path in found)


def _read(file: File) -> bytes:
    try:
        payload = Path(file.path).read_bytes()
    except OSError as error:
        raise SourceError(
            f"{file.path} cannot be read: {error.strerror}; repair it or leave it out of data.source"
        ) from None
    if len(payload) != file.n_bytes:
        raise SourceError(
            f"{file.path} had {file.n_bytes} bytes when it was listed and has {len(payload)} now; let nothing write "
            "to the source while it is prepared, delete the unfinished corpus folder and start again"
        )
    return payload


def _not_utf8(file: File, payload: bytes, error: UnicodeDecodeError) -> str:
    if payload.startswith(b"\x1f\x8b"):
        return f"{file.path} is compressed with gzip; unpack it first (gunzip -k) and name the unpacked file"
    return (
        f"{file.path}: byte {error.start} (0x{payload[error.start]:02X}) is not UTF-8 ({error.reason}); convert the "
        "file, for example with iconv -f latin1 -t utf-8, or leave it out of data.source.paths"
    )
