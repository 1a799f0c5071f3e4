"""Steps whose loss or gradient is not what the steps before let expect: noticed before their update is made.

A spike is a value above `median + sigma x spread` of the last `window` steps; the spread is 1.4826 times the median
distance from the median, which for normal noise is the standard deviation, and which no few values can move. What is
not finite, and what was left out, never enters the window; the window is saved with every checkpoint.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from data.loader import IGNORE, StepBatch
from launcher.config import BadStepConfig, RunConfig
from launcher.run_data import AnyLoader
from launcher.saving import Progress, Saves
from parallel.mesh import Mesh

log = logging.getLogger(__name__)

NORMAL = 1.4826  # median absolute deviation -> standard deviation, of a normal distribution
LEAST_SPREAD = 1e-3  # of the median: steps that are nearly equal must not make the next one a spike


@dataclass(frozen=True)
class BadStep:
    kind: Literal["not_finite", "loss_spike", "grad_spike"]
    policy: Literal["log", "skip", "rewind"]
    text: str  # what is wrong, with the values


class Judge:
    """Looks at each step's loss and gradient norm; all ranks see the same numbers and come to the same verdict."""

    def __init__(self, cfg: BadStepConfig, losses: list[float], norms: list[float]) -> None:
        """losses, norms: of the steps before, the latest last; added to by `accept`."""
        self.cfg, self._losses, self._norms = cfg, losses, norms

    def look(self, loss: float, norm: float) -> BadStep | None:
        """What is wrong with a step, before its update.

        loss: mean over the step's targets, nats.    norm: of the whole gradient before clipping.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            return BadStep("not_finite", self.cfg.not_finite, f"its loss is {loss:.6g}, its gradient norm {norm:.6g}")
        if (limit := self._limit(self._losses)) is not None and loss > limit[0]:
            return BadStep("loss_spike", self.cfg.loss_spike, f"its loss is {loss:.6g}, above {limit[1]}")
        if (limit := self._limit(self._norms)) is not None and norm > limit[0]:
            return BadStep("grad_spike", self.cfg.grad_spike, f"its gradient norm is {norm:.6g}, above {limit[1]}")
        return None

    def accept(self, loss: float, norm: float) -> None:
        """Take a step whose update was made into the window."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._norms.append(norm)
            del self._losses[: -self.cfg.window], self._norms[: -self.cfg.window]

    def _limit(self, before: list[float]) -> tuple[float, str] | None:
        """The largest value that is no spike, and how it comes about; None while too few steps are known."""
        if len(before) < self.cfg.window:
            return None
        window = before[-self.cfg.window :]
        middle = median(window)
        spread = max(NORMAL * median(abs(value - middle) for value in window), LEAST_SPREAD * abs(middle))
        limit = middle + self.cfg.sigma * spread
        return limit, f"{limit:.6g} = {middle:.6g} + {self.cfg.sigma:g} x {spread:.3g} of the last {len(window)} steps"


class Rewind(Exception):
    """The run is to go back to its newest checkpoint and on without some samples; raised on all ranks alike."""

    def __init__(self, step: int, bad: BadStep, samples: tuple[int, int]) -> None:
        """step: the optimizer step that is bad.    samples: first and last global sample number to leave out."""
        super().__init__(
            f"step {step} is bad ({bad.kind}): {bad.text}; samples {samples[0]} to {samples[1]} are left out"
        )
        self.step, self.bad, self.samples = step, bad, samples


def tell(
    step: int, bad: BadStep, update_made: bool, losses: list[Tensor], batch: StepBatch, loader: AnyLoader, mesh: Mesh
) -> None:
    """Say which rank and which documents were in a bad step. All ranks come here alike.

    Of losses that are not finite the ranks that have them speak, of a spike the one with the highest loss of a
    micro-batch, of a gradient that is not finite though all losses are, every rank.

    losses: of this rank's micro-batches, sums over their targets.
    """
    counts = (batch.targets != IGNORE).sum(dim=(1, 2)).clamp(min=1)
    if batch.reference is not None:  # the losses are of pairs
        counts = torch.full_like(counts, batch.tokens.shape[1])
    means = [float(loss) / int(n) for loss, n in zip(losses, counts, strict=True)]
    where = [a for a, mean in enumerate(means) if not math.isfinite(mean)]
    told = mesh.gather((len(where), max(means, default=0.0)))
    if not any(broken for broken, _ in told):
        worst = max(range(mesh.world_size), key=lambda rank: told[rank][1])
        if bad.kind == "not_finite":  # of the gradient alone: any micro-batch of any rank may be the one
            where = list(range(len(means)))
        elif mesh.rank == worst:
            where = [means.index(told[worst][1])]
    if not where:
        return
    samples = batch.samples[where].ravel()
    log.warning(
        "step %d is bad (%s), %s: %s; rank %d, micro-batch %s with loss %s; samples %s; documents %s",
        step,
        bad.kind,
        "update made" if update_made else "update skipped",
        bad.text,
        mesh.rank,
        ", ".join(map(str, where)),
        ", ".join(f"{means[a]:.6g}" for a in where),
        samples.tolist(),
        loader.describe(samples),
    )


def give_up_or_rewind(
    cfg: RunConfig, progress: Progress, bad: BadStep, spans: Sequence[tuple[int, int]], saves: Saves, rewinds: int
) -> None:
    """Raise FloatingPointError where a cap is reached, Rewind where the policy is that.

    spans: (first, one past the last) sample of the last steps.    rewinds: that the run has made so far.
    """
    limits = cfg.train.bad_steps
    if bad.policy == "rewind":
        if rewinds >= limits.max_rewinds:
            raise FloatingPointError(
                f"step {progress.step} is bad ({bad.kind}): {bad.text}; the run has rewound {rewinds} times, "
                f"train.bad_steps.max_rewinds is {limits.max_rewinds}. The log names the documents of each bad step; look "
                "at them (launcher/audit.py), leave out more with train.bad_steps.leave_out or data.skip, or lower optim.lr"
            )
        n = min(len(spans), progress.step - saves.wait())  # what the checkpoint has in it stays
        raise Rewind(progress.step, bad, (spans[-n][0], spans[-1][1] - 1))
    if progress.skipped_in_a_row >= limits.max_skipped_in_a_row:
        raise FloatingPointError(
            f"{progress.skipped_in_a_row} updates in a row were skipped, up to step {progress.step}, the last one because "
            f"{bad.text}; the limit is train.bad_steps.max_skipped_in_a_row={limits.max_skipped_in_a_row}; the log names "
            "the documents of each"
        )
