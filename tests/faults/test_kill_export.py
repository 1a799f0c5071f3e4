"""An export that is killed leaves its output absent or whole, and the run as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exports import contents, make_run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), corpus, "qwen3")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    file = tmp_path_factory.mktemp("shim") / "kill_at.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-o", file, HERE / "kill_at.c", "-ldl"], check=True)
    return file


@pytest.mark.timeout(1200)
@pytest.mark.fault(7)
@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_killed_at_any_file_operation_is_absent_or_whole(every, run_dir, shim, tmp_path):
    before = contents(run_dir)
    done = subprocess.run(
        [sys.executable, HERE / "kill_export.py", run_dir, tmp_path / "place", str(every)],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, *killed, last = cases
    assert first["output"] == "whole"
    states = [case["output"] for case in killed]
    assert set(states) <= {"absent", "whole"}, killed
    assert states == sorted(states)  # absent up to the rename, from then on whole
    assert states.count("absent") > 5
    assert last["output"] == "whole"  # beside all that was left of those before
    assert last["left"] == ["out"]
    assert contents(run_dir) == before
