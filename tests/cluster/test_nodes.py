"""Nodes that fail, before a start and under it: the job goes on with what is left, from its last checkpoint."""

import math
import os
import signal
import time
from pathlib import Path

import pytest

from cluster.goodput import read_status
from jobs import RUN, output, ranks, reach, records, standing_still, started, submit
from launcher import audit
from runs import ROOT, losses, run, torchrun, write_recipe
from slurm import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLAIN = (*RUN, "model.dropout=0")  # what dropout leaves out depends on the number of ranks
WITH_LESS = {"min_nodes": 1, "preflight": {"enabled": True, "free_disk_gb": 0.001}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *PLAIN), folder / "log")
    return folder / "runs/test"


def close_to_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    """Another number of ranks sums in another order: the last bits differ, and nothing else."""
    ours, theirs = losses(run_dir), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(math.isclose(ours[step], theirs[step], rel_tol=1e-4) for step in ours), (ours, theirs)
    assert [event["step"] for event in records(run_dir, "finished", "ledger.jsonl")] == [40]
    assert audit.main([str(run_dir), "--verify"]) == 0
    told = read_status(run_dir, time.time())
    assert (told.state, told.step, len(told.starts)) == ("finished", 40, len(records(run_dir, "begin")))


def ranks_of_checkpoints(run_dir: Path) -> list[int]:
    """Of each, oldest first: how many ranks wrote it."""
    return [len(list(path.glob("rank-*.safetensors"))) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


@pytest.mark.long
@pytest.mark.fault(29, 39)
def test_a_node_that_is_drained_and_then_down(cluster, undisturbed, corpus, tmp_path):
    """Draining disturbs nothing; when the node is down the job goes on with the other, which reads the state of both."""
    job, run_dir = submit(cluster, tmp_path, corpus, *PLAIN, **WITH_LESS), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 16)
    cluster.run("scontrol", "update", "node=n2", "state=drain", "reason=test")
    reach(cluster, job, run_dir, 18)
    assert cluster.state(job) == "RUNNING"
    cluster.run("scontrol", "update", "node=n2", "state=down", "reason=test")
    cluster.wait_for(job, "COMPLETED", timeout=300)
    close_to_undisturbed(run_dir, undisturbed)
    first, second = records(run_dir, "preflight")
    assert (first["used"], second["used"]) == (["n1", "n2"], ["n1"])
    assert records(run_dir, "begin")[1]["saved_step"] >= 15  # SLURM sends SIGTERM first, which may suffice to save
    assert cluster.job(job)["Restarts"] == "1"
    assert [ranks_of_checkpoints(run_dir)[i] for i in (0, -1)] == [2, 1]
    assert "job.py: pre-flight: n2 good: cpu" in (run_dir / f"logs/slurm-{job}.out").read_text()


@pytest.mark.parametrize(
    ("bad", "good", "again"), [("n2", "n1", False), pytest.param("n1", "n2", True, marks=pytest.mark.long)]
)
def test_a_node_that_fails_the_preflight(cluster, undisturbed, corpus, tmp_path, bad, good, again):
    """It is named, left out of this start and excluded from the next; the one after that measures it `again`.

    Also the one on which the job's script runs.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.on_node(good, "mount", "-t", "tmpfs", "-o", "size=64m", "none", scratch)
    cluster.on_node(bad, "mount", "-t", "tmpfs", "-o", "ro,size=64m", "none", scratch)
    try:
        job = submit(cluster, tmp_path, corpus, *PLAIN, **WITH_LESS, scratch=str(scratch), launch="deepspeed")
        run_dir, why = tmp_path / "runs/test", f"{scratch} cannot be written: OSError: [Errno 30] Read-only file system"
        reach(cluster, job, run_dir, 5)
        assert f"pre-flight: {bad} LEFT OUT: {why}" in output(run_dir, job)
        assert (run_dir / "hostfile").read_text() == f"{good} slots=1\n"
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda: len(records(run_dir, "preflight")) == 2, 300, lambda: output(run_dir, job))
        assert cluster.job(job)["ExcNodeList"] == bad
        if again:
            cluster.on_node(bad, "mount", "-o", "remount,rw", scratch)
            wait_until(lambda: len(records(run_dir, "start", "ledger.jsonl")) == 2, 300, lambda: output(run_dir, job))
            cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for(job, "COMPLETED", timeout=300)
    finally:
        for node in ("n1", "n2"):
            cluster.on_node(node, "umount", "--lazy", scratch)
    close_to_undisturbed(run_dir, undisturbed)
    found = records(run_dir, "preflight")
    assert [event["used"] for event in found] == [[good], [good], ["n1", "n2"]][: 2 + again]
    assert [event["left_out"].keys() for event in found] == [{bad}, set(), set()][: 2 + again]
    assert found[0]["left_out"][bad].startswith(why)
    ends = records(run_dir, "end")
    assert [end["excluded"] for end in ends] == [[bad], [], []][: 2 + again]
    assert ends[0]["verdict"].endswith(f"requeued, without {bad}")


@pytest.mark.long
@pytest.mark.fault(42)
def test_too_few_good_nodes(cluster, corpus, tmp_path):
    """No rank starts, nobody is excluded where SLURM has no others, and the job ends after as many tries as are allowed."""
    other = tmp_path / "errors.py"
    other.write_text((ROOT / "data/errors.py").read_text() + "# newer\n")
    cluster.on_node("n2", "mount", "--bind", other, ROOT / "data/errors.py")
    try:
        job = submit(cluster, tmp_path, corpus, *PLAIN, **{**WITH_LESS, "min_nodes": None}, max_failures=1,
                     tasks_per_node=2)  # fmt: skip

        cluster.wait_for(job, "FAILED", timeout=300)
    finally:
        cluster.on_node("n2", "umount", "--lazy", ROOT / "data/errors.py")
    run_dir = tmp_path / "runs/test"
    (end,) = records(run_dir, "end")
    assert (end["kind"], end["excluded"]) == ("failed", [])
    assert end["cause"].startswith("of 2 nodes 1 are good and 2 are needed: n2: another program: data/errors.py: ")
    assert records(run_dir, "start", "ledger.jsonl") == []
    assert "n[1-2] without n2: another program: " in read_status(run_dir, time.time()).starts[0].nodes


@pytest.mark.long
@pytest.mark.fault(29)
def test_a_slurmd_is_killed_and_the_job_goes_on_with_the_other_node(cluster, undisturbed, corpus, tmp_path):
    """The ranks stand still until SLURM notices, as this run would be finished before."""
    job = submit(cluster, tmp_path, corpus, *PLAIN, "parallel.timeout_s=400", **WITH_LESS)
    run_dir = tmp_path / "runs/test"
    reach(cluster, job, run_dir, 18)
    try:
        with standing_still(tmp_path):
            cluster.kill_slurmd("n2")
            wait_until(lambda: cluster.run("sinfo", "-hN", "-n", "n2", "-o", "%T").startswith("down"), 300)
        cluster.wait_for(job, "COMPLETED", timeout=400)
    finally:
        cluster.start_slurmd("n2")
    close_to_undisturbed(run_dir, undisturbed)
    assert [event["used"] for event in records(run_dir, "preflight")] == [["n1", "n2"], ["n1"]]
    wait_until(lambda: ranks(tmp_path) == [], 60)


@pytest.mark.long
@pytest.mark.fault(9)
def test_a_node_that_hangs_in_the_preflight(cluster, undisturbed, corpus, tmp_path):
    """It is given up when its time is over, and the ranks start on the other."""
    changes = {**WITH_LESS, "preflight": {"within_s": 60, "free_disk_gb": 0.001}}
    job, run_dir = submit(cluster, tmp_path, corpus, *PLAIN, **changes), tmp_path / "runs/test"
    (pid,) = [
        pid for pid in preflights(cluster, run_dir, 2) if Path(f"/proc/{pid}/environ").read_text().count("NAME=n2")
    ]
    os.kill(pid, signal.SIGSTOP)
    cluster.wait_for(job, "COMPLETED", timeout=400)
    close_to_undisturbed(run_dir, undisturbed)
    (event,) = records(run_dir, "preflight")
    assert event["used"] == ["n1"]
    assert event["left_out"]["n2"].startswith("it did not ")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60)


def preflights(cluster, run_dir: Path, count: int) -> list[int]:
    """Process ids of launcher/preflight.py, when there are so many."""
    found: list[int] = []

    def there() -> bool:
        found[:] = started("launcher/preflight.py", f"--folder={run_dir}")
        return len(found) == count

    wait_until(there, 120, cluster.logs)
    return found
