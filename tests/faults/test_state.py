"""Weights that break in memory just before a save: nothing of it reaches a checkpoint, and the run goes on without it."""

import re

import pytest

from launcher.run_dir import Ledger
from parallel.checkpoint import committed_steps
from runs import injected, run, torchrun
from straight import OPTIONS

MESSAGES = {
    "nan-weight": r"step 20 was not saved: .*; rank 1: the weight of \S+ is not finite at element \d+\.",
    "flip-bit": r"ranks that should hold the same differ in the weights of embed\.weight .*, rank 1 on ",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [pytest.param("nan-weight", marks=pytest.mark.fault(36)), pytest.param("flip-bit", marks=pytest.mark.fault(38))],
)
def test_a_weight_that_breaks_on_one_rank_is_not_saved(how, straight, recipe, tmp_path):
    run_dir = tmp_path / "runs/test"
    text = run(injected(how, 1, 20, recipe, *OPTIONS), tmp_path / "log", code=1)
    assert re.search(MESSAGES[how], text)
    assert committed_steps(run_dir / "checkpoints") == [5, 10, 15]
    failed = Ledger(run_dir).events()[-1]
    assert (failed["event"], failed["saved_step"]) == ("failed", 15)
    text = run(torchrun(2, "--config", recipe, *OPTIONS), tmp_path / "again.log")
    assert "step-00000015, written by 2 ranks" in text
    straight.assert_equal(run_dir)
