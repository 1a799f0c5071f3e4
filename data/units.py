"""What prepare's worker processes do with a unit: mark it for cleaning, draw text for the tokenizer, make its shards.

Everything here is a pure function of unit and options, whoever works and however it is cut into batches. The module
imports neither the config nor torch, so that a worker starts fast and stays small.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from pydantic import BaseModel, NonNegativeInt

from data.bulk_encode import Bulk
from data.clean import CleanConfig, CleanError, Mark, Marker, filter_verdict, mark, verdicts
from data.errors import DataError
from data.manifest import ShardEntry, Split
from data.shards import Shard, ShardWriter, bin_path, idx_path, token_dtype
from data.sources import Bad, Document, Skipped, Unit, documents
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train
from data.workers import Report

TOKENIZER = "tokenizer"
RECORDS = "records"
CLEAN = "clean"
BATCH_BYTES = 2**20  # of text that is encoded at a time
BATCH_DOCUMENTS = 2**13  # or so many; tiny ones weigh more than their text
REPORT_EVERY_S = 0.1  # from a worker to the progress bar
ROLL_FACTOR = 2  # a shard of more than so many times data.shard_bytes of text goes on in a further part


class PrepareError(DataError):
    """A corpus folder that cannot be used for what is asked, or text that cannot be prepared as asked."""


class BadDocument(BaseModel, frozen=True, extra="forbid"):
    """A malformed document that was left out."""

    name: str
    reason: str
    message: str


class UnitRecord(BaseModel, frozen=True, extra="forbid"):
    """What a unit became."""

    shards: dict[Split, tuple[ShardEntry, ...]]  # none for a split that got no document
    left_out: dict[str, NonNegativeInt]  # documents, by reason
    unknown_tokens: NonNegativeInt
    bad: tuple[BadDocument, ...]


class Pair(NamedTuple):
    """A .bin/.idx pair of Megatron-LM's, which is used where it lies."""

    source: str
    number: int
    n_bytes: int  # of the .bin
    folder: str  # that the source's shards are named from
    name: str


class Rules(NamedTuple):
    """What becomes of a document, for all units alike."""

    seed: int
    valid_fraction: float
    clean: CleanConfig
    max_bad: int | None  # malformed documents that may be left out; None: not one


class UnitTask(NamedTuple):
    """All that a worker needs to mark a unit or to make its shards."""

    folder: Path
    unit: Unit | Pair
    rules: Rules
    roll_bytes: int  # of text, from which on a split of the unit goes on in a further shard
    bulk: Bulk  # see data.tokenizer.TokenizerConfig


class Draw(NamedTuple):
    """Units of one source that the tokenizer is trained on."""

    units: tuple[Unit, ...]
    train_bytes: int


class TrainTask(NamedTuple):
    """All that a worker needs to train the tokenizer."""

    folder: Path
    draws: tuple[Draw, ...]
    tokenizer: TokenizerConfig
    rules: Rules


class Batch(NamedTuple):
    """Texts of documents that follow each other."""

    texts: list[str]
    payloads: list[bytes]  # the same in UTF-8


def held_out(text: bytes, seed: int, valid_fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a hash of its UTF-8 text and the seed, below the fraction."""
    return xxhash.xxh3_64_intdigest(text, seed=seed) < int(valid_fraction * 2**64)


# -- the tasks ---------------------------------------------------------------------------------------------------------


def mark_unit(task: UnitTask, tell: Report) -> list[BadDocument]:
    """Mark a unit's documents for the decision on duplicates. Returns the malformed ones. Runs in a worker."""
    assert isinstance(task.unit, Unit)
    rules, bad = task.rules, list[BadDocument]()
    prefix = clean_prefix(task.folder, task.unit)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    marker = Marker(prefix, rules.clean)
    for batch in batches(_sound(task.unit, rules, Counter(), bad), tell):
        marker.add(batch.texts, (_mark(*document, rules) for document in zip(*batch, strict=True)))
    marker.close()
    return bad


def _mark(text: str, payload: bytes, rules: Rules) -> Mark:
    return mark(text, payload, held_out(payload, rules.seed, rules.valid_fraction), rules.clean)


def train_tokenizer(task: TrainTask, _: Report) -> None:
    """Train on kept documents that are not held out. Runs in a worker."""

    def texts(units: Iterable[Unit]) -> Iterator[str]:
        for unit in units:
            for text in kept(task.folder.parent, unit, task.rules, Counter(), []):
                if text is not None and not held_out(text.encode(), task.rules.seed, task.rules.valid_fraction):
                    yield text

    train([(texts(draw.units), draw.train_bytes) for draw in task.draws], task.folder, task.tokenizer)


def make_shards(task: UnitTask, tell: Report) -> UnitRecord:
    """Tokenize a unit's documents into its shards, or look at a pair's tokens, and record it. Runs in a worker."""
    tokenizer = load_cached(task.folder / TOKENIZER, task.bulk)
    if isinstance(task.unit, Pair):
        record = _examine(task.unit, tokenizer, tell)
    else:
        record = _tokenize(task, task.unit, tokenizer, tell)
    write_record(task.folder, task.unit, record)
    return record


def _tokenize(task: UnitTask, unit: Unit, tokenizer: Tokenizer, tell: Report) -> UnitRecord:
    left_out: Counter[str] = Counter()
    bad: list[BadDocument] = []
    unknown = 0
    with ExitStack() as stack:
        splits: dict[Split, _Parts] = {}
        for batch in batches(kept(task.folder, unit, task.rules, left_out, bad), tell):
            encoded = tokenizer.encode_batch(batch.texts)
            unknown += tokenizer.unknowns(np.concatenate(encoded))
            for payload, ids in zip(batch.payloads, encoded, strict=True):
                split: Split = "valid" if held_out(payload, task.rules.seed, task.rules.valid_fraction) else "train"
                if split not in splits:
                    splits[split] = stack.enter_context(_Parts(task, split, tokenizer))
                splits[split].add(ids, len(payload))
        shards = {split: splits[split].close() for split in sorted(splits)}
    return UnitRecord(shards=shards, left_out=dict(sorted(left_out.items())), unknown_tokens=unknown, bad=tuple(bad))


def _examine(pair: Pair, tokenizer: Tokenizer, tell: Report) -> UnitRecord:
    """Hash both files and look at every token: an id beyond the vocabulary would index past the model's embedding."""
    prefix = Path(pair.folder, pair.name)
    shard = Shard(prefix)
    digest, step = xxhash.xxh3_64(), 2**20
    for start in range(0, shard.n_tokens, step):
        tokens = shard.read(start, min(step, shard.n_tokens - start))
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
            raise PrepareError(
                f"source {pair.source!r}: {bin_path(prefix)} has tokens from {tokens.min()} to {tokens.max()}, the "
                f"tokenizer in {tokenizer.folder} has {tokenizer.vocab_size}; set data.tokenizer.path to the tokenizer "
                "that made these tokens"
            )
        digest.update(tokens.tobytes())
        tell(0, tokens.nbytes)
    index = idx_path(prefix).read_bytes()
    entry = ShardEntry(
        name=pair.name,
        tokens=shard.n_tokens,
        documents=shard.n_documents,
        bytes=0,
        bin_bytes=shard.n_tokens * shard.dtype.itemsize,
        idx_bytes=len(index),
        bin_xxh3=digest.hexdigest(),
        idx_xxh3=xxhash.xxh3_64_hexdigest(index),
    )
    return UnitRecord(shards={"train": (entry,)}, left_out={}, unknown_tokens=0, bad=())


class _Parts:
    """The shards of one split of a unit: mostly one, a further one whenever the last is full."""

    def __init__(self, task: UnitTask, split: Split, tokenizer: Tokenizer) -> None:
        self._task, self._split = task, split
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eos = np.array([tokenizer.eos_id], dtype=np.int32)
        self._done: list[ShardEntry] = []
        self._open()

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        if self._bytes and self._bytes + n_bytes > self._task.roll_bytes:
            self._finish()
            self._open()
        self._writer.add(np.concatenate([ids, self._eos]))
        self._bytes += n_bytes

    def close(self) -> tuple[ShardEntry, ...]:
        self._finish()
        return tuple(self._done)

    def _open(self) -> None:
        unit = self._task.unit
        self._name = f"{unit.source}/{self._split}-{unit.number:05d}-{len(self._done):03d}"
        prefix = self._task.folder / self._name
        prefix.parent.mkdir(exist_ok=True)
        self._writer, self._bytes = ShardWriter(prefix, self._dtype), 0

    def _finish(self) -> None:
        self._done.append(ShardEntry(name=self._name, bytes=self._bytes, **self._writer.close()._asdict()))

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._writer.discard()


# -- documents ---------------------------------------------------------------------------------------------------------


def kept(
    folder: Path, unit: Unit, rules: Rules, left_out: Counter[str], bad: list[BadDocument]
) -> Iterator[str | None]:
    """Of each of a unit's documents the text, or None when it is left out; why is counted and listed on the way.

    Raises PrepareError for a malformed document where the rules allow for none, or for no further one.
    """
    clean = rules.clean
    if not clean.two_passes:
        for text in _sound(unit, rules, left_out, bad):
            verdict = filter_verdict(text, clean) if text is not None and clean.filters else 0
            if verdict:
                left_out[clean.reason(verdict)] += 1
            yield None if verdict else text
        return
    decided = verdicts(clean_prefix(folder, unit))
    number = 0
    for text in _sound(unit, rules, left_out, bad):
        if text is not None:
            verdict = int(decided[number]) if number < len(decided) else 0
            number += 1
            if verdict:
                left_out[clean.reason(verdict)] += 1
                text = None
        yield text
    if number != len(decided):
        raise CleanError(
            f"unit {unit.number} of {unit.source} had {len(decided)} documents when duplicates were looked for and has "
            f"{number} now; let nothing write to the source while it is prepared, delete {folder} and start again"
        )


def _sound(unit: Unit, rules: Rules, left_out: Counter[str], bad: list[BadDocument]) -> Iterator[str | None]:
    """The unit's texts; None for what the source itself leaves out and for what is malformed."""
    for document in documents(unit):
        if isinstance(document, Document):
            yield document.text
            continue
        if isinstance(document, Skipped):
            left_out[document.reason] += 1
        else:
            _tolerate(document, unit, rules, len(bad))
            left_out[f"bad:{document.reason}"] += 1
            bad.append(BadDocument(**document._asdict()))
        yield None


def _tolerate(document: Bad, unit: Unit, rules: Rules, n_before: int) -> None:
    if rules.max_bad is None:
        raise PrepareError(stop_message(unit.source, document.message))
    if n_before >= rules.max_bad:
        raise PrepareError(too_many_message(n_before + 1, rules.max_bad, unit.source, document.message))


def stop_message(source: str, message: str) -> str:
    return f"source {source!r}: {message}\nTo leave such documents out and list them in bad.jsonl: data.on_bad=skip"


def too_many_message(count: int, max_bad: int, source: str, message: str) -> str:
    return (
        f"at least {count:,} malformed documents, more than data.max_bad={max_bad:,}; the last one found, of source "
        f"{source!r}: {message}\nRepair the text, or set data.max_bad higher"
    )


def batches(texts: Iterable[str | None], tell: Report) -> Iterator[Batch]:
    """Texts in batches of some BATCH_BYTES, without those that are None; tells (documents, bytes) now and then."""
    batch, size = Batch([], []), 0
    due, n_documents, n_bytes = time.perf_counter() + REPORT_EVERY_S, 0, 0
    for text in texts:
        n_documents += 1
        if text is not None:
            payload = text.encode()
            batch.texts.append(text)
            batch.payloads.append(payload)
            size += len(payload)
            n_bytes += len(payload)
        if size >= BATCH_BYTES or len(batch.texts) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = Batch([], []), 0
        if time.perf_counter() > due:
            tell(n_documents, n_bytes)
            due, n_documents, n_bytes = time.perf_counter() + REPORT_EVERY_S, 0, 0
    if batch.texts:
        yield batch
    tell(n_documents, n_bytes)


# -- files -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_cached(folder: Path, bulk: Bulk) -> Tokenizer:
    """The tokenizer, read once in a worker's life."""
    return load_tokenizer(folder, bulk)


def record_path(folder: Path, unit: Unit | Pair) -> Path:
    """Where the record of a unit lies."""
    return folder / RECORDS / unit.source / f"{unit.number:05d}.json"


def clean_prefix(folder: Path, unit: Unit | Pair) -> Path:
    """Prefix of the files that the decision on a unit's duplicates needs and leaves."""
    return folder / CLEAN / unit.source / f"{unit.number:05d}"


def write_record(folder: Path, unit: Unit | Pair, record: UnitRecord) -> None:
    """Say that a unit is done; after its shards."""
    path = record_path(folder, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, record.model_dump_json(indent=1).encode() + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or absent: under a staging name, on disk, then renamed."""
    staging = path.with_name(path.name + ".tmp")
    with open(staging, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)
