"""The job script: what a person would write, read, edit and submit by hand. A pure function of its inputs."""

import shlex
from pathlib import Path

from cluster.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 60  # after the first rank has ended; the others still save, and must not wait for it for ever


def job_script(
    cfg: ClusterConfig, *, name: str, run_dir: Path, cwd: Path, python: str, arguments: list[str], lead_s: int,
    command: str = "pretrain",
) -> str:  # fmt: skip
    """run_dir, cwd: absolute.    command: pretrain or finetune, of launcher/.    arguments: its own.    lead_s: seconds
    before the time limit to stop.
    """
    by_node = cfg.launch == "deepspeed"
    tasks = 1 if by_node else cfg.ranks_per_node
    cpus = cfg.cpus_per_task and cfg.cpus_per_task * (cfg.ranks_per_node if by_node else 1)
    options = {
        "job-name": name, "nodes": cfg.nodes, "ntasks-per-node": tasks, "gpus-per-node": cfg.gpus_per_node or None,
        "cpus-per-task": cpus, "time": cfg.time, "partition": cfg.partition, "account": cfg.account, "qos": cfg.qos,
        "reservation": cfg.reservation, "exclude": cfg.exclude, "signal": f"B:USR1@{lead_s}", "requeue": True,
        "open-mode": "append", "chdir": cwd, "output": str(run_dir).replace("%", "%%") + "/logs/slurm-%j.out",
    }  # fmt: skip
    lines = ["#!/bin/bash"]
    for option, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{option}" + ("" if value is True else f"={_sbatch_quote(str(value))}"))
    lines += [f"#SBATCH {option}" for option in cfg.sbatch]
    lines += [
        "# Written by cluster/submit.py. It may be edited, and submitted by hand: sbatch " + str(run_dir / "job.sh"),
        *(f"module load {shlex.quote(module)}" for module in cfg.modules),
        "set -euo pipefail",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {key}={shlex.quote(value)}" for key, value in _environment(cfg).items()),
    ]
    if cfg.scratch:
        lines.append(f"mkdir -p {shlex.quote(cfg.scratch)}")
    inside = cfg.container.python if cfg.container else python
    ranks = [inside, str(ROOT / f"launcher/{command}.py"), *arguments]
    srun = ["srun", f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if cpus else []), f"--wait={WAIT_S}"]
    if by_node:
        hostfile = shlex.quote(str(run_dir / "hostfile"))
        lines.append(
            f"scontrol show hostnames \"$SLURM_JOB_NODELIST\" | sed 's/$/ slots={cfg.ranks_per_node}/' >{hostfile}"
        )
        each = (
            f'trap "" USR1; exec {_container(cfg)}{shlex.quote(inside)} -m deepspeed.launcher.runner --hostfile '
            f"{hostfile} --no_ssh --node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port $MASTER_PORT "
            '"$@"'
        )
        ranks = ranks[1:]
    else:
        each = f'trap "" USR1; exec {_container(cfg)}"$@"'
    if cfg.container and cfg.container.kind == "pyxis":
        srun.append(f"--container-image={cfg.container.image}")
        if cfg.container.mounts:
            srun.append(f"--container-mounts={','.join(cfg.container.mounts)}")
    job = [python, str(ROOT / "cluster/job.py"), "--run-dir", str(run_dir), "--lead-s", str(lead_s),
           "--max-failures", str(cfg.max_failures)]  # fmt: skip
    if cfg.network_interface:
        job += ["--interface", cfg.network_interface]
    lines += [
        "",
        "# Starts the ranks, has them save and stop before the time limit, and requeues the job until the run is finished.",
        f"exec {shlex.join(job)} -- \\",
        # until a rank can save, a request to stop must not end it; it is repeated
        f"  {shlex.join(srun)} bash -c {shlex.quote(each)} rank \\",
        f"  {shlex.join(ranks)}",
    ]
    return "\n".join(lines) + "\n"


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


def _container(cfg: ClusterConfig) -> str:
    if cfg.container is None or cfg.container.kind != "apptainer":
        return ""
    words = ["apptainer", "exec", *(["--nv"] if cfg.gpus_per_node else [])]
    for mount in cfg.container.mounts:
        words += ["--bind", mount]
    return shlex.join([*words, cfg.container.image]) + " "


def _sbatch_quote(value: str) -> str:
    """sbatch reads its lines with quotes of its own."""
    return f'"{value}"' if any(c.isspace() or c in "#'" for c in value) else value
