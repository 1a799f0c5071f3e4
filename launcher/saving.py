"""What a checkpoint of a run holds beside weights and moments, and when one is written, retried, waited for or refused.

The bytes are written by parallel/checkpoint_writer.py, in the format of parallel/checkpoint.py.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from launcher.config import EvalConfig, RunConfig
from launcher.lease import Lease, LeaseLost
from launcher.read_log import ReadLog
from launcher.redaction import hide
from launcher.run_data import AnyLoader
from launcher.run_dir import Ledger
from launcher.trained import Initial
from model.init import initial_values
from parallel.checkpoint import CheckpointError, Manifest, ZeroMoments, committed_steps, newest_good
from parallel.checkpoint_writer import CheckpointWriter, Outcome
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.replicas import check_replicas
from parallel.state import WEIGHT

log = logging.getLogger(__name__)

CLOSE_S = 60.0  # for the save under way when a run breaks; another rank may be gone that it waits for


@dataclass
class Progress:
    """What a run has behind it; saved with every checkpoint."""

    step: int = 0  # optimizer steps, skipped updates included
    tokens: int = 0  # targets trained on
    train_s: float = 0.0  # seconds of steps
    skipped: int = 0  # updates left out
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last good steps: what the next are judged by
    grad_norms: list[float] = field(default_factory=list)
    best: float | None = None  # of eval.keep_best, at any evaluation so far
    best_step: int = 0
    since_best: int = 0  # evaluations

    def note_score(self, scores: dict[str, float], cfg: EvalConfig) -> None:
        """Heed an evaluation of this step: the best one is kept and counted from. One that could not be made is none."""
        if cfg.keep_best is None or (score := scores.get(cfg.keep_best)) is None:
            return
        if math.isfinite(score) and (
            self.best is None or (score < self.best if cfg.lower_is_better else score > self.best)
        ):
            self.best, self.best_step, self.since_best = score, self.step, 0
        else:
            self.since_best += 1

    def at_end(self, cfg: RunConfig) -> bool:
        """Whether no step is to come: all were made, or eval.patience is at its end."""
        patience = cfg.eval.patience
        return self.step >= cfg.train.steps or (patience is not None and self.since_best >= patience)

    def best_of(self, cfg: EvalConfig) -> dict[str, Any]:
        """What the end of a run says of its best checkpoint, and of why it has not all its steps."""
        if cfg.keep_best is None or self.best is None:
            return {}
        told: dict[str, Any] = {"best_step": self.best_step, "best_score": self.best, "best_by": cfg.keep_best}
        if cfg.patience is not None and self.since_best >= cfg.patience:
            told["ended_by"] = f"eval.patience: {cfg.keep_best} was not better in {self.since_best} evaluations"
        return told


def fresh_weights(cfg: RunConfig, mesh: Mesh) -> Initial:
    """Of a model that has learned nothing: a function of run.seed."""
    return Initial(lambda name, shape, start, stop: initial_values(name, shape, cfg.model, cfg.run.seed, start, stop))


def checkpoint_bytes(cfg: RunConfig, build_model: Callable[[RunConfig], nn.Module]) -> int:
    """Of one checkpoint: fp32 weights and two moments of what is trained, and of what is not its weights as they compute."""
    frozen = 4 if cfg.parallel.precision == "fp32" else 2
    with torch.device("meta"):
        return sum(p.numel() * (12 if p.requires_grad else frozen) for p in build_model(cfg).parameters())


def never_saved(cfg: RunConfig, mesh: Mesh) -> bool:
    """Whether a run begins at its first step, as rank 0 sees it."""
    if mesh.rank == 0:
        saved = bool(committed_steps(cfg.run_dir / "checkpoints")) or Ledger(cfg.run_dir).saved_step() is not None
        return bool(mesh.broadcast(not saved))
    return bool(mesh.broadcast(None))


def resume(cfg: RunConfig, engine: Engine, initial: Initial | None) -> tuple[Progress, dict[str, Any] | None]:
    """Load the newest good checkpoint, or initial weights if there was none; returns progress and data cursor.

    initial: None where the run has saved.

    Raises CheckpointError, on all ranks, where the run has saved and nothing of it can be loaded.
    """
    reader = newest_good(cfg.run_dir / "checkpoints", engine.mesh)
    if reader is None:
        ledger = Ledger(cfg.run_dir)
        saved = engine.mesh.broadcast(ledger.saved_step() if engine.mesh.rank == 0 else None)
        if saved is not None or initial is None:
            raise CheckpointError(
                f"{cfg.run_dir / 'checkpoints'} has no checkpoint, yet {ledger.path} tells of one of step {saved}. Restore "
                "it (or mount what it is on), or start a new run under another run.name"
            )
        _begin(engine, initial)
        return Progress(), None
    reader.check_shapes(engine.shapes)
    manifest = reader.manifest
    if not manifest.step:  # of launcher/import_hf.py: weights alone, and nothing read yet
        _begin(engine, Initial(lambda name, _, start, stop: reader.read(name, WEIGHT, start, stop)))
        log.info("begun with the weights of %s", reader.path)
        return Progress(), None
    engine.load_state(reader, manifest.adam_steps, manifest.loss_scaler)
    log.info("resumed from %s, written by %d ranks with ZeRO %d", reader.path, manifest.world_size, manifest.zero_stage)
    return Progress(step=manifest.step, **manifest.totals), manifest.cursor


def _begin(engine: Engine, initial: Initial) -> None:
    """Load the weights of a first step. Raises CheckpointError where the model then computes with others."""
    source = ZeroMoments(lambda name, start, stop: initial.read(name, engine.shapes[name], start, stop))
    engine.load_state(source, adam_steps=0)
    check_replicas(engine)
    if (wrong := engine.differs_from(source)) is not None:
        raise CheckpointError(f"after the load {wrong}; this is a defect of Longhaul or of the installed DeepSpeed")
    for line in initial.told:
        log.info("%s", line)


class Saves:
    """The checkpoints that one start of a run writes. All ranks make the same calls."""

    def __init__(
        self, cfg: RunConfig, engine: Engine, loader: AnyLoader, reads: ReadLog, ledger: Ledger, lease: Lease | None,
        best_step: int = 0,
    ) -> None:  # fmt: skip
        """lease: of rank 0, None on the others.    best_step: of the best checkpoint so far."""
        self._cfg, self._engine, self._loader = cfg, engine, loader
        self._reads, self._ledger, self._lease = reads, ledger, lease
        self._writer = CheckpointWriter(
            cfg.run_dir / "checkpoints",
            engine.mesh,
            cfg.checkpoint,
            on_done=self._tell,
            before_commit=self._before_commit,
            best_step=best_step,
        )
        self._known_failures = self._retry_step = 0

    @property
    def committed_step(self) -> int:
        """Of the newest checkpoint."""
        return self._writer.committed_step

    def wait(self) -> int:
        """Wait for the save under way; committed_step then, which is the same on all ranks."""
        self._writer.wait()
        return self.committed_step

    @property
    def failures(self) -> int:
        """Saves that have failed so far, as far as this rank knows: ranks must agree on it before they act on it."""
        return self._writer.failures

    def heed(self, failures: int, step: int) -> None:
        """Have a failed save tried again checkpoint.retry_every steps later. Raises FloatingPointError as finish does.

        failures: the number that all ranks have agreed on, at optimizer step `step`.
        """
        if failures > self._known_failures:
            self._known_failures, self._retry_step = failures, step + self._cfg.checkpoint.retry_every
            self._check_finite()

    def due(self, progress: Progress) -> bool:
        step = progress.step
        return step % self._cfg.checkpoint.every == 0 or step in (self._retry_step, progress.best_step)

    def begin(self, progress: Progress) -> float:
        """Begin to write a checkpoint. Returns the seconds that training waited: for a copy in host memory.

        Raises LeaseLost if the folder is another job's, ReplicaError where ranks no longer hold the same.
        """
        engine, lease = self._engine, self._lease
        check_replicas(engine)
        if (lost := engine.mesh.broadcast(lease.lost() if lease is not None else None)) is not None:
            raise LeaseLost(lost)
        manifest = Manifest(
            step=progress.step,
            adam_steps=engine.adam_steps,
            world_size=engine.mesh.world_size,
            zero_stage=self._cfg.parallel.zero_stage,
            shapes={name: list(shape) for name, shape in engine.shapes.items()},
            files={},
            cursor=self._loader.merge_cursors(engine.mesh.gather(self._loader.cursor())),
            config=self._cfg.model_dump(mode="json"),
            loss_scaler=engine.loss_scaler_state(),
            totals={key: value for key, value in asdict(progress).items() if key != "step"},
            versions={name: version(name) for name in ("torch", "deepspeed", "longhaul")},
        )
        return self._writer.save(engine, manifest)

    def finish(self, progress: Progress) -> float | None:
        """Write the checkpoint with which a start ends, and wait for it; None if it was there already, else as begin.

        Raises CheckpointError when it cannot be written, and FloatingPointError where weights are not finite: no step
        after it can mend them.
        """
        stall_s = None
        self._writer.wait()
        if self.committed_step != progress.step:
            stall_s = self.begin(progress)
        outcome = self._writer.wait()
        self._check_finite()
        if outcome is not None and outcome.error is not None:
            raise CheckpointError(
                f"the last checkpoint of this start, of step {progress.step}, could not be written: {outcome.error}. "
                f"The run goes on from step {self.committed_step} when it is started again"
            )
        return stall_s

    def close(self) -> None:
        """Wait a while for the save under way."""
        self._writer.wait(CLOSE_S)

    def _check_finite(self) -> None:
        outcome = self._writer.wait()
        if outcome is not None and outcome.not_finite:
            raise FloatingPointError(
                f"step {outcome.step} was not saved: {outcome.error}. The run goes on from step {self.committed_step} "
                "when it is started again; with the same data and settings it comes here again"
            )

    # -- in the writer's thread, on every rank -------------------------------------------------------------------------

    def _before_commit(self) -> None:
        """Raises OSError when the checkpoint must not become one."""
        self._reads.sync()
        if self._lease is not None and (lost := self._lease.lost()) is not None:
            raise OSError(lost)

    def _tell(self, outcome: Outcome) -> None:
        if self._engine.mesh.rank == 0:
            tell_saved(outcome, self._ledger, self._lease)


def tell_saved(outcome: Outcome, ledger: Ledger, lease: Lease | None) -> None:
    """Rank 0 says how a save ended, unless the ledger is another job's by now."""
    if lease is not None and lease.lost() is not None:
        return
    if outcome.error is not None:
        ledger.add("checkpoint_failed", step=outcome.step, error=hide(outcome.error)[:500])
        log.error("step %d could NOT be saved, training goes on: %s", outcome.step, outcome.error)
        return
    ledger.add(
        "checkpoint",
        step=outcome.step,
        write_s=round(outcome.write_s, 3),
        bytes=outcome.n_bytes,
        path=str(outcome.path),
    )
    log.info("step %d  saved %s in %.2f s", outcome.step, outcome.path, outcome.write_s)
