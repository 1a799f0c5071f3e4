"""Which documents a step of a run read, and proof that each sample was read once.

    python launcher/audit.py runs/NAME --step 1200             # by rank: source, shard, document, bytes, an excerpt
    python launcher/audit.py runs/NAME --verify                # every step of every start, restarts included

--step works from the order alone and needs the run's folder and its corpus. --verify reads every batch again from the
corpus and compares it with what the ranks wrote down while they trained (runs/NAME/reads). Exit codes: 0 proved; 1 it
is not so, and the message says where; 2 it cannot be looked at.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import SkipConfig
from data.corpus import Piece
from data.dataset import Dataset
from data.errors import DataError
from data.loader import digest
from data.tokenizer import Tokenizer
from launcher.config import ConfigError, FinetuneConfig, RunConfig, validate
from launcher.read_log import path_of, read_records
from launcher.run_dir import Ledger, RunDirError, read_saved_config

EXCERPT = 100  # characters


class AuditError(RuntimeError):
    """The run did not read what its order says, or its records do not tell."""


@dataclass(frozen=True)
class Start:
    """One start of a run, and the steps of it that the run is made of."""

    number: int
    first_step: int  # the first step that it took
    last_step: int  # the last that no later start took again
    taken: int  # the last that it took at all
    dp_size: int
    global_batch_size: int
    micro_batch_size: int
    skip: list[dict[str, Any]]

    def samples_of(self, all_ranks: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
        """A step's samples (G,) -> those of a rank, (A, B)."""
        return all_ranks.reshape(-1, self.dp_size, self.micro_batch_size)[:, rank]


class Run:
    """A run's folder, read for an audit. Raises RunDirError, ConfigError or DataError where it cannot be."""

    def __init__(self, run_dir: Path, corpus: str | None) -> None:
        saved = read_saved_config(run_dir)
        if saved is None:
            raise RunDirError(f"{run_dir} is no run: it has no config.yaml; name a folder such as runs/NAME")
        if corpus is not None:
            saved["data"]["corpus"] = corpus
        self.run_dir = run_dir
        self.cfg: RunConfig = validate(saved, str(run_dir / "config.yaml"))
        if self.cfg.data.stream is not None:
            raise RunDirError(
                f"{run_dir} reads raw text (data.stream), which cannot be read again at any place; audit runs on prepared "
                "corpora"
            )
        if isinstance(self.cfg, FinetuneConfig) and self.cfg.task.kind != "text":
            raise RunDirError(
                f"{run_dir} was fine-tuned on the examples of task.train (task.kind: {self.cfg.task.kind}), which no corpus "
                "holds; audit runs on prepared corpora"
            )
        events = [event for event in Ledger(run_dir).events() if event["event"] == "start" and "cursor" in event]
        if not events:
            raise RunDirError(f"{run_dir}/ledger.jsonl names no start, so nothing has been read yet")
        after = Ledger(run_dir).events()
        after = after[after.index(events[-1]) + 1 :]
        self.told = max(
            [events[-1]["step"], *(event.get("step", 0) for event in after)]
        )  # the step that it has reached
        self.cursor: dict[str, Any] = events[-1]["cursor"]  # it holds the mixtures of all starts before
        self.starts = [self._start(event, events[number + 1 :]) for number, event in enumerate(events)]

    def _start(self, event: dict[str, Any], later: list[dict[str, Any]]) -> Start:
        lengths = [len(read_records(self.run_dir, event["number"], rank)) for rank in range(event["dp_size"])]
        taken = event["step"] + min(lengths)
        return Start(
            number=event["number"],
            first_step=event["step"] + 1,
            last_step=min([taken, *(other["step"] for other in later)]),
            taken=taken,
            dp_size=event["dp_size"],
            global_batch_size=event["global_batch_size"],
            micro_batch_size=event["micro_batch_size"],
            skip=event["skip"],
        )

    def start_of(self, step: int) -> Start:
        """The start whose step became part of the run."""
        for start in self.starts:
            if start.first_step <= step <= start.last_step:
                return start
        last = max((start.last_step for start in self.starts if start.last_step >= start.first_step), default=0)
        raise RunDirError(
            f"{self.run_dir} has no record of step {step}; it has "
            + (f"steps 1 to {last}" if last else f"none at all, though it has taken {self.told} steps")
        )

    def dataset(self, start: Start) -> Dataset:
        """The data as that start had it, with every source that the run has read."""
        skip = [SkipConfig.model_validate(entry) for entry in start.skip]
        data = self.cfg.data.model_copy(update={"skip": skip})
        return Dataset.recall(data, self.cfg.model.seq_len, start.global_batch_size, self.cursor)


def show_step(run: Run, step: int) -> Iterator[str]:
    """The documents that a step read, as lines of text."""
    start = run.start_of(step)
    dataset = run.dataset(start)
    tokenizer = Tokenizer.load(run.run_dir / "tokenizer")
    record = read_records(run.run_dir, start.number, 0)[step - start.first_step]
    samples, after = dataset.take(int(record["first"]), start.global_batch_size)
    yield f"step {step}, by start {start.number}: samples {samples[0]} to {samples[-1]}, {start.dp_size} ranks"
    for rank in range(start.dp_size):
        for a, micro_batch in enumerate(start.samples_of(samples, rank).tolist()):
            for sample in micro_batch:
                source, epoch, pieces = dataset.pieces(sample)
                yield f"rank {rank}, micro-batch {a}, sample {sample}: {source}, epoch {epoch}"
                for piece in pieces:
                    yield f"    {_describe(piece, dataset, source, tokenizer)}"
    yield f"to leave this step out: data.skip='[{{samples: [{record['first']}, {after - 1}]}}]' --allow-change data.skip"


def _describe(piece: Piece, dataset: Dataset, source: str, tokenizer: Tokenizer) -> str:
    ids = dataset.corpora[source].document(piece.shard, piece.document)
    end = piece.first + piece.tokens
    before, through = (len(_text(tokenizer, ids[:stop]).encode()) for stop in (piece.first, end))
    excerpt = _text(tokenizer, ids[piece.first : end])[:EXCERPT]
    return (
        f"{piece.shard} document {piece.document}, tokens {piece.first}-{end - 1} of {len(ids)}, "
        f"bytes {before}-{through}: {excerpt!r}"
    )


def _text(tokenizer: Tokenizer, ids: NDArray[np.int64]) -> str:
    return tokenizer.decode(ids).rstrip("\ufffd")  # a cut may lie inside a character


def verify(run: Run) -> Iterator[str]:
    """Prove the whole run; gives lines that say what was proved. Raises AuditError where it is not so."""
    expected, step, per_source, batches, left_out = 0, 0, Counter[str](), 0, 0
    for start in run.starts:
        if start.last_step < start.first_step:
            yield f"start {start.number}: none of its steps is part of the run"
            continue
        if start.first_step != step + 1:
            raise AuditError(
                f"steps {step + 1} to {start.first_step - 1} are in no start's records; the files in "
                f"{run.run_dir}/reads do not tell what they read"
            )
        dataset = run.dataset(start)
        records = [read_records(run.run_dir, start.number, rank) for rank in range(start.dp_size)]
        for step in range(start.first_step, start.last_step + 1):
            samples, after = dataset.take(expected, start.global_batch_size)
            for rank in range(start.dp_size):
                _check(run, start, step, rank, records[rank][step - start.first_step], (expected, after))
                mine = start.samples_of(samples, rank).ravel()
                if digest(mine, dataset.read(mine).tokens) != int(records[rank][step - start.first_step]["digest"]):
                    raise AuditError(
                        f"step {step}, rank {rank}: what the run read for samples {mine[0]} to {mine[-1]} is not what "
                        "the corpus holds for them now; the corpus or the batch was damaged"
                    )
                batches += 1
            sources, _ = dataset.mixture.locate(samples)
            per_source.update(dataset.mixture.names[source] for source in sources.tolist())
            left_out += after - expected - len(samples)
            expected = after
        again = f", {start.taken - start.last_step} more taken again later" if start.taken > start.last_step else ""
        yield f"start {start.number}: steps {start.first_step} to {start.last_step}, {start.dp_size} ranks{again}"
    if step < run.told:
        raise AuditError(
            f"steps {step + 1} to {run.told} are in no records, but the ledger says that the run has taken them; files of "
            f"{run.run_dir}/reads are gone or cut, so that it cannot be proved what was read"
        )
    total = per_source.total()
    shares = ", ".join(f"{name} {count} ({count / total:.4%})" for name, count in sorted(per_source.items()))
    yield (
        f"proved: {step} steps read {total} samples, each once, none lost; {left_out} left out by data.skip; "
        f"{batches} batches read again are equal"
    )
    yield f"samples by source: {shares}"


def _check(run: Run, start: Start, step: int, rank: int, record: np.void, span: tuple[int, int]) -> None:
    where = f"{path_of(run.run_dir, start.number, rank)}"
    if int(record["step"]) != step:
        raise AuditError(f"{where}: a record of step {record['step']} where step {step} is expected; it is damaged")
    found = (int(record["first"]), int(record["next"]))
    if found != span:
        raise AuditError(
            f"step {step}, rank {rank} read samples {found[0]} to {found[1] - 1}; the next unread ones are {span[0]} to "
            f"{span[1] - 1}: samples were {'lost' if found[0] > span[0] else 'repeated'}"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python launcher/audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="show what this optimizer step read, counted from 1")
    what.add_argument("--verify", action="store_true", help="prove over the whole run that each sample was read once")
    parser.add_argument("--corpus", help="where the corpus lies, if it has moved since")
    args = parser.parse_args(argv)
    try:
        run = Run(args.run, args.corpus)
        for line in verify(run) if args.verify else show_step(run, args.step):
            print(line)
    except AuditError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    except (RunDirError, ConfigError, DataError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
