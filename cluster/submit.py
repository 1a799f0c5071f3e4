"""Submit a run once: `python cluster/submit.py --cluster configs/cluster/two.yaml --config configs/gpt3-1.3b.yaml`.

Writes the job script into the run's folder and queues it; the job requeues itself until the run is finished. With
`--job prepare` an array that makes the recipe's corpus, a part on each node; with `--job evaluate` one that evaluates the
run's checkpoints. Refuses, with exit code 2 and before anything is queued, what can be known to fail.
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
from cluster.arrays import evaluate_script, prepare_script
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
    parser.add_argument("--job", choices=("pretrain", "prepare", "evaluate"), default="pretrain")
    parser.add_argument("--steps", metavar="N,N…", help="evaluate: of which checkpoints; all that have no result yet if not "
                        "given")  # fmt: skip
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="evaluate: on these texts or this "
                        "corpus, not what the run's corpus holds out; may be repeated, and needs a --save")  # fmt: skip
    parser.add_argument("--save", metavar="NAME", help="evaluate: name of the results, held-out if not given")
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
    if args.job != "evaluate" and (args.steps or args.data or args.save):
        raise ClusterError(f"--steps, --data and --save belong to --job evaluate; this is --job {args.job}")
    if args.job != "pretrain":
        if args.allow_change:
            raise ClusterError(f"--allow-change belongs to a training; this is --job {args.job}")
        return submit_array(cfg, args)
    arguments = [f"--config={args.config}", *(f"--allow-change={key}" for key in args.allow_change), *args.overrides]
    run = check_all(cfg, args, arguments)
    run_dir = Path(run["run_dir"])
    ledger = read_events(run_dir / "ledger.jsonl")
    if (needed_s := lead_for(ledger, cfg.lead_s)) >= cfg.time_s:
        raise ClusterError(
            f"time: got {cfg.time}; this run's saves need {needed_s} s before its end, so that nothing would be left"
        )
    lead_s = lead_for(ledger, cfg.lead_s, cfg.time_s)
    text = job_script(
        cfg, name=run["name"], run_dir=run_dir, cwd=Path.cwd(), python=cfg.python or sys.executable,
        arguments=arguments, lead_s=lead_s, node_counts=run["node_counts"], command=run["command"],
    )  # fmt: skip
    if args.dry_run:
        print(text, end="")
        return 0
    if run["finished"]:
        raise ClusterError(f"{run_dir} is finished; nothing to queue")
    refuse_second_job(run_dir)
    path = write_script(run_dir, text)
    job = queue(run_dir, path)
    counts = run["node_counts"]
    unused = sorted(set(range(cfg.least_nodes, cfg.nodes)) - set(counts))
    print(
        f"queued: job {job}, {' or '.join(map(str, reversed(counts)))} nodes of {cfg.ranks_per_node} ranks, "
        f"{cfg.time} a start\n"
        + (f"  not on {', '.join(map(str, unused))} nodes, over which the batch does not divide\n" if unused else "")
        + f"  its script    {path}\n"
        f"  its output    {run_dir / 'logs' / f'slurm-{job}.out'}\n"
        f"  stop it       scancel {job}"
    )
    return 0


def submit_array(cfg: ClusterConfig, args: argparse.Namespace) -> int:
    arguments = [f"--config={args.config}", *args.overrides]
    asked = [
        f"--job={args.job}",
        *([f"--steps={args.steps}"] if args.steps else []),
        *(f"--data={path}" for path in args.data),
    ]
    if args.data and not args.save:
        raise ClusterError("--data needs a name for its results, such as --save wiki; held-out is the run's own")
    save = args.save or "held-out"
    found = check_all(cfg, args, [*arguments, *asked, f"--save={save}"])
    common: dict[str, Any] = {"name": found["name"], "cwd": Path.cwd(), "python": cfg.python or sys.executable}
    if args.job == "prepare":
        if found["finished"]:
            raise ClusterError(f"{found['corpus']} is whole; nothing to queue")
        folder, corpus = Path(found["corpus"] + ".slurm"), Path(found["corpus"])
        text = prepare_script(cfg, folder=folder, corpus=corpus, arguments=arguments, **common)
        what = f"{cfg.nodes} parts of {found['units']} units"
    else:
        if not found["steps"]:
            raise ClusterError(
                f"all checkpoints of {found['run_dir']} have a result of {save}; name steps with --steps"
            )
        run_dir = Path(found["run_dir"])
        folder = run_dir / "evaluations" / save
        text = evaluate_script(
            cfg, folder=folder, run_dir=run_dir, steps=found["steps"], save=save, data=args.data, **common
        )
        what = f"steps {', '.join(map(str, found['steps']))}, {cfg.nodes} at a time"
    if args.dry_run:
        print(text, end="")
        return 0
    refuse_second_job(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = write_script(folder, text)
    jobs = [queue(folder, path)]
    for _ in range(found.get("passes", 1) - 1):
        jobs.append(queue(folder, path, f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"))
    print(
        f"queued: job {', and then '.join(jobs)}, {what}\n"
        f"  its script    {path}\n"
        f"  its output    {folder / f'{jobs[0]}-*.out'}\n"
        f"  stop it       scancel {' '.join(jobs)}"
    )
    return 0


def check_all(cfg: ClusterConfig, args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """What launcher/check.py finds; all that it or SLURM refuses is told together."""
    wrong, found = [], {}
    try:
        found = check_run(cfg, arguments, args.dry_run)
    except ClusterError as error:
        wrong.append(str(error))
    if not args.dry_run:
        try:
            slurm.refuse_what_slurm_lacks(cfg)
        except ClusterError as error:
            wrong.append(f"{args.cluster}: {error}")
    if wrong:
        raise ClusterError("\n".join(wrong))
    return found


def queue(folder: Path, script: Path, *options: str) -> str:
    """Have sbatch take it, and note that in the folder's jobs.jsonl; returns the job's id."""
    for last in ("--test-only", "--parsable"):
        done = slurm.command("sbatch", last, *options, str(script))
        if done.returncode:
            raise ClusterError(f"sbatch refuses {script}: {done.stderr.strip()}")
    job = done.stdout.strip().splitlines()[-1].split(";")[0]
    note(folder, "submitted", job=job, script=str(script))
    return job


def check_run(cfg: ClusterConfig, arguments: list[str], write_nothing: bool) -> dict[str, Any]:
    """Have launcher/check.py judge it as the job will: what it says of its folder, name, and what is to be done."""
    fewer = {n * cfg.ranks_per_node: n for n in range(cfg.least_nodes, cfg.nodes)}
    command = [sys.executable, str(ROOT / "launcher/check.py"), "--ranks", str(cfg.ranks), *arguments,
               *(f"--fewer-ranks={ranks}" for ranks in fewer)]  # fmt: skip
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
    if "fewer_ranks" not in run:  # not of a training
        return run
    counts = [*(fewer[ranks] for ranks in run["fewer_ranks"]), cfg.nodes]
    if cfg.least_nodes not in counts:
        raise ClusterError(
            f"min_nodes: got {cfg.min_nodes}; the batch does not divide over {cfg.least_nodes * cfg.ranks_per_node} ranks; "
            f"numbers of nodes that do are {', '.join(map(str, counts))}"
        )
    return {**run, "node_counts": counts}


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
