"""One run through all that a cluster does to it. `pytest -s tests/cluster/test_transcript.py` prints it as a transcript."""

import re
import shlex
import time
from collections.abc import Callable

import pytest

from jobs import output, ranks, reach, records, standing_still, submit_command
from launcher import audit
from runs import SCRIPTS, losses, run, torchrun, write_recipe
from slurm import Cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 100
RUN = (f"train.steps={STEPS}", "train.global_batch_size=64", "train.micro_batch_size=1", "checkpoint.every=10",
       "eval.every=50", "parallel.timeout_s=15", "model.dropout=0")  # fmt: skip


class Transcript:
    """Runs commands on the cluster as a user types them, and prints them with what they answer."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self._began = cluster, time.monotonic()

    def say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)

    def type(self, *words: object) -> str:
        self.say("$ " + re.sub(r"\S+/bin/python", "python", shlex.join(map(str, words))))
        out = self.cluster.run(*words, timeout=120)
        print(out, end="", flush=True)
        return out


@pytest.mark.fault(24, 28, 29, 31, 32)
def test_one_run_through_everything(cluster, corpus, tmp_path):
    """Stopped by a signal, requeued by hand, one node's slurmd killed, the network cut, the time limit reached: at the end
    the run has its tokens, every sample was read once, and its losses are an undisturbed run's.
    """
    told, recipe, run_dir = Transcript(cluster), write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    changes = {"min_nodes": 1, "time": "5", "lead_s": 60, "sbatch": [], "preflight": {"within_s": 60}}
    out = told.type(*submit_command(tmp_path, recipe, *RUN, **changes))
    job = out.split()[2].rstrip(",")

    def restarted(disturb: Callable[[], object], timeout: float = 240) -> None:
        """Until another start of the job has begun."""
        before = len(records(run_dir, "begin"))
        disturb()
        wait_until(lambda: len(records(run_dir, "begin")) > before, timeout, lambda: output(run_dir, job))

    def further() -> None:
        """Until the run has logged some steps more than it ever had."""
        reach(cluster, job, run_dir, max(losses(run_dir), default=0) + 6)

    wait_until(lambda: (run_dir / "jobs.jsonl").exists(), 60)
    further()
    told.say("A signal, as SLURM sends it before it takes the nodes away:")
    restarted(lambda: told.type("scancel", "--batch", "--signal=USR1", job))
    further()
    told.say("Requeued by hand:")
    restarted(lambda: told.type("scontrol", "requeue", job))
    further()
    told.say(
        "The slurmd of one node is killed in mid-step; the ranks, which are well, stand still until SLURM has noticed:"
    )

    def kill_slurmd() -> None:
        with standing_still(tmp_path):
            cluster.kill_slurmd("n2")
            wait_until(lambda: cluster.run("sinfo", "-hN", "-n", "n2", "-o", "%T").startswith("down"), 120)
        told.type("sinfo", "-N")

    restarted(kill_slurmd)
    assert records(run_dir, "begin")[-1]["nodes"] == "n1"
    further()
    told.type(*_python("cluster/status.py", run_dir))
    told.say("The node is back, and the job is given it by a signal; then its network is cut:")
    cluster.start_slurmd("n2")
    wait_until(lambda: cluster.run("sinfo", "-hN", "-n", "n2", "-o", "%T").startswith("idle"), 60)
    restarted(lambda: told.type("scancel", "--batch", "--signal=USR1", job))
    assert records(run_dir, "begin")[-1]["nodes"] == "n[1-2]"
    further()

    def cut() -> None:
        cluster.cut("n2")
        wait_until(lambda: records(run_dir, "failed", "ledger.jsonl"), 120, lambda: output(run_dir, job))
        wait_until(lambda: ranks(tmp_path) == [], 90, lambda: output(run_dir, job))
        cluster.restore("n2")

    restarted(cut)
    told.say("ledger: " + records(run_dir, "failed", "ledger.jsonl")[-1]["error"])
    further()
    told.say("The time limit of five minutes comes near; the ranks stand still until they are asked to stop:")
    asked = "job.py: asking the ranks to save and stop: the time limit is near"

    def time_limit() -> None:
        with standing_still(tmp_path):
            wait_until(lambda: asked in output(run_dir, job), 320, lambda: output(run_dir, job))

    restarted(time_limit)
    cluster.wait_for(job, "COMPLETED", timeout=400)
    told.say("The run is finished:")
    told.type(*_python("cluster/status.py", run_dir, "--html", tmp_path / "report.html"))
    told.type(*_python("launcher/audit.py", run_dir, "--verify"))
    told.type("squeue")
    assert ranks(tmp_path) == []
    assert audit.main([str(run_dir), "--verify"]) == 0
    run(torchrun(2, "--config", write_recipe(tmp_path, corpus, "undisturbed"), *RUN), tmp_path / "log")
    expected = losses(tmp_path / "runs/undisturbed")
    got = losses(run_dir)
    assert got.keys() == expected.keys()
    furthest = max(abs(got[step] / expected[step] - 1) for step in expected)
    told.say(f"{len(got)} losses beside an undisturbed run's: the largest relative difference is {furthest:.1e}")
    assert furthest < 1e-4  # part of it on one rank instead of two


def _python(*words: object) -> list[str]:
    return [str(SCRIPTS / "python"), *map(str, words)]
