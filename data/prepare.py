"""Text to a prepared corpus: units of all sources become token shards, on all cores and nodes, the same bytes each time.

CORPUS/
  plan.json                 what was asked for and the listing of the sources; a folder begun with another is refused
  clean/SOURCE/00003.*      which documents of unit 3 are left out, where duplicates are looked for (data/clean.py)
  tokenizer/                trained on the training documents, or a copy of the one named
  SOURCE/train-00003-000.bin .idx, valid-...    the documents of unit 3; a further part where there were more than thought
  records/SOURCE/00003.json what unit 3 became, written after its shards: the unit is done
  bad.jsonl, report.json    malformed documents, where some were left out; what the corpus holds
  manifest.json             written last; a folder without it is not a corpus

A document is held out by a hash of its text, so that equal documents fall on the same side whatever the source's order.
Several processes, each with its part of the units, write the same corpus as one: see data/plan.py.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data.clean import decide, forget, is_marked
from data.config import DataConfig
from data.corpus import open_shard, read_manifest, shard_files
from data.layout import count_best_fit
from data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, Split, SplitEntry, TokenizerEntry
from data.masking import masking_ids
from data.plan import PLAN, Part, check_folder, check_plan, others_at_work, step, working
from data.prepared import Pairs, Prepared, open_corpus, open_pairs, tokenizer_of
from data.progress import progress
from data.report import numbers, report
from data.shards import Shard, token_dtype
from data.sources import CorpusConfig, Limits, MegatronConfig, Source, Unit, open_source
from data.store import is_url, open_store
from data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from data.units import (
    CLEAN,
    ROLL_FACTOR,
    TOKENIZER,
    BadDocument,
    Draw,
    Pair,
    PrepareError,
    Rules,
    TrainTask,
    UnitRecord,
    UnitTask,
    clean_prefix,
    held_out,
    make_shards,
    mark_unit,
    record_path,
    stop_message,
    too_many_message,
    train_tokenizer,
    write_bytes,
)
from data.workers import cores, run_tasks

__all__ = ["Part", "PrepareError", "held_out", "prepare", "prepare_part", "report", "unfinished"]

log = logging.getLogger(__name__)

BAD = "bad.jsonl"
REPORT = "report.json"
DECIDED = "decided.json"
PART_START_S = 60.0  # the parts of one job do not all start at the same moment
PART_POLL_S = 0.2  # between looks whether other parts have marked their units
TRAIN_READ_FACTOR = 8  # a tokenizer's sample is drawn from at most so many times its own size of text


Key = tuple[str, int]  # of a unit: source and number


class Work(NamedTuple):
    """What a call has to do."""

    cfg: DataConfig
    folder: Path
    part: Part
    rules: Rules
    sources: dict[str, Source | Pairs | Prepared]  # in the config's order
    units: list[Unit | Pair]  # of all sources

    @property
    def own(self) -> list[Unit | Pair]:
        """The units of this part."""
        return self.units[self.part.number :: self.part.of]


def prepare(cfg: DataConfig) -> Manifest:
    """Make the corpus that cfg asks for, or go on with it, or find it finished. Returns its manifest.

    Starts worker processes: a script that calls this needs the usual `if __name__ == "__main__"`.
    Raises a DataError (PrepareError, SourceError, TokenizerError, CorpusError, CleanError, StoreError) for what the user
    can put right, OSError for the disk, data.workers.WorkerDied when a worker is killed. Finished shards stay for the
    next time in every case.
    """
    manifest = prepare_part(cfg, Part())
    assert manifest is not None, "the only part finds all units done"
    return manifest


def prepare_part(cfg: DataConfig, part: Part, seq_len: int | None = None) -> Manifest | None:
    """Do one part's share of prepare, several processes at a time; None when units of other parts are still missing.

    seq_len: of the run; with data.packing=best_fit the windows of this length are counted, too.
    Every part must be started with the same cfg. The corpus is that of one process to the last byte, and its manifest is
    written by whichever part finds all units done.
    """
    folder = Path(cfg.corpus)
    with ExitStack() as stack:
        prepared, chosen, options = _asked(cfg, stack)
        if (manifest := _finished_corpus(cfg, folder, options)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with working(folder, part):
                manifest = _prepare(_work(cfg, folder, part, prepared), options, chosen)
        else:
            log.info("%s is finished; nothing to do", folder)
    if manifest is not None and seq_len is not None and cfg.packing == "best_fit":
        _count_windows(cfg, folder, manifest, seq_len)
    return manifest


def unfinished(cfg: DataConfig) -> int | None:
    """How many units the corpus that cfg asks for has, None where it is finished. Writes nothing; raises as prepare does."""
    with ExitStack() as stack:
        prepared, _, options = _asked(cfg, stack)
        if _finished_corpus(cfg, Path(cfg.corpus), options) is not None:
            return None
        work = _work(cfg, Path(cfg.corpus), Part(), prepared)
        if (work.folder / PLAN).is_file():
            check_plan(work.folder, options, _listings(work))
        return len(work.units)


def _prepare(work: Work, options: dict[str, Any], chosen: Tokenizer | None) -> Manifest | None:
    folder, cfg = work.folder, work.cfg
    with step(folder, "which writes the plan"):
        check_plan(folder, options, _listings(work))
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            if not _lost_files(folder, manifest):  # another part has just finished it
                return manifest
            (folder / MANIFEST).unlink()
    if work.part.of == 1:
        _remove_leftovers(folder)
    if cfg.clean.two_passes and not _find_duplicates(work):
        return None
    with step(folder, "which makes the tokenizer"):
        tokenizer = _tokenizer(work, chosen)
    records = _make_shards(work)
    if missing := [number for number, unit in enumerate(work.units) if _key(unit) not in records]:
        _say_missing(work, missing)
        return None
    with step(folder, "which writes the manifest"):
        if (folder / MANIFEST).is_file():
            return read_manifest(folder)
        manifest = _manifest(work, tokenizer, records)
        _remove_leftovers(folder)
        for unit in work.units:
            forget(clean_prefix(folder, unit))
        _write_bad(work, records)
        write_bytes(folder / REPORT, json.dumps(numbers(manifest), indent=1).encode() + b"\n")
        write_bytes(folder / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


# -- what is asked for -------------------------------------------------------------------------------------------------


def _asked(cfg: DataConfig, stack: ExitStack) -> tuple[dict[str, Prepared], Tokenizer | None, dict[str, Any]]:
    """Sources that are corpora, the tokenizer that is named, and what the bytes depend on."""
    if is_url(cfg.corpus):
        raise PrepareError(
            f"data.corpus={cfg.corpus} is a URL, and prepare writes to a folder; prepare with data.corpus=FOLDER, copy it "
            f"there (aws s3 sync FOLDER {cfg.corpus}, gsutil rsync -r, or whatever the store has), and start runs with "
            f"data.corpus={cfg.corpus}"
        )
    cfg.clean.check_installed()
    prepared = {
        source.label: open_corpus(source, cfg.cache) for source in cfg.sources if isinstance(source, CorpusConfig)
    }
    chosen = _chosen_tokenizer(cfg, prepared, stack)
    check_folder(Path(cfg.corpus))
    return prepared, chosen, _options(cfg, chosen)


def _chosen_tokenizer(cfg: DataConfig, prepared: dict[str, Prepared], stack: ExitStack) -> Tokenizer | None:
    """The existing tokenizer that config or sources name, if they name one; None: train one.

    Raises PrepareError when two of them differ, its size is not the one asked for, or there is no text to train one on.
    """
    named = {name: source.manifest.tokenizer.fingerprint for name, source in prepared.items()}
    if cfg.tokenizer.path is not None:
        tokenizer = open_tokenizer(cfg.tokenizer)
        where = f"data.tokenizer.path={cfg.tokenizer.path}"
    elif prepared:
        where, first = next((f"source {name!r} ({source.location})", source) for name, source in prepared.items())
        tokenizer = stack.enter_context(tokenizer_of(first, cfg.cache))
    elif not cfg.text_sources:
        raise PrepareError(
            "data.sources has tokens alone and nothing says which tokenizer made them; set data.tokenizer.path"
        )
    elif any(isinstance(source, MegatronConfig) for source in cfg.sources):
        raise PrepareError(
            "data.sources has a megatron source, whose tokens belong to a tokenizer that exists already; set "
            "data.tokenizer.path to it"
        )
    else:
        return None
    for name, fingerprint in named.items():
        if fingerprint != tokenizer.fingerprint:
            raise PrepareError(
                f"source {name!r} ({prepared[name].location}) was made with the tokenizer {fingerprint}, {where} has "
                f"{tokenizer.fingerprint}; one corpus has one tokenizer: leave one of them out, or prepare its text again"
            )
    asked = "vocab_size" in cfg.tokenizer.model_fields_set or cfg.tokenizer.path is not None
    if asked and cfg.tokenizer.vocab_size != tokenizer.vocab_size:
        raise PrepareError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but the tokenizer of {where} has "
            f"{tokenizer.vocab_size}; set data.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    if cfg.masking is not None:
        masking_ids(tokenizer)  # raises what a run would be refused for
    return tokenizer


def _options(cfg: DataConfig, chosen: Tokenizer | None) -> dict[str, Any]:
    """What the bytes of a corpus depend on besides the text.

    Where it lies, who works on it, and whether malformed documents stop the work do not belong to it, nor does anything
    that is for a run to choose: weights can be changed without preparing anything again. (A tokenizer that is trained
    here is trained on a sample by weight; it stays as it is.)
    """
    options = cfg.model_dump(
        mode="json", include={"tokenizer", "shard_bytes", "valid_fraction", "seed", "max_document_bytes", "clean"}
    )
    options["order"] = [source.label for source in cfg.sources]
    options["sources"] = {
        source.label: source.model_dump(mode="json", exclude={"name", "weight", "max_epochs", "storage_options"})
        for source in cfg.sources
    }
    del options["tokenizer"]["bulk"]  # the ids are the same
    for key in ("mask_token", "add_tokens"):  # as in corpora that were prepared before these were keys
        if options["tokenizer"][key] is None:
            del options["tokenizer"][key]
    if chosen is not None:
        options["tokenizer"] = {"vocab_size": chosen.vocab_size, "fingerprint": chosen.fingerprint}
    return options


def _finished_corpus(cfg: DataConfig, folder: Path, options: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished corpus with nothing missing; its text may be gone."""
    if not (folder / MANIFEST).is_file():
        return None
    check_plan(folder, options, listing=None)
    manifest = read_manifest(folder)
    if lost := _lost_files(folder, manifest):
        log.warning("%s: %d files are missing or of the wrong size, as %s; their shards are made again",
                    folder, len(lost), lost[0])  # fmt: skip
        return None
    if (folder / BAD).is_file():
        with open(folder / BAD, encoding="utf-8", errors="replace") as stream:
            for count, line in enumerate(stream, 1):
                _check_bad(cfg, count, *_listed(folder / BAD, line))
    return manifest


def _listed(path: Path, line: str) -> tuple[str, list[BadDocument]]:
    """The source and the document of a line of bad.jsonl."""
    try:
        listed = json.loads(line)
        return listed.pop("source"), [BadDocument(**listed)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete {path.parent / MANIFEST}, and it is written again"
        ) from None


def _work(cfg: DataConfig, folder: Path, part: Part, prepared: dict[str, Prepared]) -> Work:
    """List the sources and cut them into units."""
    limits = Limits(cfg.max_document_bytes)
    sources: dict[str, Source | Pairs | Prepared] = {}
    for source in cfg.sources:
        if isinstance(source, CorpusConfig):
            sources[source.label] = prepared[source.label]
        elif isinstance(source, MegatronConfig):
            sources[source.label] = open_pairs(source)
        else:
            sources[source.label] = open_source(source, limits)
    units: list[Unit | Pair] = []
    for opened in sources.values():
        if not isinstance(opened, Prepared):
            units += opened.units(cfg.shard_bytes)
    rules = Rules(cfg.seed, cfg.valid_fraction, cfg.clean, cfg.max_bad if cfg.on_bad == "skip" else None)
    return Work(cfg, folder, part, rules, sources, units)


def _listings(work: Work) -> dict[str, Any]:
    return {name: {**source.describe(), "fingerprint": source.fingerprint} for name, source in work.sources.items()}


def _remove_leftovers(folder: Path) -> None:
    """Files under staging names, left by a process that was killed. No part may be writing."""
    for leftover in folder.rglob("*.tmp"):
        if leftover.is_file() and TOKENIZER not in leftover.relative_to(folder).parts[0]:
            leftover.unlink(missing_ok=True)


# -- duplicates --------------------------------------------------------------------------------------------------------


def _find_duplicates(work: Work) -> bool:
    """Mark this part's units, and decide once all are marked. False when no part is at work on those that are missing."""
    decided = work.folder / CLEAN / DECIDED
    if decided.is_file():
        return True
    texts = [unit for unit in work.units if isinstance(unit, Unit)]
    waiting = [unit for unit in work.own if isinstance(unit, Unit) and not _is_marked(work, unit)]
    log.info("looking for duplicates: %d of %d units are to be marked here", len(waiting), len(texts))
    n_bad = 0
    for unit, bad in _run(work, mark_unit, waiting):
        n_bad += len(bad)
        _check_bad(work.cfg, n_bad, unit.source, bad)
    seen = time.monotonic()  # all whose units are missing at work
    while not decided.is_file():
        busy = others_at_work(
            work.folder, work.part
        )  # before the look at what is missing: who ends has marked its units
        missing = [n for n, unit in enumerate(work.units) if isinstance(unit, Unit) and not _is_marked(work, unit)]
        if not missing:
            with step(work.folder, "which decides on duplicates"):
                _decide(work, texts)
            continue
        absent = sorted({number % work.part.of for number in missing} - set(busy))
        seen = seen if absent else time.monotonic()
        if time.monotonic() - seen > PART_START_S:
            log.info("%d of %d units are not yet marked for the search for duplicates, and no process is at work on part "
                     "%s; start it, and then this one again",
                     len(missing), len(texts), ", ".join(map(str, absent)))  # fmt: skip
            return False
        time.sleep(PART_POLL_S)
    return True


def _is_marked(work: Work, unit: Unit) -> bool:
    return is_marked(clean_prefix(work.folder, unit))


def _decide(work: Work, texts: Sequence[Unit]) -> None:
    decided = work.folder / CLEAN / DECIDED
    if decided.is_file():
        return
    began = time.perf_counter()
    prefixes = [clean_prefix(work.folder, unit) for unit in texts]
    decide(prefixes, work.cfg.clean)
    write_bytes(decided, json.dumps({"units": len(texts)}).encode() + b"\n")
    log.info("decided on duplicates in %.1f s", time.perf_counter() - began)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(work: Work, chosen: Tokenizer | None) -> Tokenizer:
    """The corpus's tokenizer: the one an earlier start left, a copy of the chosen one, or a newly trained one."""
    path = work.folder / TOKENIZER
    cfg = work.cfg.tokenizer
    if chosen is not None and not path.exists():
        chosen.save(path)
    if path.exists():
        return load_tokenizer(path, cfg.bulk)
    log.info("training a %s tokenizer of %d pieces on at most %.0f MiB of text",
             cfg.model_type, cfg.vocab_size, cfg.train_bytes / 2**20)  # fmt: skip
    began = time.perf_counter()
    task = TrainTask(path, _draws(work), cfg, work.rules)
    # in a process of its own: SentencePiece cannot be interrupted, and may end the process that it runs in
    for _ in run_tasks(train_tokenizer, [task], 1, on_report=_no_report):
        log.info("tokenizer trained in %.1f s", time.perf_counter() - began)
    return load_tokenizer(path, cfg.bulk)


def _draws(work: Work) -> tuple[Draw, ...]:
    """What to train on: of each source so many bytes as its weight says, or its size where there are no weights.

    A source with less text than that gives all it has, and the sample is smaller. Of a large source units at equal
    distances are read, not all.
    """
    texts = {name: source for name, source in work.sources.items() if isinstance(source, Source)}
    weights = {source.label: source.weight for source in work.cfg.sources if source.label in texts}
    shares = [weights[name] or float(source.n_bytes) for name, source in texts.items()]
    ends = [round(work.cfg.tokenizer.train_bytes * share / sum(shares)) for share in accumulate(shares)]
    draws = []
    for (name, source), begin, end in zip(texts.items(), [0, *ends], ends, strict=False):
        budget = end - begin
        stride = max(1, source.n_bytes // (TRAIN_READ_FACTOR * max(budget, 1)))
        units = [unit for unit in work.units if isinstance(unit, Unit) and unit.source == name]
        draws.append(Draw(tuple(units[::stride]), budget))
    return tuple(draws)


def _no_report(*_: int) -> None:
    """Training says nothing on the way."""


# -- the shards --------------------------------------------------------------------------------------------------------


def _make_shards(work: Work) -> dict[Key, UnitRecord]:
    """Do this part's units. Returns the records that are there afterwards, of all parts."""
    own = {_key(unit): record for unit in work.own if (record := _finished(work.folder, unit)) is not None}
    waiting = [unit for unit in work.own if _key(unit) not in own]
    if own:
        log.info("%d of %d units are finished already", len(own), len(work.own))
    n_bad = 0
    for (source, _), record in own.items():
        n_bad += len(record.bad)
        _check_bad(work.cfg, n_bad, source, record.bad)
    for unit, record in _run(work, make_shards, waiting):
        own[_key(unit)] = record
        n_bad += len(record.bad)
        _check_bad(work.cfg, n_bad, unit.source, record.bad)
    if work.part.of == 1:
        return own
    found = {_key(unit): record for unit in work.units if (record := _finished(work.folder, unit)) is not None}
    n_bad = 0
    for (source, _), record in found.items():
        n_bad += len(record.bad)
        _check_bad(work.cfg, n_bad, source, record.bad)
    return found


def _run(
    work: Work, task: Callable[[UnitTask, Any], Any], units: Sequence[Unit | Pair]
) -> Iterator[tuple[Unit | Pair, Any]]:
    """(unit, result) of a task for all units in worker processes, the largest first, with a progress bar."""
    ordered = sorted(units, key=lambda unit: -unit.n_bytes)
    tasks = [
        UnitTask(work.folder, unit, work.rules, ROLL_FACTOR * work.cfg.shard_bytes, work.cfg.tokenizer.bulk)
        for unit in ordered
    ]
    with progress(total=sum(unit.n_bytes for unit in units)) as advance:
        for done, result in run_tasks(task, tasks, work.cfg.workers or cores(), on_report=advance):
            yield done.unit, result


def _key(unit: Unit | Pair) -> Key:
    return unit.source, unit.number


def _check_bad(cfg: DataConfig, count: int, source: str, bad: Sequence[BadDocument]) -> None:
    """Refuse malformed documents where none are allowed or, with all of them so far, too many; bad: the latest.

    Once enough are found the corpus cannot come to be, whoever finds them and in which order.
    """
    if bad and cfg.on_bad == "stop":
        raise PrepareError(stop_message(source, bad[0].message))
    if bad and count > cfg.max_bad:
        raise PrepareError(too_many_message(count, cfg.max_bad, source, bad[-1].message))


def _finished(folder: Path, unit: Unit | Pair) -> UnitRecord | None:
    """The unit's record, if there is one and its shards are there in their full size."""
    path = record_path(folder, unit)
    if not path.is_file():
        return None
    try:
        record = UnitRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        log.warning("%s is damaged; the unit is done again", path)
        return None
    place = Path(unit.folder) if isinstance(unit, Pair) else folder
    if any(lost for shards in record.shards.values() for shard in shards for lost in _lost(place, shard)):
        return None
    return record


def _lost(folder: Path, shard: ShardEntry) -> list[Path]:
    return [file for file, size in shard_files(folder, shard) if not file.is_file() or file.stat().st_size != size]


def _lost_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of a finished corpus that are missing or of another size; those at URLs are not looked at."""
    return [
        file
        for source in manifest.sources.values()
        if source.folder is None or not is_url(source.folder)
        for split in source.splits.values()
        for shard in split.shards
        for file in _lost(Path(source.folder or folder), shard)
    ]


def _say_missing(work: Work, missing: Sequence[int]) -> None:
    parts = sorted({number % work.part.of for number in missing})
    busy = others_at_work(work.folder, work.part)
    idle = [str(part) for part in parts if part not in busy]
    log.info(
        "part %d/%d is done; %d of %d units of other parts are still missing%s. The part that finishes last writes the "
        "manifest",
        work.part.number, work.part.of, len(missing), len(work.units),
        f", and no process is at work on part {', '.join(idle)}: start it" if idle else "",
    )  # fmt: skip


# -- the manifest ------------------------------------------------------------------------------------------------------


def _manifest(work: Work, tokenizer: Tokenizer, records: dict[Key, UnitRecord]) -> Manifest:
    entries = {}
    for name, source in work.sources.items():
        if isinstance(source, Prepared):
            entries[name] = source.entry
        else:
            own = [records[_key(unit)] for unit in work.units if unit.source == name]
            entries[name] = _entry(work.cfg, source, own)
    if work.cfg.valid_fraction > 0 and work.cfg.text_sources:
        without = [name for name, entry in entries.items() if "valid" not in entry.splits]
        if len(without) == len(entries):
            documents = sum(entry.splits["train"].documents for entry in entries.values())
            raise PrepareError(_no_document(work.cfg, f"of {documents}", "valid"))
        if without:
            log.warning("no document of %s is held out, so that there is no validation loss of it", ", ".join(without))
    return Manifest(
        tokenizer=TokenizerEntry(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        ),
        dtype=token_dtype(tokenizer.vocab_size).name,
        seed=work.cfg.seed,
        sources=entries,
    )


def _entry(cfg: DataConfig, source: Source | Pairs, records: Sequence[UnitRecord]) -> SourceEntry:
    """Raises PrepareError when no document is left to train on."""
    left_out: Counter[str] = Counter()
    for record in records:
        left_out.update(record.left_out)
    splits: dict[Split, SplitEntry] = {}
    for split in ("train", "valid"):
        shards = tuple(shard for record in records for shard in record.shards.get(split, ()))
        if shards:
            splits[split] = SplitEntry(shards=shards)
    if "train" not in splits:
        if "valid" in splits:
            raise PrepareError(_no_document(cfg, f"of {splits['valid'].documents} of source {source.name!r}", "train"))
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
        raise PrepareError(
            f"all {left_out.total():,} documents of source {source.name!r} are left out ({why}); leave it out of "
            f"data.sources or change what is left out (data.clean, data.on_bad), and delete {cfg.corpus}"
        )
    return SourceEntry(
        kind=source.kind,
        folder=source.folder if isinstance(source, Pairs) else None,
        about=source.describe(),
        left_out=dict(sorted(left_out.items())),
        unknown_tokens=sum(record.unknown_tokens for record in records),
        splits=splits,
    )


def _no_document(cfg: DataConfig, of_what: str, split: Split) -> str:
    return (
        f"no document {of_what} fell into the {split} split with data.valid_fraction={cfg.valid_fraction} and "
        f"data.seed={cfg.seed}: too few documents for it. Use more documents (a text file is one), another data.seed, or a "
        f"data.valid_fraction nearer to 0.5 (0 for no held-out split), and delete {cfg.corpus}"
    )


def _write_bad(work: Work, records: dict[Key, UnitRecord]) -> None:
    """List the malformed documents that were left out, a JSON object a line, in the order of the sources."""
    lines = [
        json.dumps({"source": unit.source, **bad.model_dump()}, ensure_ascii=False) + "\n"
        for unit in work.units
        for bad in records[_key(unit)].bad
    ]
    if lines:
        write_bytes(work.folder / BAD, "".join(lines).encode(errors="backslashreplace"))
    else:
        (work.folder / BAD).unlink(missing_ok=True)


def _count_windows(cfg: DataConfig, folder: Path, manifest: Manifest, seq_len: int) -> None:
    """Write how many windows of seq_len tokens each block packs into, which a run needs to know before it starts."""
    with ExitStack() as stores:
        places = {
            name: stores.enter_context(open_store(source.folder or folder, cfg.cache))
            for name, source in manifest.sources.items()
        }
        leases = stores.enter_context(ExitStack())

        def open_next(source: str, entry: ShardEntry) -> Shard:
            leases.close()  # one shard at a time
            shard, lease = open_shard(places[source], entry)
            leases.enter_context(lease)
            return shard

        with step(folder, "which counts the windows of best_fit"):
            count_best_fit(folder, manifest, seq_len, open_next)
