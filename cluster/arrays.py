"""Preparing a corpus and evaluating checkpoints, as job arrays: their scripts. Pure functions of their inputs.

CORPUS.slurm/job.sh, jobs.jsonl, JOB-PART.out              beside the corpus, whose folder holds nothing else
RUN/evaluations/NAME/job.sh, jobs.jsonl, JOB-NUMBER.out    beside the results
"""

import shlex
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.script import ROOT, begin_script, in_container, pyxis

WARNING_S = 60  # before the time limit, where lead_s is not shorter; a part can be stopped at any point


def prepare_script(
    cfg: ClusterConfig, *, name: str, folder: Path, corpus: Path, cwd: Path, python: str, arguments: list[str]
) -> str:
    """Of launcher/prepare.py, a part on each node. folder: of script and output. corpus, cwd: absolute."""
    options = {
        **_options(cfg, f"prepare-{name}", folder, cwd, f"0-{cfg.nodes - 1}"),
        "cpus-per-task": cfg.cpus_per_task and cfg.cpus_per_task * cfg.ranks_per_node,
        "exclusive": True if cfg.cpus_per_task is None and "--exclusive" not in cfg.sbatch else None,  # all its cores
        "signal": f"B:USR1@{min(WARNING_S, cfg.lead_s)}",
    }
    mark = f'{shlex.quote(str(folder))}/"part-$SLURM_ARRAY_TASK_ID.begun"'
    lines = [
        *begin_script(cfg, options, folder / "job.sh"),
        *_scratch(cfg),
        "",
        "# When the time limit is near, and this start has seen some file finished, the part is queued again and goes on.",
        "again() {",
        f"  if [ -n \"$(find {shlex.quote(str(corpus))} -name '*.json' -newer {mark} -print -quit)\" ]; then",
        '    echo "the time limit is near: part $SLURM_ARRAY_TASK_ID is queued again"',
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',  # one task has the whole array's id for its own
        "  else",
        f'    echo "nothing was finished in {cfg.time}; give it more time, or lower data.shard_bytes"',
        "  fi",
        "}",
        f"touch {mark}",
        "trap again USR1",
        "",
        "# Which part of how many it is, launcher/prepare.py reads from SLURM's variables.",
        f"{_command(cfg, python, 'prepare.py', arguments)} &",
        "wait $! || wait $!  # a signal ends the first",
    ]
    return "\n".join(lines) + "\n"


def evaluate_script(
    cfg: ClusterConfig, *, name: str, folder: Path, run_dir: Path, cwd: Path, python: str, steps: list[int], save: str,
    data: list[str],
) -> str:  # fmt: skip
    """Of launcher/evaluate.py, a task for each step, as many at a time as the cluster file has nodes."""
    options = {
        **_options(cfg, f"evaluate-{name}", folder, cwd, f"0-{len(steps) - 1}%{cfg.nodes}"),
        "gpus-per-node": 1 if cfg.gpus_per_node else None,
        "cpus-per-task": cfg.cpus_per_task,
    }
    arguments = [str(run_dir), f"--save={save}", *(["--data", *data] if data else [])]
    lines = [
        *begin_script(cfg, options, folder / "job.sh"),
        *_scratch(cfg),
        "",
        f"steps=({' '.join(map(str, steps))})",
        f'exec {_command(cfg, python, "evaluate.py", arguments)} --step "${{steps[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    return "\n".join(lines) + "\n"


def _options(cfg: ClusterConfig, name: str, folder: Path, cwd: Path, array: str) -> dict[str, object]:
    return {
        "job-name": name, "array": array, "nodes": 1, "ntasks": 1, "time": cfg.time, "partition": cfg.partition,
        "account": cfg.account, "qos": cfg.qos, "reservation": cfg.reservation, "exclude": cfg.exclude, "requeue": True,
        "open-mode": "append", "chdir": cwd, "output": str(folder).replace("%", "%%") + "/%A-%a.out",
    }  # fmt: skip


def _scratch(cfg: ClusterConfig) -> list[str]:
    return [f"mkdir -p {shlex.quote(cfg.scratch)}"] if cfg.scratch else []


def _command(cfg: ClusterConfig, python: str, program: str, arguments: list[str]) -> str:
    """With no srun where it can be left out: the task has the whole of its allocation then."""
    words = [cfg.container.python if cfg.container else python, str(ROOT / "launcher" / program), *arguments]
    before = in_container(cfg)
    if cfg.container and cfg.container.kind == "pyxis":
        before = shlex.join(["srun", "--ntasks=1", *pyxis(cfg)]) + ' --cpus-per-task="$SLURM_CPUS_ON_NODE" '
    return before + shlex.join(words)
