"""Text to a prepared corpus: units of a source become token shards, on all cores, resumable, the same bytes every time.

CORPUS/
  plan.json          what was asked for and the listing of the source; a folder begun with another plan is refused
  tokenizer/         trained on the training documents, or a copy of the one named
  train-00003.bin .idx, valid-00003.bin .idx    the documents of unit 3
  records/00003.json what unit 3 became, written after its shards: the unit is done
  manifest.json      written last; a folder without it is not a corpus

A document is held out by a hash of its text, so that equal documents fall on the same side whatever the source's order.
"""

import fcntl
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import xxhash
from pydantic import BaseModel, NonNegativeInt, ValidationError
from tqdm import tqdm

from data.config import DataConfig
from data.corpus import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ShardEntry,
    Split,
    SplitEntry,
    TokenizerEntry,
    read_manifest,
    shard_files,
)
from data.errors import DataError
from data.shards import ShardWriter, token_dtype
from data.sources import Skipped, Source, Unit, documents, open_source
from data.tokenizer import Tokenizer, TokenizerConfig, train
from data.workers import Report, run_tasks

log = logging.getLogger(__name__)

PLAN = "plan.json"
LOCK = ".lock"
RECORDS = "records"
TOKENIZER = "tokenizer"
REPORT_EVERY_S = 0.1  # from a worker to the progress bar
LOCK_WAIT_S = 3.0  # the processes of a preparation just killed may be a moment in ending
LINE_EVERY_S = 5.0  # where there is no terminal to draw a bar on
TRAIN_READ_FACTOR = 8  # a tokenizer's sample is drawn from at most so many times its own size of text


class PrepareError(DataError):
    """A corpus folder that cannot be used for what is asked, or a source that cannot be split as asked."""


class UnitRecord(BaseModel, frozen=True, extra="forbid"):
    """What a unit became."""

    shards: dict[Split, ShardEntry]  # none for a split that got no document
    skipped: dict[str, NonNegativeInt]


class UnitTask(NamedTuple):
    """All that a worker needs to make a unit's shards."""

    folder: Path
    unit: Unit
    seed: int
    valid_fraction: float


class TrainTask(NamedTuple):
    """All that a worker needs to train the tokenizer."""

    folder: Path
    unit: Unit
    tokenizer: TokenizerConfig
    seed: int
    valid_fraction: float


def prepare(cfg: DataConfig) -> Manifest:
    """Make the corpus that cfg asks for, or go on with it, or find it finished. Returns its manifest.

    Starts worker processes: a script that calls this needs the usual `if __name__ == "__main__"`.
    Raises a DataError (PrepareError, SourceError, TokenizerError, CorpusError) for what the user can put right, OSError
    for the disk, data.workers.WorkerDied when a worker is killed. Finished shards stay for the next time in every case.
    """
    folder = Path(cfg.corpus)
    chosen = _chosen_tokenizer(cfg)
    options = _options(cfg, chosen)
    _check_folder(folder)
    if (folder / MANIFEST).is_file():
        _check_plan(folder, options, source=None)
        manifest = read_manifest(folder)
        if not (lost := _lost_files(folder, manifest)):
            log.info("%s is finished; nothing to do", folder)
            return manifest
        log.warning("%s: %d files are missing or of the wrong size, as %s; their shards are made again",
                    folder, len(lost), lost[0])  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        source = open_source(cfg.source)
        _check_plan(folder, options, source)
        (folder / MANIFEST).unlink(missing_ok=True)
        for leftover in folder.glob("*.tmp"):
            if leftover.is_file():
                leftover.unlink()
        tokenizer = _tokenizer(cfg, folder, source, chosen)
        records = _make_shards(cfg, folder, source.units(cfg.shard_bytes))
        manifest = _manifest(cfg, source, tokenizer, records)
        _write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def report(manifest: Manifest) -> str:
    """Documents, bytes, tokens and bytes a token of each split, and what was left out, as a table."""
    rows: list[tuple[str, ...]] = [("split", "documents", "bytes", "tokens", "bytes/token")]
    for name, split in manifest.splits.items():
        counts = (f"{count:,}" for count in (split.documents, split.bytes, split.tokens))
        rows.append((name, *counts, f"{split.bytes / max(split.tokens, 1):.3f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.skipped.items()))
    return "\n".join([*lines, f"left out: {skipped or 'none'}"])


# -- the plan ----------------------------------------------------------------------------------------------------------


def _chosen_tokenizer(cfg: DataConfig) -> Tokenizer | None:
    """The existing tokenizer that the config names, if it names one."""
    if cfg.tokenizer.path is None:
        return None
    tokenizer = Tokenizer.load(cfg.tokenizer.path)
    if tokenizer.vocab_size != cfg.tokenizer.vocab_size:
        raise PrepareError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but the tokenizer in {cfg.tokenizer.path} has "
            f"{tokenizer.vocab_size}; set data.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _options(cfg: DataConfig, chosen: Tokenizer | None) -> dict[str, Any]:
    """What the bytes of a corpus depend on besides the text. Where it lies and who works on it do not belong to it."""
    options = cfg.model_dump(mode="json", exclude={"corpus", "workers"})
    if chosen is not None:
        options["tokenizer"] = {"vocab_size": chosen.vocab_size, "fingerprint": chosen.fingerprint}
    return options


def _check_folder(folder: Path) -> None:
    """Refuse a place that is neither new nor a corpus folder, before anything is written to it."""
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"data.corpus={folder} is a file; name a folder, which is made if it does not exist")
    if folder.is_dir() and not (folder / PLAN).is_file():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, f"{PLAN}.tmp"))
        if strangers:
            raise PrepareError(
                f"{folder} holds other things ({', '.join(strangers[:3])}) and no {PLAN}; set data.corpus to a folder "
                "that is empty or does not exist"
            )


def _check_plan(folder: Path, options: dict[str, Any], source: Source | None) -> None:
    """Compare with the plan that the folder was begun with; in an empty folder, write it.

    source: None when the corpus is finished and its text may be gone; then the listing is not compared.
    """
    path = folder / PLAN
    if not path.is_file():
        assert source is not None, "_check_folder lets no manifest without a plan through"
        _write_json(path, {"format_version": FORMAT_VERSION, "options": options, "listing": _listing(source)})
        return
    try:
        plan = json.loads(path.read_bytes())
        before = {"format_version": plan["format_version"], **_flat({"data": plan["options"]})}
        listing = plan["listing"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{path} is damaged ({error!r}); delete {folder} and prepare it again") from None
    now = {"format_version": FORMAT_VERSION, **_flat({"data": options})}
    if source is not None:
        before, now = before | _flat({"source": listing}), now | _flat({"source": _listing(source)})
    differs = [
        f"  {key}: {before.get(key, 'not set')} in the folder, {now.get(key, 'not set')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differs:
        raise PrepareError(
            "\n".join([f"{folder} was begun with other options or other text, and the two are never mixed:", *differs])
            + "\nput these back, set data.corpus to another folder, or delete this one"
        )


def _listing(source: Source) -> dict[str, Any]:
    return {**source.describe(), "files": source.fingerprint}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time; the lock ends with the process, however it ends."""
    give_up = time.monotonic() + LOCK_WAIT_S
    with open(folder / LOCK, "w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise PrepareError(
                        f"{folder} is being prepared by another process; wait for it, or stop it first"
                    ) from None
                time.sleep(0.05)
        yield


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(cfg: DataConfig, folder: Path, source: Source, chosen: Tokenizer | None) -> Tokenizer:
    """The corpus's tokenizer: the one an earlier start left, a copy of the chosen one, or a newly trained one."""
    path = folder / TOKENIZER
    if path.exists():
        return Tokenizer.load(path)
    if chosen is not None:
        chosen.save(path)
        return Tokenizer.load(path)
    log.info("training a %s tokenizer of %d pieces on at most %.0f MiB of text",
             cfg.tokenizer.model_type, cfg.tokenizer.vocab_size, cfg.tokenizer.train_bytes / 2**20)  # fmt: skip
    began = time.perf_counter()
    stride = max(1, source.n_bytes // (TRAIN_READ_FACTOR * cfg.tokenizer.train_bytes))
    unit = Unit(0, source.files[::stride], source.skip_undecodable)
    task = TrainTask(path, unit, cfg.tokenizer, cfg.seed, cfg.valid_fraction)
    # in a process of its own: SentencePiece cannot be interrupted, and may end the process that it runs in
    for _ in run_tasks(train_tokenizer, [task], 1, on_report=_no_report):
        log.info("tokenizer trained in %.1f s", time.perf_counter() - began)
    return Tokenizer.load(path)


def train_tokenizer(task: TrainTask, _: Report) -> None:
    """Train on documents that are not held out. Runs in a worker."""
    texts = (
        document.text
        for document in documents(task.unit)
        if not isinstance(document, Skipped) and not held_out(document.text.encode(), task.seed, task.valid_fraction)
    )
    train(texts, task.folder, task.tokenizer)


def _no_report(*_: int) -> None:
    """Training says nothing on the way."""


# -- the shards --------------------------------------------------------------------------------------------------------


def held_out(text: bytes, seed: int, valid_fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a hash of its UTF-8 text and the seed, below the fraction."""
    return xxhash.xxh3_64_intdigest(text, seed=seed) < int(valid_fraction * 2**64)


def _make_shards(cfg: DataConfig, folder: Path, units: list[Unit]) -> list[UnitRecord]:
    """The records of all units, in order; those that an earlier start finished are taken as they are."""
    (folder / RECORDS).mkdir(exist_ok=True)
    records = {unit.number: record for unit in units if (record := _finished(folder, unit)) is not None}
    waiting = [unit for unit in units if unit.number not in records]
    if records:
        log.info("%d of %d shards are finished already", len(records), len(units))
    tasks = [UnitTask(folder, unit, cfg.seed, cfg.valid_fraction) for unit in waiting]
    with _progress(total=sum(unit.n_bytes for unit in waiting)) as advance:
        for task, record in run_tasks(make_shards, tasks, cfg.workers or _cores(), on_report=advance):
            records[task.unit.number] = record
    return [records[unit.number] for unit in units]


def make_shards(task: UnitTask, tell: Report) -> UnitRecord:
    """Tokenize a unit's documents into its shards and record them. Runs in a worker."""
    tokenizer = _load_tokenizer(task.folder / TOKENIZER)
    dtype = token_dtype(tokenizer.vocab_size)
    eos = np.array([tokenizer.eos_id], dtype=np.int32)
    skipped: Counter[str] = Counter()
    text_bytes: Counter[Split] = Counter()
    with ExitStack() as stack:
        writers: dict[Split, ShardWriter] = {}
        due, n_documents, n_bytes = time.perf_counter() + REPORT_EVERY_S, 0, 0
        for document in documents(task.unit):
            n_documents += 1
            if isinstance(document, Skipped):
                skipped[document.reason] += 1
                continue
            text = document.text.encode()
            split: Split = "valid" if held_out(text, task.seed, task.valid_fraction) else "train"
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(task.folder / _shard_name(split, task.unit), dtype))
            writers[split].add(np.concatenate([tokenizer.encode(document.text), eos]))
            text_bytes[split] += len(text)
            n_bytes += len(text)
            if time.perf_counter() > due:
                tell(n_documents, n_bytes)
                due, n_documents, n_bytes = time.perf_counter() + REPORT_EVERY_S, 0, 0
        tell(n_documents, n_bytes)
        shards = {
            split: ShardEntry(
                name=_shard_name(split, task.unit), bytes=text_bytes[split], **writers[split].close()._asdict()
            )
            for split in sorted(writers)
        }
    record = UnitRecord(shards=shards, skipped=dict(skipped))
    _write_json(_record_path(task.folder, task.unit), record.model_dump(mode="json"))
    return record


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _shard_name(split: Split, unit: Unit) -> str:
    return f"{split}-{unit.number:05d}"


def _record_path(folder: Path, unit: Unit) -> Path:
    return folder / RECORDS / f"{unit.number:05d}.json"


def _finished(folder: Path, unit: Unit) -> UnitRecord | None:
    """The unit's record, if there is one and its shards are there in their full size."""
    path = _record_path(folder, unit)
    if not path.is_file():
        return None
    try:
        record = UnitRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        log.warning("%s is damaged; the unit is done again", path)
        return None
    if any(lost for shard in record.shards.values() for lost in _lost(folder, shard)):
        return None
    return record


def _lost(folder: Path, shard: ShardEntry) -> list[Path]:
    return [file for file, size in shard_files(folder, shard) if not file.is_file() or file.stat().st_size != size]


def _lost_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of a finished corpus that are missing or of another size."""
    return [file for split in manifest.splits.values() for shard in split.shards for file in _lost(folder, shard)]


def _manifest(cfg: DataConfig, source: Source, tokenizer: Tokenizer, records: list[UnitRecord]) -> Manifest:
    wanted: tuple[Split, ...] = get_args(Split) if cfg.valid_fraction > 0 else ("train",)
    splits = {
        split: SplitEntry(shards=tuple(record.shards[split] for record in records if split in record.shards))
        for split in wanted
    }
    n_documents = sum(split.documents for split in splits.values())
    for name, split in splits.items():
        if not split.documents:
            raise PrepareError(
                f"no document of {n_documents} fell into the {name} split with data.valid_fraction={cfg.valid_fraction}"
                f" and data.seed={cfg.seed}: too few documents for it. Use more documents or a data.valid_fraction "
                f"nearer to 0.5 (0 for no held-out split), and delete {cfg.corpus}"
            )
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    return Manifest(
        tokenizer=TokenizerEntry(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        ),
        dtype=token_dtype(tokenizer.vocab_size).name,
        source=source.describe(),
        seed=cfg.seed,
        skipped=dict(skipped),
        splits=splits,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or absent: under a staging name, on disk, then renamed."""
    staging = path.with_name(path.name + ".tmp")
    with open(staging, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)


# -- progress ----------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A function to be told (documents, bytes) done: a bar on a terminal, elsewhere a line every few seconds."""
    done = Counter[str]()
    began = shown = time.perf_counter()
    shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {postfix[0]:,} documents, {rate_fmt}, {remaining} left"
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, bar_format=shape, postfix=[0], disable=quiet) as bar:

        def advance(n_documents: int, n_bytes: int) -> None:
            nonlocal shown
            done.update(documents=n_documents, bytes=n_bytes)
            if not quiet:
                bar.postfix[0] = done["documents"]
                bar.update(n_bytes)
            elif (now := time.perf_counter()) - shown >= LINE_EVERY_S:
                shown = now
                log.info(_progress_line(done["documents"], done["bytes"], total, now - began))

        yield advance


def _progress_line(n_documents: int, n_bytes: int, total: int, seconds: float) -> str:
    rate = n_bytes / seconds
    left_s = max(total - n_bytes, 0) / rate if rate else float("inf")
    return (
        f"{n_bytes / 1e6:.1f} of {total / 1e6:.1f} MB, {n_documents:,} documents, {rate / 1e6:.1f} MB/s, "
        f"{left_s:.0f} s left"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
