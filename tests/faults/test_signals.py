"""A request to stop, in each phase of a run: heeded at the next step, by one save, and nothing of the run is changed.

While the ranks start: tests/cluster/test_requeue.py.
"""

import pytest

from launcher.run_dir import Ledger
from runs import injected, run, torchrun
from straight import OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.fault(26)]


@pytest.mark.parametrize(
    ("where", "step", "stops_at"),
    [
        pytest.param("forward", 1, (1, 2), marks=pytest.mark.long),
        ("forward", 8, (8, 9)),
        ("save", 10, (11, 11)),
        pytest.param("evaluation", 12, (13, 13), marks=pytest.mark.long),
    ],
)
def test_a_signal_is_heeded_once(where, step, stops_at, straight, recipe, tmp_path):
    """To one rank. In a step it may be too late for that step's vote; a save that it meets is not made again."""
    options, run_dir = (*OPTIONS, "checkpoint.every=10", "eval.every=12"), tmp_path / "runs/test"
    run(injected(f"usr1-in-{where}", 1, step, recipe, *options), tmp_path / "log", code=None)
    first = Ledger(run_dir).events()
    (stopped,) = (event for event in first if event["event"] == "stopped")
    assert stopped["signal"] == "SIGUSR1"
    assert stops_at[0] <= stopped["step"] <= stops_at[1]
    saved = [event["step"] for event in first if event["event"] == "checkpoint"]
    assert saved == [*range(10, stopped["step"], 10), stopped["step"]]
    run(torchrun(2, "--config", recipe, *options), tmp_path / "again")
    straight.assert_equal(run_dir)
