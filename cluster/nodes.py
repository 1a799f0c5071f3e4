"""Which of a job's nodes its ranks start on, and which the next start is kept away from."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cluster.config import ClusterError, Preflight
from cluster.preflight import PreflightError, Reports, judge, measure
from cluster.records import note, read_events
from cluster.slurm import command as ask

REQUEUE_TRIES, REQUEUE_PAUSE_S = 10, 30.0
UNUSABLE = ("down", "drain", "fail", "maint", "reboot", "power", "unknown", "reserved")


class Needs(NamedTuple):
    devices: int  # accelerators
    interface: str | None  # of the network


@dataclass(frozen=True)
class Chosen:
    """used: in SLURM's order, the first has rank 0; none where `cause` tells why. place: address and port to meet at."""

    used: list[str]
    place: tuple[str, int]
    left_out: dict[str, str] = field(default_factory=dict)  # what is wrong with each
    cause: str = ""


def hostnames(nodelist: str) -> list[str]:
    """`n[1-2],m1` as SLURM expands it, in its order. Raises ClusterError."""
    done = ask("scontrol", "show", "hostnames", nodelist)
    if done.returncode:
        raise ClusterError(f"scontrol show hostnames {nodelist}: {done.stderr.strip()}")
    return done.stdout.split()


def choose(
    nodes: list[str], counts: list[int], command: list[str] | None, limits: Preflight, needs: Needs, *, run_dir: Path,
    job: str, restart: int, place: tuple[str, int], ports: range, stop: Callable[[], bool],
) -> Chosen:  # fmt: skip
    """As many of the nodes as are good and as the run can be divided over.

    counts: on how many nodes it can be.    command: that measures them; None: all are taken for good.    needs: of each
    node.    place: of this node, the batch host.    stop: the start is no longer wanted.
    """
    batch_host = os.environ.get("SLURMD_NODENAME") or nodes[0]
    begin, reports, wrong = time.monotonic(), {}, {}
    if command is not None:
        try:
            reports = measure(
                on_nodes(command, nodes, 1), nodes=nodes, run_dir=run_dir, name=f"{job}-{restart}", place=place, ports=ports,
                limits=limits, stop=stop,
            )  # fmt: skip
            if stop():
                return Chosen([], place)
            wrong = judge(reports, batch_host, limits, *needs)
        except PreflightError as error:
            return Chosen([], place, {}, f"the pre-flight: {error}")
    good = [node for node in nodes if node not in wrong]
    count = max((count for count in counts if count <= len(good)), default=0)
    used = good[:count]
    if command is not None:
        _tell(reports, wrong)
        note(run_dir, "preflight", job=job, restart=restart, took_s=round(time.monotonic() - begin, 1), used=used,
             left_out=wrong)  # fmt: skip
    if not used:
        names = "; ".join(f"{node}: {why}" for node, why in wrong.items())
        return Chosen([], place, wrong, f"of {len(nodes)} nodes {len(good)} are good and {min(counts)} are needed"
                      + (f": {names}" if names else ""))  # fmt: skip
    if idle := good[count:]:
        print(f"job.py: {', '.join(idle)} stay idle: the run can be on {', '.join(map(str, counts))} nodes", flush=True)
    return Chosen(used, place if used[0] == batch_host else _place_of(reports, used[0], place[1]), wrong)


def _place_of(reports: Reports, node: str, port: int) -> tuple[str, int]:
    report = reports.get(node, {})
    return report.get("clock", {}).get("address", node), report.get("port") or port


def _tell(reports: Reports, wrong: dict[str, str]) -> None:
    for node, report in reports.items():
        shown = [f"{device['name']} {device['tflops']:.3g} TFLOP/s" for device in report.get("devices", [])[:1]]
        for other, told in report.get("pairs", {}).items():
            shown += [f"with {other} {min(told['gb_s']):.3g} GB/s"] if "gb_s" in told else []
        text = f"LEFT OUT: {wrong[node]}" if node in wrong else f"good: {', '.join(shown)}"
        print(f"job.py: pre-flight: {node} {text}", flush=True)


def on_nodes(command: list[str], nodes: list[str], tasks_per_node: int) -> list[str]:
    """The command with srun's step on these nodes alone."""
    assert Path(command[0]).name == "srun"
    where = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}", f"--nodelist={','.join(nodes)}"]
    return [command[0], *where, *command[1:]]


def write_hostfile(path: Path, nodes: list[str], slots: int) -> None:
    path.write_text("".join(f"{node} slots={slots}\n" for node in nodes), encoding="utf-8")


def to_exclude(run_dir: Path, job: str, bad: Collection[str], counts: list[int]) -> tuple[list[str], list[str] | None]:
    """Nodes that the next start is to be kept away from for what they showed in this one; the job's whole list, None
    where it stays as it is.

    What another start put there is taken away again: a node is measured anew after one start without it. None is excluded
    where the partition then had fewer than the least of `counts` others, nor where the job may not have all of these.
    """
    try:
        told = ask("scontrol", "show", "job", "-o", job).stdout
        shown = re.search(r"ExcNodeList=(\S+)", told)
        now = set(hostnames(shown[1])) if shown and shown[1] != "(null)" else set()
        others = usable_nodes(os.environ.get("SLURM_JOB_PARTITION", "")) - set(bad)
    except ClusterError:  # SLURM does not answer
        return [], None
    ends = [e for e in read_events(run_dir / "jobs.jsonl") if e["event"] == "end" and e.get("job") == job]
    asked_for = now - set(ends[-1].get("excluded", []) if ends else [])
    bound = re.search(r"\b(Reservation|Features|ReqNodeList)=(?!\(null\))\S", told)
    excluded = sorted(bad) if len(others - asked_for) >= min(counts) and not bound else []
    wanted = asked_for | set(excluded)
    return excluded, None if wanted == now else sorted(wanted)


def usable_nodes(partition: str) -> set[str]:
    lines = ask("sinfo", "--Node", "--noheader", f"--partition={partition}", "--format=%N %T").stdout.splitlines()
    pairs = [line.split() for line in lines if line.strip()]
    return {name for name, state in pairs if not state.startswith(UNUSABLE) and not state.endswith("*")}


def requeue(job: str, exclude: list[str] | None) -> str | None:
    """Have SLURM start the job again; it ends this one. Returns what SLURM says where it does not.

    exclude: the job's list of nodes to keep away from, set when it waits again; None leaves what there is.
    """
    # SLURM's to all processes of a requeued job; our commands inherit this, and until SIGKILL there are KillWait seconds
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for remaining in reversed(range(REQUEUE_TRIES)):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0 or not remaining:
            break
        time.sleep(REQUEUE_PAUSE_S)  # the controller may just be starting anew
    if done.returncode:
        return done.stderr.strip()
    if exclude is not None:
        update = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}"]
        done = subprocess.run(update, capture_output=True, text=True)
        if done.returncode:
            print(
                f"job.py: {' '.join(update)}: exit code {done.returncode} {done.stderr.strip()}; left as it is",
                flush=True,
            )
    return None
