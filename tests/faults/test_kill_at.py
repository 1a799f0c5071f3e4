"""Row 4 of the fault matrix by exhaustion: a rank is ended at every single file operation of a save, each rank in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill_at")
    shim = folder / "kill_at.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "kill_at.c", "-ldl"], check=True)
    paths = [HERE.parent / "parallel", HERE.parent.parent]
    done = subprocess.run(
        [sys.executable, HERE / "kill_at.py", folder],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.fault(4, 5, 6)
def test_a_rank_killed_at_any_file_operation_of_a_save_costs_at_most_that_save(cases):
    """What goes on from whatever is whole then ends bit-equal to the run that nobody killed."""
    undisturbed = next(case for case in cases if case["n"] == 0)
    assert undisturbed["resumed"] == 2
    for rank in (0, 1):
        mine = [case for case in cases if case["rank"] == rank and case["n"]]
        assert [case["n"] for case in mine] == list(range(1, mine[0]["count"] + 1))  # every one of them
        for case in mine:
            assert (case["state"], case["losses"]) == (undisturbed["state"], undisturbed["losses"]), case
            assert case["resumed"] in (1, 2), case
    committing = [case["resumed"] for case in cases if case["rank"] == 0 and case["n"]]
    assert committing == sorted(committing)  # up to the commit the save before, from then on this one
    assert set(committing) == {1, 2}
