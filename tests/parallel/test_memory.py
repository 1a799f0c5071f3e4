"""Recomputation lowers the measured peak memory, and selective lies between none and full."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from memory import measure


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputation_lowers_peak_memory(stage):
    """The activations of 8 blocks are some 300 MiB here; margins of 10 % are far above the allocator's noise."""
    peak = {mode: measure(stage, 1, mode)["peak_mib"] for mode in ("none", "every_k", "selective", "full")}
    assert peak["full"] < 0.9 * peak["every_k"] < 0.9 * 0.9 * peak["none"], peak
    assert 1.1 * peak["full"] < peak["selective"] < 0.9 * peak["none"], peak
