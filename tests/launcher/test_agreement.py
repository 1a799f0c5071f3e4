"""Ranks that do not run the same are refused before a model is built, and the message names what differs and where."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.program import PACKAGES
from launcher.run_dir import Ledger
from runs import PRETRAIN, ROOT, environment, free_port, write_recipe


def two_ranks(recipe, folders=(ROOT, ROOT), more=((), ()), program=(PRETRAIN,)):
    """Rank 0 and 1 as two nodes would start them, each in its own folder; (output, exit code) of each."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, *program, "--config", str(recipe), *more[rank]],
            cwd=folders[rank],
            env=environment(PYTHONPATH=f"{folders[rank]}:{ROOT}", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
                            LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [(rank.communicate(timeout=120)[0], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def copy_of_the_checkout(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.fault(42)
def test_a_node_with_other_code_is_refused(corpus, tmp_path):
    other = copy_of_the_checkout(tmp_path / "checkout")
    with open(other / "model/loss.py", "a") as file:
        file.write("# newer\n")
    for output, code in two_ranks(write_recipe(tmp_path, corpus), folders=(ROOT, other)):
        assert code == 2, output
        assert "1 of 2 ranks do not run what rank 0 on" in output
        assert "model/loss.py: " in output
        assert "Give all machines the same checkout, environment and command" in output
    assert not Ledger(tmp_path / "runs/test").events()


@pytest.mark.slow
@pytest.mark.fault(42)
def test_a_node_with_another_config_is_refused_with_the_key_and_both_values(corpus, tmp_path):
    for output, code in two_ranks(write_recipe(tmp_path, corpus), more=((), ("optim.lr=2e-3",))):
        assert code == 2, output
        assert "rank 1 on " in output
        assert "config optim.lr: 0.001 on rank 0, 0.002 there" in output


# Two folders stand for two machines that do not share one; the time that a rank waits for the other's file is cut short.
IMPATIENT = """
import sys
from launcher import agreement, pretrain
agreement.SEEN_S = 1.0
pretrain.leave(pretrain.main(sys.argv[1:]))
"""


def test_a_run_folder_that_a_node_does_not_see_is_refused(corpus, tmp_path):
    nodes = tmp_path / "n1", tmp_path / "n2"
    (nodes[1] / "runs/test/lease").mkdir(parents=True)
    (nodes[1] / "runs/test/lease/00000001.json").write_text("of a run that was here before")
    nodes[0].mkdir()
    recipe, own = write_recipe(tmp_path, corpus), ("run.folder=runs",)
    for output, code in two_ranks(recipe, nodes, (own, own), ("-c", IMPATIENT)):
        assert code == 2, output
        assert "does not see runs/test/lease/00000001.json, which rank 0 has made. A run's folder must be" in output
        assert "rank 1 on " in output
    assert not Ledger(nodes[0] / "runs/test").events()
