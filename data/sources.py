"""Where documents come from. A source lists what there is and cuts it into units before any text is tokenized.

A unit is a run of consecutive documents of about data.shard_bytes; what is made of it does not depend on who works on
it, so that shards do not depend on the number of workers. Units are plain values that travel to worker processes.
"""

import os
import platform
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import xxhash
from pydantic import BaseModel, Field, field_validator, model_validator

from data.files import (
    GZIP,
    HEAD,
    ZSTD,
    File,
    Options,
    SourceError,
    is_remote,
    list_paths,
    map_paths,
    open_file,
    packing_of,
    refusing,
    stat,
    unpacked_size,
)
from data.formats import Bad, Document, Found, Piece, Reader, Skipped, json_lines, parts_of_template, text_file
from data.urls import ENVIRONMENT, secret_options

__all__ = ["Bad", "Document", "Limits", "Skipped", "Source", "SourceConfig", "SourceError", "Unit"]
__all__ += ["documents", "open_source"]

STRIPES = 8  # parts of one packed file that can be worked on at once; each unpacks it all, so more would cost more

Fraction = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Named(BaseModel, frozen=True, extra="forbid", strict=True):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None  # None: its kind
    weight: Fraction | None = (
        None  # share of the mixture, relative to the other sources'; None: none has one, see data.config
    )
    max_epochs: Fraction | None = None  # times that the source may be read at most; None: no limit

    @property
    def label(self) -> str:
        """The name by which everything else calls the source."""
        return self.name or str(self.kind)  # type: ignore[attr-defined]


class _Files(_Named, frozen=True, extra="forbid", strict=True):
    paths: Annotated[list[str], Field(min_length=1)]  # files, globs (** crosses folders) and URLs; each must match
    # of the file system that URLs are on, such as endpoint_url or anon; secrets belong in the environment
    storage_options: Options = {}

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if found := secret_options(self.storage_options):
            raise ValueError(
                f"storage_options has {', '.join(found)}, which would be saved with the run; {ENVIRONMENT}"
            )
        protocols = sorted({path.partition("://")[0] for path in self.paths if is_remote(path)})
        if self.storage_options and len(protocols) != 1:
            names = " and ".join(protocols) or "local files alone"
            raise ValueError(f"storage_options are for one remote file system, paths name {names}; use two sources")
        return self


class _Records(_Named, frozen=True, extra="forbid", strict=True):
    field: Annotated[str, Field(min_length=1)] | None = None  # that holds the text; a.b is the field b of the field a
    template: str | None = None  # or several, such as "{title}\n\n{text}"; {{ and }} stand for braces

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            parts_of_template(template)
        return template

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if (self.field is None) == (self.template is None):
            raise ValueError(
                "exactly one of field (as field: text) and template must be given, to say what the text is"
            )
        if self.field is not None and not all(self.field.split(".")):
            raise ValueError(f"field {self.field!r} has an empty step; write for example text or meta.text")
        return self

    @property
    def parts(self) -> tuple[str | tuple[str, ...], ...]:
        """What a text is made of: literals, and paths of fields."""
        return (tuple((self.field or "").split(".")),) if self.template is None else parts_of_template(self.template)


class EmbeddedConfig(_Named, frozen=True, extra="forbid", strict=True):
    """The .py files of the running Python's standard library, its tests too, without installed packages: some 30 MB."""

    kind: Literal["embedded"] = "embedded"


class TextConfig(_Files, frozen=True, extra="forbid", strict=True):
    """UTF-8 text files, plain or packed with gzip or zstd, one document each."""

    kind: Literal["text"] = "text"


class JsonlConfig(_Files, _Records, frozen=True, extra="forbid", strict=True):
    """JSON lines, plain or packed with gzip or zstd: an object a line, one document each."""

    kind: Literal["jsonl"] = "jsonl"


class ParquetConfig(_Files, _Records, frozen=True, extra="forbid", strict=True):
    """Parquet files, one document a row."""

    kind: Literal["parquet"] = "parquet"


class ArrowConfig(_Files, _Records, frozen=True, extra="forbid", strict=True):
    """Arrow IPC files or streams (the .arrow files of Hugging Face are streams), one document a row."""

    kind: Literal["arrow"] = "arrow"


class DatasetConfig(_Records, frozen=True, extra="forbid", strict=True):
    """A dataset of Hugging Face's library, one document a row."""

    kind: Literal["dataset"] = "dataset"
    path: Annotated[str, Field(min_length=1)]  # name on the hub, or a folder: of data files, or made by save_to_disk
    config: str | None = None  # one of the configurations that the dataset names
    split: Annotated[str, Field(min_length=1)] = "train"
    revision: str | None = None  # commit, branch or tag on the hub; None: the newest


class CorpusConfig(_Named, frozen=True, extra="forbid", strict=True):
    """A folder that launcher/prepare.py has made; its tokens are used as they are."""

    kind: Literal["corpus"] = "corpus"
    path: Annotated[str, Field(min_length=1)]  # the folder, or its URL
    source: str | None = None  # one of its sources by name; None: the only one it has


class MegatronConfig(_Named, frozen=True, extra="forbid", strict=True):
    """Token shards in Megatron-LM's .bin/.idx layout; used as they are."""

    kind: Literal["megatron"] = "megatron"
    prefix: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]  # paths without .bin and .idx

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, prefix: list[str]) -> list[str]:
        for path in prefix:
            if path.endswith((".bin", ".idx")):
                raise ValueError(f"prefix {path!r} has a suffix; write {path[:-4]!r}, which stands for both files")
        if len(set(prefix)) < len(prefix):
            raise ValueError(f"prefix names a path twice: {', '.join(prefix)}; name each once")
        return prefix


FilesConfig = TextConfig | JsonlConfig | ParquetConfig | ArrowConfig
DocumentsConfig = EmbeddedConfig | FilesConfig | DatasetConfig  # the sources that have documents
SourceConfig = Annotated[DocumentsConfig | CorpusConfig | MegatronConfig, Field(discriminator="kind")]


class Limits(NamedTuple):
    """What is refused for its size."""

    max_document_bytes: int = 2**28  # of a text, and of a line of JSON


class Unit(NamedTuple):
    """Consecutive documents: what one worker makes into a shard, or into several if there is more than expected."""

    source: str
    number: int
    n_bytes: int  # of text, about
    pieces: tuple[Piece, ...]
    reader: Reader


@dataclass(frozen=True)
class Source:
    """What is listed of a source, in a fixed order."""

    name: str
    kind: str
    files: tuple[File, ...]
    reader: Reader
    fingerprint: str  # of names, sizes and marks of change: notices a source that changes under a half-made corpus

    @property
    def n_bytes(self) -> int:
        """Bytes of text, of packed and columnar files an estimate."""
        return sum(file.text_bytes for file in self.files)

    def describe(self) -> dict[str, str | int]:
        """What the manifest says of the source."""
        counted = "documents" if self.kind in ("embedded", "text") else "rows" if self.kind == "dataset" else "files"
        number = self.files[0].atoms if self.kind == "dataset" else len(self.files)
        about: dict[str, str | int] = {"kind": self.kind, counted: number, "bytes": self.n_bytes}
        return about | ({"python": platform.python_version()} if self.kind == "embedded" else {})

    def units(self, shard_bytes: int) -> list[Unit]:
        """The documents cut into equal stretches of about shard_bytes; what cannot be cut is where its middle is."""
        groups = cut(self.files, max(1, round(self.n_bytes / shard_bytes)))
        return [
            Unit(self.name, number, sum(piece.n_bytes for piece in pieces), tuple(pieces), self.reader)
            for number, pieces in enumerate(groups)
        ]


def cut(files: tuple[File, ...], count: int) -> list[list[Piece]]:
    """The files' atoms, in order, in at most `count` groups of about equally many bytes of text, none empty."""
    total = sum(file.text_bytes for file in files)
    groups: dict[int, list[Piece]] = {}
    begin = 0
    for file in files:
        size, atoms = file.text_bytes, file.atoms

        def group_of(atom: int, begin: int = begin, size: int = size, atoms: int = atoms) -> int:
            middle = begin + size * (2 * atom + 1) // (2 * atoms)
            return min(middle * count // total, count - 1)

        first = 0
        while first < atoms:
            group = group_of(first)
            stop = bisect_right(range(atoms), group, lo=first, key=group_of)
            n_bytes = size * stop // atoms - size * first // atoms
            groups.setdefault(group, []).append(Piece(file, first, stop, n_bytes))
            first = stop
        begin += size
    return list(groups.values())


def _reader_of(kind: str) -> Callable[[Piece, Reader], Iterator[Found]]:
    """What reads a piece of a source. data/columns.py is imported where columns are read: every process that knows the
    config imports this file, and a rank that trains has no use for pyarrow and its threads."""
    if kind == "jsonl":
        return json_lines
    if kind not in ("parquet", "arrow", "dataset"):
        return text_file
    from data.columns import arrow_rows, dataset_rows, parquet_rows

    return {"parquet": parquet_rows, "arrow": arrow_rows, "dataset": dataset_rows}[kind]


def open_source(cfg: DocumentsConfig, limits: Limits) -> Source:
    """List what a source has. Raises SourceError when nothing matches, cannot be reached or read, or all is empty."""
    parts = () if isinstance(cfg, EmbeddedConfig | TextConfig) else cfg.parts
    options = cfg.storage_options if isinstance(cfg, FilesConfig) else {}
    reader = Reader(cfg.kind, limits.max_document_bytes, parts, options)
    try:
        if isinstance(cfg, DatasetConfig):
            reader = reader._replace(dataset=(cfg.path, cfg.config, cfg.split, cfg.revision))
            from data.columns import list_dataset

            files = [list_dataset(reader)]
        elif isinstance(cfg, EmbeddedConfig):
            files = [_list_file(name, path, reader) for name, path in _list_library()]
        else:
            paths = list_paths(cfg.paths, options)
            files = map_paths(lambda path: _list_file(path, path, reader), paths)
            files = _striped(files) if cfg.kind == "jsonl" else files
        if not any(file.text_bytes for file in files):
            what = f"all {len(files)} files are empty, the first is" if len(files) > 1 else "there is no text in"
            raise SourceError(f"{what} {files[0].path}; name files with text")
    except SourceError as error:
        raise SourceError(f"source {cfg.label!r}: {error}") from None
    digest = xxhash.xxh3_64()
    for file in files:
        digest.update(f"{file.name}\0{file.n_bytes}\0{file.stamp}\n".encode(errors="surrogateescape"))
    return Source(cfg.label, cfg.kind, tuple(files), reader, digest.hexdigest())


def documents(unit: Unit) -> Iterator[Found]:
    """What is in the unit, in order: a pure function of it and of the files.

    Raises SourceError for a file that cannot be read at all, or that changed since it was listed.
    """
    kind = unit.reader.kind
    for piece in unit.pieces:
        if piece.file.problem:
            reason = kind if kind in ("parquet", "arrow") else "compressed"
            yield Bad(piece.file.name, reason, f"{piece.file.path} {piece.file.problem}; nothing of it is read")
        else:
            yield from _reader_of(kind)(piece, unit.reader)


def _list_library() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise SourceError(
            f"{root} has no .py files: this Python comes without the sources of its library; use another Python, or "
            "a source of kind text with files of your own"
        )
    return sorted((path.relative_to(root).as_posix(), str(path)) for path in found)


def _list_file(name: str, path: str, reader: Reader) -> File:
    n_bytes, stamp = stat(path, reader.options)
    if reader.kind == "embedded":
        return File(name, path, n_bytes, stamp, n_bytes, 1)
    file = File(name, path, n_bytes, stamp, n_bytes, n_bytes if reader.kind == "jsonl" else 1)
    if reader.kind in ("parquet", "arrow"):
        from data.columns import list_arrow, list_parquet

        return (list_parquet if reader.kind == "parquet" else list_arrow)(file, reader)
    head = b""
    if n_bytes:
        with open_file(path, reader.options) as stream, refusing(path, "read"):
            head = stream.read(HEAD)
    packing, problem = packing_of(path, head)
    if problem:
        return file._replace(atoms=1, problem=problem)
    if packing:
        return file._replace(atoms=1, packing=packing, text_bytes=unpacked_size(n_bytes, head, packing))
    return file


def _striped(files: list[File]) -> list[File]:
    """Packed files cut into stripes where they are so few that cores would have nothing to do."""
    stripes = -(-STRIPES // max(1, sum(file.packing in (GZIP, ZSTD) for file in files)))
    return [file._replace(atoms=stripes) if file.packing else file for file in files]
