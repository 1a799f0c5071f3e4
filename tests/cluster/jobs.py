"""Runs submitted to the test cluster, as a user types it."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import yaml

from runs import PRETRAIN, SCRIPTS, write_recipe
from slurm import Cluster, wait_until

SIX_STEPS = ("train.steps=6", "parallel.zero_stage=2")
# Enough micro-batches that a step takes a while: there must be time to disturb it.
RUN = (
    "train.steps=40",
    "train.global_batch_size=64",
    "train.micro_batch_size=1",
    "checkpoint.every=15",
    "eval.every=0",
)
# The pre-flight, which loads torch once more, has tests of its own.
TWO_NODES = {"nodes": 2, "tasks_per_node": 1, "time": "10:00", "partition": "main", "network_interface": "eth0",
             "lead_s": 30, "env": {"OMP_NUM_THREADS": "1"}, "sbatch": ["--exclusive"],
             "preflight": {"enabled": False}}  # fmt: skip


def cluster_file(folder: Path, **changes: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({**TWO_NODES, **changes}))
    return path


def submit_command(folder: Path, recipe: Path, *arguments: object, **changes: object) -> list[str]:
    return [str(SCRIPTS / "python"), "cluster/submit.py", f"--cluster={cluster_file(folder, **changes)}",
            f"--config={recipe}", *map(str, arguments)]  # fmt: skip


def submit(cluster: Cluster, folder: Path, corpus: Path, *overrides: object, **changes: object) -> str:
    """Submit the small recipe with folder/runs/test as its run; returns the job's id. changes: of the cluster file."""
    out = cluster.run(*submit_command(folder, write_recipe(folder, corpus), *overrides, **changes))
    assert out.startswith("queued: job "), out
    return out.split()[2].rstrip(",")


def records(run_dir: Path, event: str, file: str = "jobs.jsonl") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def reach(cluster: Cluster, job: str, run_dir: Path, step: int, timeout: float = 180) -> None:
    """Until the run has logged the step; fails at once where the job ends before."""

    def reached() -> bool:
        path = run_dir / "metrics.jsonl"
        if path.exists() and re.search(rf'"step": {step}\b', path.read_text()):
            return True
        state = cluster.state(job)
        assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), f"{state}\n{output(run_dir, job)}"
        return False

    wait_until(reached, timeout, lambda: output(run_dir, job))


def output(run_dir: Path, job: str) -> str:
    path = run_dir / f"logs/slurm-{job}.out"
    return path.read_text(errors="replace")[-6000:] if path.exists() else "no output"


def ranks(folder: Path) -> list[int]:
    """Process ids of the ranks, on whichever node, as this machine numbers them."""
    return started(PRETRAIN, f"--config={folder / 'test.yaml'}")


def started(command: str, argument: str) -> list[int]:
    """Process ids of those with both in their words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        program = [word for word in words[1:] if word not in ("-u", "")]
        if program and program[0].endswith(command) and argument in words:
            found.append(int(path.parent.name))
    return sorted(found)


@contextlib.contextmanager
def standing_still(folder: Path) -> Iterator[None]:
    """The ranks do, in the block."""
    stopped = ranks(folder)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
