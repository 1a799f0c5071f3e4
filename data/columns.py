"""Documents from columns: a row of parquet, Arrow or a Hugging Face dataset each, and what of them is damaged."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.files import File, SourceError, is_remote, open_file, open_unchanged, refusing
from data.formats import REPAIR, Bad, FieldError, Found, Piece, Reader, judge, text_of

BATCH_BYTES = 2**24  # of text decoded at a time, about
BATCH_ROWS = 1024  # and at most so many rows


# -- parquet -----------------------------------------------------------------------------------------------------------


def list_parquet(file: File, reader: Reader) -> File:
    """The file with its row groups and the size of its text; with its problem where the footer cannot be read."""
    with refusing(file.path, "read"), open_file(file.path, reader.options) as stream:
        try:
            meta = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            what = f"is no whole parquet file ({_damage(error)}); fetch or write it again"
            return file._replace(atoms=1, text_bytes=file.n_bytes, problem=what)
    if not meta.num_rows:
        return file._replace(atoms=0, text_bytes=0)
    size = 0
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size += column.total_uncompressed_size if column.path_in_schema in reader.columns else 0
    return file._replace(atoms=meta.num_row_groups, text_bytes=size or file.n_bytes)


def parquet_rows(piece: Piece, reader: Reader) -> Iterator[Found]:
    """A document a row; a row group that cannot be read is lost from its first damaged page on, the next is tried."""
    file = piece.file
    with refusing(file.path, "read"), open_unchanged(file, reader.options) as stream:
        table = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
        if problem := _wrong_columns(table.schema_arrow, reader):
            if piece.first == 0:  # once a file
                yield _wrong_file(file, problem)
            return
        sizes = [table.metadata.row_group(group).num_rows for group in range(piece.stop)]
        for group in range(piece.first, piece.stop):
            first = row = sum(sizes[:group])
            rows = _rows_at_once(table.metadata.row_group(group).total_byte_size, sizes[group])
            try:
                with closing(
                    table.iter_batches(rows, row_groups=[group], columns=reader.columns, use_threads=False)
                ) as batches:
                    for batch in batches:
                        yield from _rows(batch, file, reader, row)
                        row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                lost = f"{file.path}, row group {group}, row {row}: cannot be read ({_damage(error)})"
                rest = f"rows {row} to {first + sizes[group] - 1} are lost; fetch or write the file again"
                yield Bad(f"{file.path}:{row}", "parquet", f"{lost}; {rest}")


def _rows_at_once(n_bytes: int, n_rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * n_rows // max(n_bytes, 1)))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _damage(error: Exception) -> str:
    """What Arrow says is wrong with a file's contents; any other error, of the disk or the network, is raised again."""
    if not isinstance(error, pa.ArrowException) and (type(error) is not OSError or error.errno is not None):
        raise error
    return _first_line(error)


def _wrong_file(file: File, problem: str) -> Bad:
    return Bad(file.name, "field", f"{file.path}: {problem}; correct field or template of the source, or {REPAIR}")


def _wrong_columns(schema: pa.Schema, reader: Reader) -> str:
    """What keeps the columns asked for from being strings; "" when nothing does."""
    for part in reader.parts:
        if not isinstance(part, tuple):
            continue
        at: Any = schema
        for name in part:
            there = [field.name for field in at] if isinstance(at, pa.Schema) or pa.types.is_struct(at) else []
            if there.count(name) != 1:
                has = ", ".join(map(repr, there[:20])) or "none"
                return f"has {there.count(name)} columns {'.'.join(part)!r}; expected one, and there are: {has}"
            at = at.field(name).type
        kind = at.value_type if pa.types.is_dictionary(at) else at
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            return f"its column {'.'.join(part)!r} is of type {at}; expected strings"
    return ""


def _rows(batch: pa.RecordBatch, file: File, reader: Reader, first: int) -> Iterator[Found]:
    """Documents of a batch whose first row is the file's row `first`."""
    names = list(dict.fromkeys(part[0] for part in reader.parts if isinstance(part, tuple)))
    columns = [_values(batch.column(name)) for name in names]
    for row, values in enumerate(zip(*columns, strict=True), first):
        yield _row(dict(zip(names, values, strict=True)), f"{file.name}:{row}", f"{file.path}, row {row}", reader)


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _row(record: dict[str, Any], name: str, where: str, reader: Reader) -> Found:
    for value in record.values():
        if isinstance(value, UnicodeDecodeError):
            at = f"0x{value.object[value.start]:02X} at byte {value.start} of its text"
            return Bad(name, "utf8", f"{where}: {at} is not UTF-8 ({value.reason}); {REPAIR}")
    try:
        text = text_of(record, reader.parts)
    except FieldError as error:
        return Bad(name, "field", f"{where}: {error}; {REPAIR}, or correct field or template of the source")
    return judge(name, lambda: where, text, reader.limit)


# -- Arrow -------------------------------------------------------------------------------------------------------------

IPC_FILE = b"ARROW1"  # what the file format begins with; the stream format, which Hugging Face writes, with a message


def list_arrow(file: File, reader: Reader) -> File:
    """The file with its number of record batches; a stream that is not on this machine is not cut."""
    size = file.n_bytes
    with refusing(file.path, "read"), ExitStack() as stack:
        try:
            opened = _open_arrow(_arrow_source(stack, file, reader))
        except (pa.ArrowException, OSError) as error:
            what = f"is no whole Arrow file or stream ({_damage(error)}); fetch or write it again"
            return file._replace(atoms=1, text_bytes=size, problem=what)
        if isinstance(opened, pa.ipc.RecordBatchFileReader):
            atoms = opened.num_record_batches
        elif is_remote(file.path):
            atoms = 1
        else:
            atoms = sum(1 for _ in _batches(opened, sys.maxsize))
    return file._replace(atoms=atoms, text_bytes=size if atoms else 0)


def _arrow_source(stack: ExitStack, file: File, reader: Reader) -> Any:
    if is_remote(file.path):
        return pa.PythonFile(stack.enter_context(open_file(file.path, reader.options)), mode="r")
    return stack.enter_context(pa.memory_map(file.path))


def _open_arrow(source: Any) -> Any:
    is_file = source.read(len(IPC_FILE)) == IPC_FILE
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _batches(opened: Any, stop: int) -> Iterator[pa.RecordBatch | Exception]:
    """The first `stop` batches, or what keeps one from being read; a stream ends with the first such."""
    is_file = isinstance(opened, pa.ipc.RecordBatchFileReader)
    for number in range(min(stop, opened.num_record_batches) if is_file else stop):
        try:
            yield opened.get_batch(number) if is_file else opened.read_next_batch()
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            yield error
            if not is_file:
                return


def arrow_rows(piece: Piece, reader: Reader) -> Iterator[Found]:
    """A document a row. A damaged batch of the file format is lost alone, of a stream with all that follows it."""
    file = piece.file
    with refusing(file.path, "read"), open_unchanged(file, reader.options), ExitStack() as stack:
        opened = _open_arrow(_arrow_source(stack, file, reader))
        if problem := _wrong_columns(opened.schema, reader):
            if piece.first == 0:  # once a file
                yield _wrong_file(file, problem)
            return
        is_cut = isinstance(opened, pa.ipc.RecordBatchFileReader) or not is_remote(file.path)
        row = 0
        for number, batch in enumerate(_batches(opened, piece.stop if is_cut else sys.maxsize)):
            if number >= piece.first:
                yield from _of_batch(batch, file, reader, number, row)
            row += 0 if isinstance(batch, Exception) else batch.num_rows


def _of_batch(batch: pa.RecordBatch | Exception, file: File, reader: Reader, number: int, row: int) -> Iterator[Found]:
    try:
        if isinstance(batch, Exception):
            raise batch
        _check_arrow(batch, reader)
    except (pa.ArrowException, OSError) as error:
        lost = "it and, in a stream, all after it" if isinstance(batch, Exception) else "the batch"
        what = f"{file.path}, record batch {number}, row {row}: cannot be read ({_damage(error)})"
        yield Bad(f"{file.path}:{row}", "arrow", f"{what}; {lost} is lost; fetch or write the file again")
        return
    for at in range(0, batch.num_rows, BATCH_ROWS):
        yield from _rows(batch.slice(at, BATCH_ROWS), file, reader, row + at)


def _check_arrow(batch: pa.RecordBatch, reader: Reader) -> None:
    """Raises ArrowInvalid where offsets point outside their buffers: reading such a batch could end the process."""
    for name in {part[0] for part in reader.parts if isinstance(part, tuple)}:
        column = batch.column(name)
        plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column if plain is None else column.view(plain)).validate(full=True)


# -- datasets ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def load(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """A dataset of the library `datasets`, by a name on its hub or the path of a folder."""
    import datasets  # 0.8 s, and only one kind of source needs it

    try:
        if _is_saved(path):
            return _split_of(datasets.load_from_disk(path), path, split)
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except SourceError:
        raise
    except Exception as error:  # of the hub, the network, builders and file systems
        raise SourceError(
            f"dataset {path!r} (config {config!r}, split {split!r}) cannot be loaded: {type(error).__name__}: "
            f"{_first_line(error)}; check its name, and where there is no network load it once where there is one, with "
            "HF_HOME set to a folder that this machine sees"
        ) from None


def _is_saved(path: str) -> bool:
    """Whether save_to_disk wrote the folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _split_of(saved: Any, path: str, split: str) -> Any:
    if isinstance(saved, dict):
        if split not in saved:
            raise SourceError(f"dataset {path!r} has no split {split!r}; it has {', '.join(map(repr, saved))}")
        return saved[split]
    if saved.split is not None and str(saved.split) != split:
        raise SourceError(f"dataset {path!r} is the split {str(saved.split)!r}, not {split!r}; correct split")
    return saved


def list_dataset(reader: Reader) -> File:
    """The dataset as one file whose atoms are rows. Raises SourceError where it cannot be loaded or has no such text."""
    dataset = load(*reader.dataset)
    path = reader.dataset[0]
    if problem := _wrong_columns(dataset.features.arrow_schema, reader):
        raise SourceError(f"dataset {path!r}: {problem}; correct field or template of the source")
    table = dataset.select_columns(_top(reader)).data
    share = len(dataset) / max(table.num_rows, 1)
    return File(path, path, int(table.nbytes * share), dataset._fingerprint, int(table.nbytes * share), len(dataset))


def _top(reader: Reader) -> list[str]:
    return list(dict.fromkeys(part[0] for part in reader.parts if isinstance(part, tuple)))


def dataset_rows(piece: Piece, reader: Reader) -> Iterator[Found]:
    """A document a row."""
    file = piece.file
    dataset = load(*reader.dataset)
    if (dataset._fingerprint, len(dataset)) != (file.stamp, file.atoms):
        raise SourceError(
            f"dataset {file.path!r} is not what it was when it was listed; name its revision, delete the unfinished "
            "corpus folder and start again"
        )
    names = _top(reader)
    dataset = dataset.select_columns(names).with_format("arrow")
    step = _rows_at_once(file.text_bytes, file.atoms)
    for first in range(piece.first, piece.stop, step):
        table = dataset[first : min(first + step, piece.stop)]
        columns = [_values(table.column(name)) for name in names]
        for row, values in enumerate(zip(*columns, strict=True), first):
            yield _row(dict(zip(names, values, strict=True)), f"{file.name}:{row}", f"{file.path}, row {row}", reader)
