"""Submit a run once: `python cluster/submit.py --cluster configs/cluster/two.yaml --config configs/gpt3-1.3b.yaml`.

Writes the job script into the run's folder and queues it; the job requeues itself until the run is finished. Refuses,
with exit code 2 and before anything is queued, what can be known to fail.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import slurm
from cluster.config import ClusterConfig, ClusterError, load_cluster
from cluster.records import lead_for, note, read_events
from cluster.script import ROOT, job_script


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cluster/submit.py",
        description="Write the job script of a run and submit it.",
        epilog="example: python cluster/submit.py --cluster configs/cluster/two.yaml --config configs/gpt3-1.3b.yaml "
        "run.name=try",
    )
    parser.add_argument("--cluster", required=True, help="cluster file, YAML; configs/cluster/ has some to copy")
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as launcher/pretrain.py")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        return submit(args)
    except ClusterError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2


def submit(args: argparse.Namespace) -> int:
    cfg = load_cluster(args.cluster)
    arguments = [f"--config={args.config}", *(f"--allow-change={key}" for key in args.allow_change), *args.overrides]
    wrong, run = [], {}
    try:
        run = check_run(cfg, arguments, args.dry_run)
    except ClusterError as error:
        wrong.append(str(error))
    if not args.dry_run:
        try:
            slurm.refuse_what_slurm_lacks(cfg)
        except ClusterError as error:
            wrong.append(f"{args.cluster}: {error}")
    if wrong:
        raise ClusterError("\n".join(wrong))
    run_dir = Path(run["run_dir"])
    lead_s = lead_for(read_events(run_dir / "ledger.jsonl"), cfg.lead_s)
    if lead_s >= cfg.time_s:
        raise ClusterError(
            f"time: got {cfg.time}; this run's saves need {lead_s} s before its end, so that nothing would be left"
        )
    text = job_script(
        cfg, name=run["name"], run_dir=run_dir, cwd=Path.cwd(), python=cfg.python or sys.executable,
        arguments=arguments, lead_s=lead_s, command=run["command"],
    )  # fmt: skip
    if args.dry_run:
        print(text, end="")
        return 0
    if run["finished"]:
        raise ClusterError(f"{run_dir} is finished; nothing to queue")
    refuse_second_job(run_dir)
    path = write_script(run_dir, text)
    tested = slurm.command("sbatch", "--test-only", str(path))
    if tested.returncode:
        raise ClusterError(f"sbatch refuses {path}: {tested.stderr.strip()}")
    queued = slurm.command("sbatch", "--parsable", str(path))
    if queued.returncode:
        raise ClusterError(f"sbatch refuses {path}: {queued.stderr.strip()}")
    job = queued.stdout.strip().splitlines()[-1].split(";")[0]
    note(run_dir, "submitted", job=job, script=str(path))
    print(
        f"queued: job {job}, {cfg.nodes} nodes of {cfg.ranks_per_node} ranks, {cfg.time} a start\n"
        f"  its script    {path}\n"
        f"  its output    {run_dir / 'logs' / f'slurm-{job}.out'}\n"
        f"  stop it       scancel {job}"
    )
    return 0


def check_run(cfg: ClusterConfig, arguments: list[str], write_nothing: bool) -> dict[str, Any]:
    """Have launcher/check.py judge the run as its ranks will: its folder, name, and whether it is finished."""
    command = [sys.executable, str(ROOT / "launcher/check.py"), "--ranks", str(cfg.ranks), *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "--write-nothing"] if write_nothing else command,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    if done.returncode == 2:
        raise ClusterError(done.stderr.strip())
    if done.returncode:
        raise ClusterError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    run = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(run, dict)
    return run


def refuse_second_job(run_dir: Path) -> None:
    """One job to a run: the second would only be refused when it starts."""
    for event in read_events(run_dir / "jobs.jsonl"):
        if event["event"] == "submitted" and (found := slurm.job_state(event["job"])).lives:
            raise ClusterError(
                f"{run_dir} has job {event['job']}, which is {found.state}; it goes on by itself. To replace it: scancel "
                f"{event['job']}"
            )


def write_script(run_dir: Path, text: str) -> Path:
    path = run_dir / "job.sh"
    staging = path.with_suffix(".tmp")
    staging.write_text(text, encoding="utf-8")
    staging.chmod(0o755)
    os.replace(staging, path)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
