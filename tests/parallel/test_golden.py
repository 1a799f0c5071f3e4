"""Twenty deterministic steps of a tiny model, one process, fp32: a change that moves these losses says why in its commit."""

import pytest

from parallel.config import ParallelConfig
from ranks import build, run_ranks, run_steps

GOLDEN = [
    6.947159,
    6.913332,
    6.948351,
    6.917726,
    6.938320,
    6.942360,
    6.916749,
    6.974743,
    6.927233,
    6.946526,
    6.982115,
    6.895549,
    6.940009,
    7.021518,
    6.976834,
    6.981280,
    6.958518,
    6.992485,
    6.914045,
    6.996131,
]


def golden(mesh):
    return run_steps(build(mesh, ParallelConfig(zero_stage=1, precision="fp32")), range(20))


def test_losses_are_those_that_were_written_down():
    """1e-4: processors differ in the order in which they add up; a change of the algorithm moves them by more."""
    losses = [loss for loss, *_ in run_ranks(1, golden)[0]]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)
