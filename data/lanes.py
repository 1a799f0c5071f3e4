"""Text streamed through Hugging Face datasets, cut into lanes: each an endless, pure sequence of windows.

A dataset is a list of shards: its files, or a parquet file's row groups where there are fewer files than lanes. The
lanes form groups, as many as the largest divisor of data.stream.lanes that is no more than the shards. Group i reads
shards i, i + groups, ...; where several lanes share a group, each keeps every n-th row and reads past the others', so
that a single file is read once by each lane. None of this knows of ranks or workers.

A lane's tokens are those of its documents, each followed by the end-of-document token, epoch after epoch. Its window w
covers tokens w * seq_len to (w + 1) * seq_len inclusive: neighbours share one token, so that every token but the first
is a target once an epoch. A lane of fewer tokens comes round sooner: shards of like size make lanes of like length.

Where a lane stands is a row of a shard and a token in its document: plain integers, counted here. The state_dict of
datasets would not come back sooner (it reads the shard from its beginning as well), and its form is not promised from
one release to the next.
"""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt

from data.errors import DataError
from data.order import permute

log = logging.getLogger(__name__)

_ROWS = 256  # read at a time; at 1 the library's cost per row is larger than the tokenizer's
_BLOCK = 256  # documents a block without shuffling; a block is what a resume reads again, though it tokenizes one
_ENCODE_CHARS = 2**20  # about so much text is encoded at a time
_LISTING_THREADS = 16  # ask for file sizes at the same time: on an object store each takes a round trip
# A mixed column is refused: turned into JSON, its strings would be trained on in quotes.
_OPTIONS = {"json": {"on_mixed_types": None, "parse_agent_traces": False}}


class StreamError(DataError):
    """A stream that cannot be opened or read, or does not fit the run."""


class StreamEnd(StreamError):
    """A lane has given all its epochs."""


class StreamConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Raw text read through datasets in streaming mode, tokenized and packed on the fly."""

    dataset: Annotated[str, Field(min_length=1)]  # json, text, parquet, arrow, csv, ...; or a dataset's name or folder
    # local paths, globs, or URLs that fsspec reads; needed by the format names, optional for a dataset
    data_files: Annotated[list[str], Field(min_length=1)] | None = None
    config_name: str | None = None  # of a dataset that has several configurations
    split: Annotated[str, Field(min_length=1)] = "train"
    field: Annotated[str, Field(min_length=1)] = "text"  # the column of strings that holds a document each
    sample_by: Literal["line", "paragraph", "document"] | None = None  # what a document is; dataset: text, needed there
    tokenizer: Annotated[str, Field(min_length=1)]  # folder: of a prepared corpus's tokenizer, or a Hugging Face one
    # sample g comes from lane g % lanes: fixed for the run, a multiple of every number of ranks it may ever have
    lanes: Annotated[int, Field(ge=1)] = 8
    workers: Annotated[int, Field(ge=0)] = 1  # processes a rank; 0: a thread of the rank reads and tokenizes
    epochs: Annotated[int, Field(ge=1)] | None = None  # times that a lane gives its documents; None: no end
    shuffle_buffer: Annotated[int, Field(ge=0)] = 0  # documents a block, shuffled within it; 0: in the files' order


class LaneState(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where a lane stands: the next window begins with `token` of the document that the other numbers name."""

    lane: NonNegativeInt
    windows: NonNegativeInt = 0  # given so far
    epoch: NonNegativeInt = 0
    shard: NonNegativeInt = 0  # of the lane's
    row: NonNegativeInt = 0  # of the shard: where the document's block begins
    document: NonNegativeInt = 0  # of the block, in the order in which it is given
    token: NonNegativeInt = 0


class Tokenizer(Protocol):
    """What a lane needs of a tokenizer."""

    eos_id: int

    def encode_batch(self, texts: list[str], /) -> list[NDArray[np.int32]]: ...


class Window(NamedTuple):
    """A lane's next seq_len + 1 tokens."""

    tokens: NDArray[np.int32]  # (seq_len + 1,)
    place: str  # which rows of which files they come from


class _Document(NamedTuple):
    state: LaneState  # that begins with its first token
    shard: int  # of the stream
    row: int  # of the shard
    tokens: NDArray[np.int32]  # (n,), the end-of-document token included


@dataclass(frozen=True)
class Stream:
    """An opened dataset."""

    cfg: StreamConfig
    dataset: Any  # datasets.IterableDataset
    names: tuple[str, ...]  # of its shards
    files: str  # names and sizes of the files, as a fingerprint

    @classmethod
    def open(cls, cfg: StreamConfig) -> "Stream":
        """List the files and look at the columns. Raises StreamError when that fails or there is no column of text."""
        if (cfg.dataset == "text") != (cfg.sample_by is not None):
            raise StreamError(
                f"data.stream.dataset={cfg.dataset!r} with sample_by={cfg.sample_by!r}; 'text' needs sample_by: line, "
                "paragraph or document (a file each), and no other dataset takes it"
            )
        try:
            dataset, files = _open(cfg)
            _check_field(dataset.features, cfg)
            names = files if len(files) == dataset.num_shards else [f"shard {i}" for i in range(dataset.num_shards)]
            if dataset.features is not None:
                dataset = dataset.select_columns([cfg.field])
            dataset = dataset.with_format("arrow")
            if dataset.num_shards < cfg.lanes:
                dataset, names = _row_groups(dataset, names)
            fingerprint = _listing(files)
        except DataError:
            raise
        except Exception as error:  # of any kind: the library's own, the file system's, the format's
            raise StreamError(
                f"{_title(cfg)} cannot be opened: {type(error).__name__}: {error}. Check data.stream.dataset, "
                "config_name, split and data_files, and that the place can be reached from here"
            ) from error
        return cls(cfg, dataset, tuple(names), fingerprint)

    @property
    def groups(self) -> int:
        """Sets of lanes that read the same shards."""
        return max(n for n in range(1, self.cfg.lanes + 1) if self.cfg.lanes % n == 0 and n <= len(self.names))

    def lane_shards(self, lane: int) -> range:
        """The numbers of the shards that a lane reads."""
        return range(lane % self.groups, len(self.names), self.groups)

    def texts(self, lane: int, shard: int, first_row: int) -> Generator[tuple[int, str], None, None]:
        """(row, text) of a lane's rows in a shard, from first_row on. Raises StreamError for what cannot be read."""
        stride, offset = self.cfg.lanes // self.groups, lane // self.groups
        begin = 0  # of the table, in rows of the shard
        with closing(self._tables(lane, shard)) as tables:
            for table in tables:
                end = begin + len(table)
                first = max(begin, first_row)
                first += (offset - first) % stride
                if first < end:
                    column = self._column(table, begin, lane, shard)
                    for row in range(first, end, stride):
                        yield row, column[row - begin].as_py()
                begin = end

    def _tables(self, lane: int, shard: int) -> Generator[Any, None, None]:
        rows = 0
        try:
            alone = self.dataset.shard(num_shards=len(self.names), index=shard)
            with closing(alone.iter(batch_size=_ROWS)) as tables:
                for table in tables:
                    yield table
                    rows += len(table)
        except Exception as error:  # of any kind: the library's own, the file system's, the format's
            raise StreamError(
                f"{_title(self.cfg)}, lane {lane}: {self.names[shard]} cannot be read after row {rows}: "
                f"{type(error).__name__}: {error}. Repair the file or take it out of data.stream.data_files and begin a "
                "new run, or prepare the text with launcher/prepare.py and data.on_bad=skip"
            ) from error

    def _column(self, table: Any, begin: int, lane: int, shard: int) -> Any:
        """The text column of a table whose first row is `begin` of the shard."""
        import pyarrow as pa

        where = f"{_title(self.cfg)}, lane {lane}: {self.names[shard]}"
        remedy = "repair the file, or prepare the text with launcher/prepare.py and data.on_bad=skip"
        if self.cfg.field not in table.column_names:
            raise StreamError(
                f"{where} has no field {self.cfg.field!r} at row {begin}; its fields: {', '.join(table.column_names)}. "
                "Set data.stream.field"
            )
        column = table[self.cfg.field]
        if column.null_count:
            row = begin + column.is_null().to_pylist().index(True)
            raise StreamError(
                f"{where}, row {row} (counted from 0): field {self.cfg.field!r} is null or missing, expected text; "
                + remedy
            )
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise StreamError(
                f"{where}, row {begin}: field {self.cfg.field!r} is {column.type}, expected text; {remedy}"
            )
        return column

    def warn(self) -> None:
        """Say what the number of shards makes slow or uneven."""
        lanes, count = self.cfg.lanes, len(self.names)
        if (readers := lanes // self.groups) > 1:
            log.warning(
                "%s has %d shards for %d lanes: each is read %d times over, once a lane, which keeps every %d-th row; "
                "%d files or more would be read once",
                *(_title(self.cfg), count, lanes, readers, readers, lanes),
            )
        if count % self.groups:
            log.warning(
                "%s has %d shards, not a multiple of %d: some lanes get one more than others, so that the others' "
                "documents come round sooner",
                *(_title(self.cfg), count, self.groups),
            )


class Lane:
    """One lane's windows from a state on.  state: where to go on; LaneState(lane=n) is its beginning."""

    def __init__(self, stream: Stream, tokenizer: Tokenizer, seq_len: int, seed: int, state: LaneState) -> None:
        self.state = state
        self._stream, self._tokenizer, self._seq_len, self._seed = stream, tokenizer, seq_len, seed
        self._shards = stream.lane_shards(state.lane)
        self._pending: deque[_Document] = deque()
        self._n_pending = -state.token  # tokens of pending that are not used yet
        self._documents = self._read()

    def window(self) -> Window:
        """The next window.

        Raises StreamEnd when its last epoch has no whole one left, and StreamError when an epoch has none at all, or
        for what cannot be read.
        """
        self.fill()
        tokens = np.empty(self._seq_len + 1, dtype=np.int32)
        places: dict[int, list[int]] = {}
        used, done, token = 0, 0, self.state.token
        for document in self._pending:
            piece = document.tokens[token : token + self._seq_len + 1 - done]
            tokens[done : done + len(piece)] = piece
            places.setdefault(document.shard, []).append(document.row)
            done += len(piece)
            if done > self._seq_len:
                break
            used, token = used + 1, 0
        # The last token is the next window's first: go on there.
        start = token + len(piece) - 1
        for _ in range(used):
            self._pending.popleft()
        self._n_pending -= self._seq_len
        self.state = document.state.model_copy(update={"windows": self.state.windows + 1, "token": start})
        return Window(tokens, f"epoch {document.state.epoch}, {self._describe(places)}")

    def fill(self) -> None:
        """Read as many documents as the next window needs. Raises as window does."""
        while self._n_pending <= self._seq_len:
            document = next(self._documents, None)
            if document is None:
                raise StreamEnd(
                    f"{_title(self._stream.cfg)}: lane {self.state.lane} has given all {self.state.windows} windows of "
                    f"its {self._stream.cfg.epochs} epochs. Set data.stream.epochs higher (null: no end), or fewer "
                    "train.steps"
                )
            self._pending.append(document)
            self._n_pending += len(document.tokens)

    def close(self) -> None:
        """Close the files."""
        self._documents.close()

    def _read(self) -> Generator[_Document, None, None]:
        """The documents from self.state on, epoch after epoch."""
        state = self.state
        while self._stream.cfg.epochs is None or state.epoch < self._stream.cfg.epochs:
            whole = not (state.shard or state.row or state.document)
            n_tokens = 0
            for document in self._read_epoch(state):
                n_tokens += len(document.tokens)
                yield document
            if whole and n_tokens <= self._seq_len:
                names = [self._stream.names[shard] for shard in self._shards]
                raise StreamError(
                    f"{_title(self._stream.cfg)}: lane {state.lane} of {self._stream.cfg.lanes} has {n_tokens} tokens, "
                    f"a window takes {self._seq_len + 1}; it reads {_few(names)}. Use fewer data.stream.lanes, more "
                    "text, or a shorter seq_len"
                )
            state = LaneState(lane=state.lane, epoch=state.epoch + 1)

    def _read_epoch(self, start: LaneState) -> Iterator[_Document]:
        size = self._stream.cfg.shuffle_buffer or _BLOCK
        for number in range(start.shard, len(self._shards)):
            row = start.row if number == start.shard else 0
            with closing(self._stream.texts(start.lane, self._shards[number], row)) as rows:
                while block := list(islice(rows, size)):
                    at = LaneState(lane=start.lane, epoch=start.epoch, shard=number, row=row)
                    first = start.document if (number, row) == (start.shard, start.row) else 0
                    yield from self._encode(at, block, first)
                    row = block[-1][0] + 1

    def _encode(self, at: LaneState, block: list[tuple[int, str]], first: int) -> Iterator[_Document]:
        """A block's documents from the first-th on, in the order in which they are given."""
        order = range(len(block))
        if self._stream.cfg.shuffle_buffer:
            key = xxhash.xxh3_64_intdigest(f"{self._seed}:{at.lane}:{at.epoch}:{at.shard}:{at.row}".encode())
            order = permute(np.arange(len(block)), len(block), key).tolist()
        eos = np.array([self._tokenizer.eos_id], dtype=np.int32)
        shard = self._shards[at.shard]
        wanted = [number for number in range(first, len(block)) if block[order[number]][1]]  # an empty text is none
        for part in _parts(wanted, [len(block[order[number]][1]) for number in wanted]):
            ids = self._tokenizer.encode_batch([block[order[number]][1] for number in part])
            for number, tokens in zip(part, ids, strict=True):
                state = at.model_copy(update={"document": number})
                yield _Document(state, shard, block[order[number]][0], np.concatenate([tokens, eos]))

    def _describe(self, places: dict[int, list[int]]) -> str:
        return ", ".join(
            f"{self._stream.names[shard]} "
            + (f"row {rows[0]}" if len(rows) == 1 else f"rows {min(rows)} to {max(rows)}, {len(rows)} of them")
            for shard, rows in places.items()
        )


def _open(cfg: StreamConfig) -> tuple[Any, list[str]]:
    """The dataset in streaming mode, and its files. Nothing is executed that comes with a dataset."""
    import datasets  # here: a second of start-up that only those who stream need

    options: dict[str, Any] = dict(_OPTIONS.get(cfg.dataset, {}))
    if cfg.sample_by is not None:
        options["sample_by"] = cfg.sample_by
    builder = datasets.load_dataset_builder(
        cfg.dataset,
        cfg.config_name,
        data_files=None if cfg.data_files is None else {cfg.split: cfg.data_files},
        **options,
    )
    files = list((builder.config.data_files or {}).get(cfg.split, []))
    if cfg.data_files is not None and not files:
        raise StreamError(f"no file is named by data.stream.data_files={cfg.data_files}; check the path or the pattern")
    return builder.as_streaming_dataset(split=cfg.split), files


def _check_field(features: Any, cfg: StreamConfig) -> None:
    """features: name -> type; None where the library does not know them before it reads."""
    if features is None:
        return
    if cfg.field not in features:
        raise StreamError(
            f"{_title(cfg)} has no field {cfg.field!r}; its fields: {', '.join(features)}. Set data.stream.field"
        )
    kind = getattr(features[cfg.field], "dtype", type(features[cfg.field]).__name__)
    if kind not in ("string", "large_string"):
        raise StreamError(f"{_title(cfg)}: field {cfg.field!r} is {kind}, expected text. Set data.stream.field")


def _row_groups(dataset: Any, names: list[str]) -> tuple[Any, list[str]]:
    """Each shard cut further where its format allows: parquet at row groups, no other yet."""
    finer: list[str] = []
    for index, name in enumerate(names):
        count = dataset.shard(num_shards=len(names), index=index).reshard().num_shards
        finer += [name] if count == 1 else [f"{name} row group {part}" for part in range(count)]
    return dataset.reshard(), finer


def _listing(files: list[str]) -> str:
    """Names and sizes of the files: how many, how large, and a hash. Not their folder, which may move."""
    from fsspec.core import url_to_fs

    def size(file: str) -> int | None:
        system, path = url_to_fs(file)
        found = system.info(path).get("size")
        return None if found is None else int(found)

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        sizes = list(pool.map(size, files))
    digest = xxhash.xxh3_64()
    for file, n_bytes in zip(files, sizes, strict=True):
        digest.update(f"{os.path.basename(file)}\0{n_bytes}\0".encode())
    return f"{len(files)} files of {sum(n or 0 for n in sizes)} bytes ({digest.hexdigest()})"


def _parts(numbers: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """The numbers in stretches of some _ENCODE_CHARS characters, so that one long document does not wait for others."""
    part: list[int] = []
    total = 0
    for number, length in zip(numbers, lengths, strict=True):
        if part and total + length > _ENCODE_CHARS:
            yield part
            part, total = [], 0
        part.append(number)
        total += length
    if part:
        yield part


def _title(cfg: StreamConfig) -> str:
    files = "" if cfg.data_files is None else f" ({_few(cfg.data_files)})"
    return f"dataset {cfg.dataset}{files}, split {cfg.split}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
