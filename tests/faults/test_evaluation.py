"""An evaluation that cannot be made ends no training."""

import pytest

from runs import injected, losses, metrics, run


@pytest.mark.slow
@pytest.mark.fault(57)
def test_held_out_text_that_one_rank_cannot_read(recipe, tmp_path):
    """The evaluation of step 12 is left out on both ranks alike; that of step 24 is made."""
    text = run(injected("unreadable-held-out", 1, 12, recipe), tmp_path / "log")
    assert "step 12 could NOT be evaluated, training goes on: rank 1: OSError: [Errno 5] Input/output error" in text
    assert len(losses(tmp_path / "runs/test")) == 24
    assert [line["step"] for line in metrics(tmp_path / "runs/test") if "loss/valid" in line] == [24]
