"""SLURM's own commands, asked for what the rest of this folder needs to know."""

import subprocess
from dataclasses import dataclass

from cluster.config import ClusterConfig, ClusterError, parse_time

ANSWER_S = 60.0  # a controller under load takes its time
LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one; raises ClusterError where it is not there or does not answer."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise ClusterError(f"{words[0]} is not here; call this on a node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{words[0]} did not answer in {ANSWER_S:.0f} s; try again later") from None


@dataclass(frozen=True)
class JobState:
    """What squeue says of a job. state: empty where SLURM does not know it, or does not answer."""

    state: str = ""
    reason: str = ""
    left_s: int | None = None  # until its time limit; None where it has none

    @property
    def lives(self) -> bool:
        return self.state in LIVING


def job_state(job: str) -> JobState:
    """Of an array, that of a task that lives, if there is one."""
    try:
        done = command("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%r|%L")
    except ClusterError:
        return JobState()
    rows = [line.split("|") for line in done.stdout.split("\n")]
    found = [JobState(row[0].strip(), row[1], parse_time(row[2].strip())) for row in rows if len(row) == 3]
    return next((task for task in found if task.lives), found[0] if found else JobState())


def refuse_what_slurm_lacks(cfg: ClusterConfig) -> None:
    """Raises ClusterError where the partition is not there or too small; sbatch --test-only judges the rest."""
    done = command("sinfo", "--all", "--noheader", "--format=%P|%D|%l|%a")
    if done.returncode:
        raise ClusterError(f"sinfo: {done.stderr.strip()}")
    partitions: dict[str, tuple[int, str, str]] = {}  # nodes, time limit, up or down
    default = ""
    for line in done.stdout.split():
        name, nodes, limit, available = line.split("|")
        default = name.rstrip("*") if name.endswith("*") else default
        before = partitions.get(name.rstrip("*"), (0, "", ""))[0]
        partitions[name.rstrip("*")] = (before + int(nodes), limit, available)
    wanted = cfg.partition or default
    if not wanted:
        raise ClusterError(f"partition: none is given and SLURM has no default; it has {', '.join(partitions)}")
    wrong = []
    for name in wanted.split(","):
        if name not in partitions:
            wrong.append(f"partition: SLURM has no {name}; it has {', '.join(partitions)}")
            continue
        nodes_there, limit, available = partitions[name]
        if cfg.nodes > nodes_there:
            wrong.append(f"nodes: got {cfg.nodes}; the partition {name} has {nodes_there}")
        limit_s = parse_time(limit)
        if limit_s is not None and cfg.time_s > limit_s:
            wrong.append(
                f"time: got {cfg.time}; the partition {name} allows {limit} at most, which is no limit for the run: the "
                "job requeues itself"
            )
        if available != "up":
            wrong.append(f"partition: {name} is {available}")
    if wrong:
        raise ClusterError("\n".join(wrong))
