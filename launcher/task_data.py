"""What a fine-tuning for a task reads: labelled texts or conversations, as batches with an order and a cursor."""

from collections.abc import Callable, Sequence
from typing import Any

from data.config import DataConfig, SkipConfig
from data.errors import DataError
from data.examples import hold_out, shares
from data.loader import IGNORE
from data.records import RecordError
from data.row_loader import RowLoader, RowSet, same_data
from data.tokenizer import Tokenizer
from launcher import reference
from launcher.config import ConfigError, EvalConfig, FinetuneConfig, RunConfig
from launcher.run_data import RunData
from launcher.scores import kinds_of
from launcher.task_config import ChatTask, ClassifyTask, PreferenceTask, TagTask
from launcher.task_examples import Task, encode_task, read_task
from parallel.engine import Engine
from parallel.mesh import Mesh


def open_task_data(
    cfg: FinetuneConfig,
    tokenizer: Tokenizer,
    cursor: dict[str, Any] | None,
    step: int,
    dp_size: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> "TaskData":
    """Open the files of cfg.task; the other arguments as launcher/run_data.py's open_data takes them.

    tokenizer: the origin's. Raises DataError or ConfigError where something does not fit.
    """
    return TaskData(cfg, tokenizer, cursor, left_out)


class TaskData(RunData):
    """The examples of cfg.task in memory, on every rank."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        tokenizer: Tokenizer,
        cursor: dict[str, Any] | None,
        left_out: Sequence[tuple[int, int]],
    ) -> None:
        assert isinstance(cfg.task, Task)
        _refuse_what_is_for_text(cfg)
        self.task, self.tokenizer, self.valid = cfg.task, tokenizer, {}
        self.skip = [SkipConfig(samples=stretch) for stretch in left_out]
        self.rewinds, self._left_out = len(left_out), list(left_out)
        train = read_task(self.task, self.task.train)
        held = read_task(self.task, self.task.valid) if self.task.valid else []
        if self.task.valid_fraction:
            train, held = hold_out(train, self.task.valid_fraction, cfg.data.seed)
            if not train or not held:
                raise ConfigError(
                    f"task.valid_fraction={self.task.valid_fraction} of {len(train) + len(held)} examples leaves "
                    f"{len(train)} to train on and {len(held)} held out; use another fraction or more examples"
                )
        self._examples, self._seen = train, _seen_before(train, held)
        self.rows = self._encode(train, cfg)
        self.held_out: RowSet | None = self._encode(held, cfg) if held else None
        self._identity: dict[str, Any] = {"examples": self.rows.fingerprint(), "rows": len(self.rows.rows)}
        if isinstance(self.task, ClassifyTask | TagTask):
            self._identity["labels"] = list(self.task.labels)
        if cursor is not None:
            _same_labels(cursor, self._identity)
            same_data(cursor, self._identity)
        self._first = 0 if cursor is None else int(cursor["samples"])

    def _encode(self, examples: list[Any], cfg: FinetuneConfig) -> RowSet:
        rows = encode_task(self.task, examples, self.tokenizer, cfg.model)
        if not rows.rows:
            raise RecordError(f"{examples[0].where}: nothing is left to learn or score of this file; {rows.notes}")
        return rows

    def loader(self, cfg: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None) -> RowLoader:
        if cursor is not None:  # of an earlier checkpoint, where the newest was damaged
            same_data(cursor, self._identity)
            self._first = int(cursor["samples"])
        else:
            self._first = 0
        return RowLoader(
            self.rows,
            seed=cfg.data.seed,
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            cursor={"samples": self._first, **self._identity},
            left_out=self._left_out,
        )

    def begin(self, cfg: RunConfig, engine: Engine, cursor: dict[str, Any] | None, enter: Callable[[], None]) -> None:
        """Give the rows of pairs their reference: of the model as it is, before its first step; else as it was kept."""
        if not isinstance(self.task, PreferenceTask):
            return
        sets = {"train": self.rows} | ({} if self.held_out is None else {"valid": self.held_out})
        if cursor is None:
            found = {
                rows.fingerprint(): reference.compute(engine, rows, cfg.train.micro_batch_size, enter)
                for rows in sets.values()
            }
            digest = engine.mesh.broadcast(reference.keep(cfg.run_dir, found) if engine.mesh.rank == 0 else None)
        else:
            found, digest = reference.read(cfg.run_dir, cursor), cursor["reference"]
        for name, rows in sets.items():
            if (fingerprint := rows.fingerprint()) not in found:
                raise DataError(f"{cfg.run_dir / reference.FILE} is not of these {name} pairs; restore task.{name}")
            rows.reference = found[fingerprint]
        self._identity["reference"] = digest

    def shares(self, sample: int) -> dict[str, float]:
        return {}

    def scores(self) -> list[str]:
        if self.held_out is None:
            return []
        if isinstance(self.task, ChatTask):
            return ["loss/valid", "loss/valid_perplexity", "loss/valid_bits_per_byte"]
        if isinstance(self.task, PreferenceTask):
            return ["loss/valid", "valid/preferred", "valid/margin"]
        if isinstance(self.task, TagTask) and (kinds := kinds_of(self.task.labels)):
            of_all = [f"valid/entity_{name}" for name in ("precision", "recall", "f1")]
            return ["loss/valid", "valid/accuracy", *of_all, *(f"valid/entity_f1_{kind}" for kind in kinds)]
        return ["loss/valid", "valid/accuracy", "valid/f1", *(f"valid/f1_{label}" for label in self.task.labels)]

    def announce(self, samples: int) -> tuple[list[str], list[str]]:
        rows = len(self.rows.rows)
        n = len(self._examples) if isinstance(self.task, ChatTask) else rows  # of which several can be in a sequence
        held = 0 if self.held_out is None else len(self.held_out.rows)
        epochs = (self._first + samples) / rows
        targets = sum(int((row.targets != IGNORE).sum()) for row in self.rows.rows)
        what = {"classify": "texts", "tag": "sentences", "chat": "conversations", "preference": "pairs"}[self.task.kind]
        packed = f" in {rows:,} sequences" if rows != n else ""
        lines = [f"{n:,} {what}{packed}, {targets:,} targets; {epochs:.2f} epochs in all (held out: {held:,})"]
        if isinstance(self.task, ClassifyTask):
            lines.append(f"labels: {shares(example.label for example in self._examples)}")
        elif isinstance(self.task, TagTask):
            lines.append(f"tags: {shares(tag for sentence in self._examples for tag in sentence.tags)}")
        warnings = [f"training: {note}" for note in self.rows.notes]
        if self.held_out is None:
            warnings.append("no example is held out, so nothing is evaluated; name files in task.valid, or set "
                            "task.valid_fraction")  # fmt: skip
        else:
            warnings += [f"held out: {note}" for note in self.held_out.notes]
        if self._seen:
            warnings.append(f"{self._seen} of the held-out {what} are in the training files, too")
        return lines, warnings

    def progress(self, samples: int) -> dict[str, float]:
        return {"data/epochs": samples / len(self.rows.rows)}


def _seen_before(train: list[Any], held: list[Any]) -> int:
    """How many of the held-out examples are among those to train on."""
    known = {example.identity for example in train}
    return sum(example.identity in known for example in held)


def _refuse_what_is_for_text(cfg: FinetuneConfig) -> None:
    """Raise ConfigError for keys that would have no effect. Those of a resolved config are set, too, to their defaults."""
    for_all = {"data": ("seed", "tokenizer"), "eval": ("every", "keep_best", "patience")}
    wrong = [
        f"{section}.{key}"
        for section, (given, default) in {"data": (cfg.data, DataConfig()), "eval": (cfg.eval, EvalConfig())}.items()
        for key in type(given).model_fields
        if key not in for_all[section] and getattr(given, key) != getattr(default, key)
    ]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: set, and without effect on task.kind={cfg.task.kind}, which reads the files of task.train "
            "and scores every held-out example; leave them out"
        )


def _same_labels(cursor: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint's head has rows for other labels."""
    if (before := cursor.get("labels")) != (now := expected.get("labels")):
        raise ConfigError(
            f"the run's head has a row for each of the labels {before}, in this order, and task.labels is {now}; set it "
            "back, or use another run.name"
        )
