"""The job script: what a person would write, read, edit and submit by hand. A pure function of its inputs."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from cluster.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 60  # after the first rank has ended; the others still save, and must not wait for it for ever


def job_script(
    cfg: ClusterConfig, *, name: str, run_dir: Path, cwd: Path, python: str, arguments: list[str], lead_s: int,
    node_counts: list[int], command: str = "pretrain",
) -> str:  # fmt: skip
    """run_dir, cwd: absolute.    command: pretrain or finetune, of launcher/.    arguments: its own.    lead_s: seconds
    before the time limit to stop.    node_counts: on how many nodes the run can be.
    """
    by_node = cfg.launch == "deepspeed"
    tasks = 1 if by_node else cfg.ranks_per_node
    cpus = cfg.cpus_per_task and cfg.cpus_per_task * (cfg.ranks_per_node if by_node else 1)
    options = {
        "job-name": name, **_places(cfg, tasks, cpus), "time": cfg.time, "partition": cfg.partition,
        "account": cfg.account, "qos": cfg.qos, "reservation": cfg.reservation, "exclude": cfg.exclude,
        "signal": f"B:USR1@{lead_s}", "requeue": True, "open-mode": "append", "chdir": cwd,
        "output": str(run_dir).replace("%", "%%") + "/logs/slurm-%j.out",
    }  # fmt: skip
    lines = begin_script(cfg, options, run_dir / "job.sh")
    before = 'trap "" USR1; ' + (f"mkdir -p {shlex.quote(cfg.scratch)}; " if cfg.scratch else "")
    inside = cfg.container.python if cfg.container else python
    ranks = [inside, str(ROOT / f"launcher/{command}.py"), *arguments]
    srun = ["srun", f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if cpus else []), f"--wait={WAIT_S}",
            *pyxis(cfg)]  # fmt: skip
    if by_node:
        hostfile = shlex.quote(str(run_dir / "hostfile"))
        each = (
            f"{before}exec {in_container(cfg)}{shlex.quote(inside)} -m deepspeed.launcher.runner --hostfile "
            f"{hostfile} --no_ssh --node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port $MASTER_PORT "
            '"$@"'
        )
        ranks = ranks[1:]
    else:
        each = f'{before}exec {in_container(cfg)}"$@"'
    job = [python, str(ROOT / "cluster/job.py"), "--run-dir", str(run_dir), "--lead-s", str(lead_s),
           "--max-failures", str(cfg.max_failures), "--node-counts", ",".join(map(str, node_counts)),
           "--tasks-per-node", str(tasks)]  # fmt: skip
    if cfg.network_interface:
        job += ["--interface", cfg.network_interface]
    if by_node:
        job += ["--slots", str(cfg.ranks_per_node)]
    if cfg.preflight.enabled:
        job += ["--devices", str(cfg.gpus_per_node), "--preflight", json.dumps(asdict(cfg.preflight))]
    lines += [
        "",
        "# Starts the ranks on the nodes that are good, has them save and stop before the time limit, and requeues the job",
        "# until the run is finished.",
        f"exec {shlex.join(job)} -- \\",
        *(_preflight(cfg, run_dir, inside, f'{before}exec {in_container(cfg)}"$@"') if cfg.preflight.enabled else []),
        # until a rank can save, a request to stop must not end it; it is repeated
        f"  {shlex.join(srun)} bash -c {shlex.quote(each)} rank \\",
        f"  {shlex.join(ranks)}",
    ]
    return "\n".join(lines) + "\n"


def _places(cfg: ClusterConfig, tasks: int, cpus: int | None) -> dict[str, object]:
    """What is asked for; whole nodes where their number may vary, as SLURM would give as few as hold the tasks."""
    gpus = {"gpus-per-node": cfg.gpus_per_node or None}
    if cfg.least_nodes == cfg.nodes:
        return {"nodes": cfg.nodes, "ntasks-per-node": tasks, **gpus, "cpus-per-task": cpus}
    return {"nodes": f"{cfg.least_nodes}-{cfg.nodes}", **gpus, "mincpus": cpus and cpus * tasks, "exclusive": True}


def _preflight(cfg: ClusterConfig, run_dir: Path, python: str, each: str) -> list[str]:
    """Lines that start launcher/preflight.py, one task a node, with all that the node has."""
    cpus = cfg.cpus_per_task and cfg.cpus_per_task * cfg.ranks_per_node
    srun = ["srun", "--overlap", "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else []), "--wait=0",
            "--kill-on-bad-exit=0", *pyxis(cfg)]  # fmt: skip
    node = [python, str(ROOT / "launcher/preflight.py"), f"--folder={run_dir}"]
    node += [f"--folder={cfg.scratch}"] if cfg.scratch else []
    return [f"  {shlex.join(srun)} bash -c {shlex.quote(each)} node \\", f"  {shlex.join(node)} -- \\"]


def pyxis(cfg: ClusterConfig) -> list[str]:
    """Options of srun."""
    if cfg.container is None or cfg.container.kind != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(cfg.container.mounts)}"] if cfg.container.mounts else []
    return [f"--container-image={cfg.container.image}", *mounts]


def begin_script(cfg: ClusterConfig, options: dict[str, object], path: Path) -> list[str]:
    """The lines until the work begins: options of sbatch (None: left out), modules, environment."""
    lines = ["#!/bin/bash"]
    for option, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{option}" + ("" if value is True else f"={_sbatch_quote(str(value))}"))
    lines += [f"#SBATCH {option}" for option in cfg.sbatch]
    lines += [
        f"# Written by cluster/submit.py. It may be edited, and submitted by hand: sbatch {path}",
        *(f"module load {shlex.quote(module)}" for module in cfg.modules),
        "set -euo pipefail",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {key}={shlex.quote(value)}" for key, value in _environment(cfg).items()),
    ]
    return lines


def _environment(cfg: ClusterConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    if cfg.network_interface:
        found |= {"NCCL_SOCKET_IFNAME": cfg.network_interface, "GLOO_SOCKET_IFNAME": cfg.network_interface}
    if cfg.scratch:
        found |= {
            "TMPDIR": cfg.scratch,
            "TRITON_CACHE_DIR": f"{cfg.scratch}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{cfg.scratch}/inductor",
        }
    if cfg.cache:
        found["HF_HOME"] = cfg.cache
    return found | cfg.env


def in_container(cfg: ClusterConfig) -> str:
    """What to put before a command of the nodes."""
    if cfg.container is None or cfg.container.kind != "apptainer":
        return ""
    words = ["apptainer", "exec", *(["--nv"] if cfg.gpus_per_node else [])]
    for mount in cfg.container.mounts:
        words += ["--bind", mount]
    return shlex.join([*words, cfg.container.image]) + " "


def _sbatch_quote(value: str) -> str:
    """sbatch reads its lines with quotes of its own."""
    return f'"{value}"' if any(c.isspace() or c in "#'" for c in value) else value
