"""Runs submitted to the test cluster, as a user types it."""

import json
from pathlib import Path

import yaml

from runs import SCRIPTS, write_recipe
from slurm import Cluster

SIX_STEPS = ("train.steps=6", "parallel.zero_stage=2")
TWO_NODES = {"nodes": 2, "tasks_per_node": 1, "time": "10:00", "partition": "main", "network_interface": "eth0",
             "lead_s": 30, "env": {"OMP_NUM_THREADS": "1"}, "sbatch": ["--exclusive"]}  # fmt: skip


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
