"""A run's checkpoints, for people: what there is, whether it is whole, and what can go.

    python launcher/checkpoint.py list runs/NAME
    python launcher/checkpoint.py verify runs/NAME [--step K]        # reads every file and compares it with its hash
    python launcher/checkpoint.py prune runs/NAME --keep 2 [--keep-every 1000] [--damaged] [--dry-run]

A training run verifies what it resumes from by itself and keeps as many as checkpoint.keep says; none of this is needed
for it. Exit codes: 0 done, and all is whole; 1 something is damaged or could not be removed; 2 refused.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.config import ConfigError, validate
from launcher.lease import sole_writer
from launcher.run_dir import RunDirError
from parallel.checkpoint import (
    STEP_NAME,
    CheckpointError,
    Manifest,
    UnreadableError,
    committed_steps,
    faults,
    folder_name,
    read_manifest,
)
from parallel.config import CheckpointConfig
from parallel.retention import remove, retire


def describe(path: Path) -> str:
    """One line on a checkpoint, from its manifest alone."""
    try:
        m = read_manifest(path)
    except UnreadableError as error:
        return f"{path.name}  UNREADABLE: {error}"
    except CheckpointError as error:
        return f"{path.name}  DAMAGED: {error}"
    n_bytes = sum(entry["bytes"] for entry in m.files.values())
    precision = m.config.get("parallel", {}).get("precision", "?")
    return (
        f"{path.name}  {n_bytes / 1e9:.3f} GB  {len(m.files)} files of {m.world_size} ranks  ZeRO {m.zero_stage}  "
        f"{precision}  {m.totals.get('tokens', 0):,} {counted(m)}"
        + ("  best of its evaluations until then" if m.totals.get("best_step") == m.step else "")
    )


def counted(manifest: Manifest) -> str:
    """The name of what the checkpoint's totals count."""
    try:
        return validate(manifest.config, "").what_counts
    except ConfigError:  # of another version of this program
        return "tokens or other targets"


def others(folder: Path) -> list[Path]:
    """What is no checkpoint: set aside as damaged, half written, half removed."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir()
        and STEP_NAME.match(entry.name)
        and not (STEP_NAME.fullmatch(entry.name) and (entry / "manifest.json").is_file())
    )


def list_checkpoints(folder: Path) -> Iterator[str]:
    for step in committed_steps(folder):
        yield describe(folder / folder_name(step))
    for path in others(folder):
        n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield f"{path.name}  {n_bytes / 1e9:.3f} GB  no checkpoint: {why_not(path)}"
    free = shutil.disk_usage(folder).free
    yield f"{len(committed_steps(folder))} checkpoints; {free / 1e9:.1f} GB free"


def why_not(path: Path) -> str:
    if ".damaged" in path.name:
        return "set aside by a resume that found it damaged"
    if ".staging" in path.name:
        return "being written, or left by a save that was killed"
    if ".replaced" in path.name:
        return "left by a save that took its place"
    return "its manifest is gone: its removal was begun"


def verify(folder: Path, steps: list[int]) -> tuple[list[str], bool]:
    """A line for each checkpoint, and whether all are whole."""
    lines, good = [], True
    for step in steps:
        wrong = faults(folder / folder_name(step))
        good &= not wrong
        lines += [f"{folder_name(step)}  {'whole' if not wrong else 'DAMAGED'}", *(f"    {text}" for text in wrong)]
    return lines, good


def prune(run_dir: Path, cfg: CheckpointConfig, damaged: bool, dry_run: bool) -> Iterator[str]:
    """Remove what need not stay; the newest whole one and the best stay whatever is asked."""
    folder = run_dir / "checkpoints"
    steps = committed_steps(folder)
    whole = next((step for step in reversed(steps) if not faults(folder / folder_name(step))), None)
    if whole is None and (steps or any(".staging" not in path.name for path in others(folder))):
        raise RunDirError(f"none of the checkpoints in {folder} is whole; nothing is removed")
    stay = frozenset() if whole is None else frozenset([whole, best_step(folder / folder_name(whole))])
    gone = retire(folder, cfg, stay=stay, dry_run=dry_run)
    for step in gone:
        yield f"{'would remove' if dry_run else 'removed'} {folder_name(step)}"
    for path in others(folder) if damaged else []:
        if not dry_run:
            remove(path)
        yield f"{'would remove' if dry_run else 'removed'} {path.name}: {why_not(path)}"
    yield f"{len(steps) - len(gone)} checkpoints stay"


def best_step(checkpoint: Path) -> int:
    """Of the run's best checkpoint by eval.keep_best, as this one tells it; 0 where none is."""
    return int(read_manifest(checkpoint).totals.get("best_step", 0))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "verify", "prune"):
        commands.add_parser(name).add_argument("run", type=Path, help="a run's folder")
    commands.choices["verify"].add_argument("--step", type=int, help="this one alone")
    of_prune = commands.choices["prune"]
    of_prune.add_argument("--keep", type=int, required=True, help="newest checkpoints that stay, at least 1")
    of_prune.add_argument("--keep-every", type=int, help="and those of steps that this divides")
    of_prune.add_argument("--damaged", action="store_true", help="also remove what is damaged or half written")
    of_prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    folder = args.run / "checkpoints"
    try:
        if not folder.is_dir():
            raise RunDirError(f"{folder} is not there; name the folder of a run that has saved, such as runs/NAME")
        if args.command == "list":
            print("\n".join(list_checkpoints(folder)))
            return 0
        if args.command == "verify":
            steps = committed_steps(folder)
            if args.step is not None and args.step not in steps:
                raise RunDirError(f"{folder} has no checkpoint of step {args.step}; it has {steps}")
            lines, good = verify(folder, steps if args.step is None else [args.step])
            print("\n".join(lines))
            return 0 if good else 1
        if args.keep < 1 or (args.keep_every is not None and args.keep_every < 1):
            raise RunDirError(f"--keep {args.keep} --keep-every {args.keep_every}; expected at least 1")
        with sole_writer(args.run, wait_s=0.0):
            for line in prune(
                args.run, CheckpointConfig(keep=args.keep, keep_every=args.keep_every), args.damaged, args.dry_run
            ):
                print(line)
        return 0
    except (RunDirError, CheckpointError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
