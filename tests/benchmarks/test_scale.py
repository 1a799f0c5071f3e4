"""The formulas behind cluster/SCALE.md's table of failures, against runs drawn at random."""

import numpy as np
import pytest

from scale import FAILURES_PER_GPU_S, best_interval_s, expected_goodput

STALL_S, WRITE_S, RESTART_S, MTBF_S = 20.0, 60.0, 300.0, 40_000.0


def drawn_goodput(interval_s: float) -> float:
    """Of 200,000 times between failures: what was saved whole of each, over all of the time."""
    lived = np.random.default_rng(0).exponential(MTBF_S, 200_000)
    saves = np.floor((lived - RESTART_S - WRITE_S) / (interval_s + STALL_S)).clip(0)
    return float(saves.sum() * interval_s / lived.sum())


@pytest.mark.parametrize("interval_s", [300.0, 1265.0, 4000.0])
def test_the_expected_goodput_is_that_of_runs_drawn_at_random(interval_s):
    expected = expected_goodput(interval_s, STALL_S, WRITE_S, RESTART_S, MTBF_S)
    assert drawn_goodput(interval_s) == pytest.approx(expected, rel=5e-3)


def test_no_interval_is_better_than_the_best():
    best_s = best_interval_s(STALL_S, MTBF_S)
    assert best_s == pytest.approx(1265, abs=1)
    assert all(drawn_goodput(best_s) > drawn_goodput(best_s * factor) for factor in (0.4, 0.6, 1.7, 2.5))


def test_the_published_rate_of_failures():
    assert pytest.approx(3.09, abs=0.01) == 1 / (FAILURES_PER_GPU_S * 16_384) / 3600  # hours
