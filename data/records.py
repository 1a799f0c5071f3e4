"""Small files of records, read whole: rows of TSV, CSV, JSON lines or parquet, and sentences of CoNLL files.

TSV has no quotes. CSV has those of spreadsheets, and line breaks inside them. CoNLL: a word a line with its columns,
by white space, a blank line between sentences; lines that begin with -DOCSTART- are passed over.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from data.errors import DataError
from data.files import HEAD, Damaged, File, list_paths, open_file, packing_of, stat, unpacked
from data.task import Column, Format

_ENDINGS: dict[str, Format] = {
    ".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".conll": "conll", ".bio": "conll", ".iob": "conll", ".txt": "conll",
}  # fmt: skip
_PACKED = (".gz", ".zst")
_MARK = "\ufeff"


class RecordError(DataError):
    """A file, a line or a field that is not what the task needs; the message begins with where."""


class Record(NamedTuple):
    where: str  # "path, line 7" or "path, row 7"
    values: list[Any]  # of the columns asked for


def read_records(
    paths: list[str], columns_of: Callable[[Format], list[Column]], fmt: Format | None, allowed: tuple[Format, ...]
) -> Iterator[Record]:
    """The records of all files, in order. Of CoNLL a record is a sentence, and each column a list.

    columns_of: those to read of a file, by its format.    fmt: of all files; None: by their names, one of `allowed`.
    Raises RecordError, or SourceError for what cannot be found or read.
    """
    for path in list_paths(paths, {}):
        found = fmt or _format_of(path, allowed)
        columns = columns_of(found)
        if found == "parquet":
            yield from _parquet(path, columns)
        else:
            read = {"tsv": _rows, "csv": _rows, "jsonl": _json, "conll": _sentences}[found]
            yield from read(path, _text(path), columns, found)


def text_lines(path: str) -> Iterator[tuple[str, str]]:
    """Where and what each line of a text file is, empty ones too. Raises as read_records."""
    for found in list_paths([path], {}):
        for number, line in enumerate(_text(found).removesuffix("\n").split("\n"), 1):
            yield f"{found}, line {number}", line.removesuffix("\r")


def _format_of(path: str, allowed: tuple[Format, ...]) -> Format:
    name = path.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    found = _ENDINGS.get(os.path.splitext(name)[1])
    if found not in allowed:
        wrong = "its name does not say what it is" if found is None else f"a {found} file cannot hold what is read"
        endings = ", ".join(end for end, of in _ENDINGS.items() if of in allowed)
        raise RecordError(
            f"{path}: {wrong}; expected one that ends with {endings}; a recipe may say task.format instead, one of "
            f"{', '.join(allowed)}"
        )
    return found


def _text(path: str) -> str:
    n_bytes, stamp = stat(path, {})
    with open_file(path, {}) as stream:
        head = stream.read(HEAD)
        stream.seek(0)
        packing, problem = packing_of(path, head)
        if problem:
            raise RecordError(f"{path} {problem}")
        try:
            with closing(unpacked(stream, File(path, path, n_bytes, stamp, n_bytes, 1, packing))) as parts:
                payload = b"".join(parts)
        except Damaged as damage:
            raise RecordError(f"{path}: the packed file {damage}; fetch or pack it again") from None
    try:
        return payload.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        raise RecordError(
            f"{path}, line {line}: 0x{payload[error.start]:02X} is not UTF-8 ({error.reason}); convert the file, for "
            "example with iconv -f gb18030 -t utf-8"
        ) from None


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(path: str, text: str, columns: list[Column], fmt: Format) -> Iterator[Record]:
    rows = _split_tabs(text) if fmt == "tsv" else _split_csv(path, text)
    names: list[str] | None = None
    for line, row in rows:
        where = f"{path}, line {line}"
        if names is None and any(isinstance(column, str) for column in columns):
            names = row
            _check_names(path, names, columns)
            continue
        if names is not None and len(row) != len(names):
            raise RecordError(f"{where} has {len(row)} columns; expected {len(names)}: {', '.join(names)}")
        at = [names.index(c) if names is not None and isinstance(c, str) else int(c) for c in columns]
        yield Record(where, [_at(row, column, where) for column in at])


def _split_tabs(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r").split("\t")


def _split_csv(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}, line {line}: is no row of CSV ({error}); mend its quotes") from None


def _check_names(path: str, names: list[str], columns: list[Column]) -> None:
    for column in columns:
        if isinstance(column, str) and names.count(column) != 1:
            raise RecordError(
                f"{path}, line 1: has {names.count(column)} columns {column!r}; expected one, and there are "
                f"{', '.join(repr(name[:40]) for name in names[:20])}. Name another with task.text and task.label; "
                "(launcher/label.py: --field); where the first line is no line of names, give numbers, from 0"
            )


def _at(row: list[str], column: int, where: str) -> str:
    if not -len(row) <= column < len(row):
        raise RecordError(f"{where} has {len(row)} columns; expected one of number {column} (counted from 0)")
    return row[column]


# -- sentences ---------------------------------------------------------------------------------------------------------


def _sentences(path: str, text: str, columns: list[Column], fmt: Format) -> Iterator[Record]:
    if named := [column for column in columns if isinstance(column, str)]:
        raise RecordError(f"{path}: columns of conll files are numbers, from 0 (-1: the last); got {named[0]!r}")
    first, words = 0, list[list[str]]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        row = line.split()
        if not row or row[0] == "-DOCSTART-":
            if words:
                yield Record(f"{path}, line {first}", [list(column) for column in zip(*words, strict=True)])
            words = []
            continue
        first = first if words else number
        where = f"{path}, line {number}"
        if len(row) < 2:
            raise RecordError(f"{where} has one column, {row[0]!r}; expected a word and its tag")
        words.append([_at(row, int(column), where) for column in columns])


# -- objects -----------------------------------------------------------------------------------------------------------


def _json(path: str, text: str, columns: list[Column], fmt: Format) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: is not JSON ({error}); expected an object a line") from None
        if not isinstance(record, dict):
            raise RecordError(f"{where}: is {type(record).__name__}; expected an object with {_names(columns)}")
        for column in columns:
            if column not in record:
                has = ", ".join(map(repr, list(record)[:20])) or "nothing"
                raise RecordError(
                    f"{where}: there is no field {column!r}, there is {has}; name one in the task section (or by --field)"
                )
        yield Record(where, [record[column] for column in columns])


def _names(columns: list[Column]) -> str:
    return " and ".join(map(repr, columns))


def _parquet(path: str, columns: list[Column]) -> Iterator[Record]:
    import pyarrow as pa  # threads of its own, that a run on other files has no use for
    import pyarrow.parquet as pq

    with open_file(path, {}) as stream:
        try:
            table = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
            names = table.schema_arrow.names
            for column in columns:
                if names.count(column) != 1:
                    raise RecordError(
                        f"{path}: has {names.count(column)} columns {column!r}; expected one, and there are "
                        f"{', '.join(map(repr, names[:20]))}; name one in the task section (or by --field)"
                    )
            row = 0
            for batch in table.iter_batches(columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    yield Record(f"{path}, row {row}", [record[column] for column in columns])
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise RecordError(f"{path} is no whole parquet file ({error}); fetch or write it again") from None
