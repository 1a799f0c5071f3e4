"""Make a prepared corpus: train or load the tokenizer, turn text into token shards.

    python launcher/prepare.py --config configs/R.yaml
    python launcher/prepare.py --config configs/R.yaml data.tokenizer.vocab_size=4096 data.corpus=corpora/small
    python launcher/prepare.py --config configs/R.yaml data.on_bad=skip data.clean.exact=true

Which texts, which tokenizer and which folder: the recipe's data section. All cores take part. Stopped at any point, the
same command goes on with the units that are not finished.

Several nodes share the work when each is started with a part of it, on a file system that all of them see:

    python launcher/prepare.py --config configs/R.yaml --part 0/4        # and 1/4, 2/4, 3/4 elsewhere
    sbatch --array=0-3 --wrap "python launcher/prepare.py --config configs/R.yaml"
    srun -n 4 python launcher/prepare.py --config configs/R.yaml

Under an array or srun the part comes from SLURM's variables. The part that finishes last writes the manifest; one that
ends before says how much is missing. Where duplicates are looked for (data.clean), parts wait for each other once, so
all should run at the same time; those that end early for that are to be started again.

    python launcher/prepare.py --config configs/R.yaml --verify          # reads a finished corpus and compares all hashes

Exit codes: 0 done, or this part done; 1 the machine failed, or --verify found a file that is not as it was written; 2
something asked for cannot be done; 130 stopped by Ctrl-C.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import NoReturn

from data.urls import redact

# the rest is imported in main: worker processes import this file again, and the whole config brings in the model and torch


def main(arguments: list[str] | None = None) -> int:
    from data.errors import DataError
    from data.prepare import Part, PrepareError, prepare_part, report
    from data.workers import WorkerDied
    from launcher.config import ConfigError, FinetuneConfig
    from launcher.origin_config import load_recipe
    from launcher.run_dir import RunDirError

    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    again = "finished shards are kept: run the same command to go on"
    try:
        number, of = part_of(args.part, os.environ)
        if not 0 <= number < of:
            raise PrepareError(f"part {number}/{of} does not exist; parts are numbered 0/{of} to {of - 1}/{of}")
        recipe = load_recipe(args.config, args.overrides)
        if of > 1:
            print(f"part       {number}/{of}", flush=True)
        cfg = recipe.data
        if args.verify:
            return _verify(cfg.corpus)
        manifest = prepare_part(cfg, Part(number, of), recipe.model.seq_len)
    except (ConfigError, DataError, RunDirError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except (OSError, WorkerDied) as error:
        print(f"prepare: {error}\n{again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)  # heard
        print(f"\nprepare: stopped; {again}", file=sys.stderr)
        return 130
    if manifest is None:
        return 0
    print(report(manifest))
    n_shards = sum(len(split.shards) for source in manifest.sources.values() for split in source.splits.values())
    print(f"corpus     {cfg.corpus}: {n_shards} shards, {manifest.dtype} tokens; report.json has the table's numbers")
    if n_bad := sum(count for source in manifest.sources.values() for reason, count in source.left_out.items()
                    if reason.startswith("bad:")):  # fmt: skip
        print(f"malformed  {cfg.corpus}/bad.jsonl: {n_bad:,} documents left out")
    print(f"tokenizer  {cfg.corpus}/tokenizer: {manifest.tokenizer.vocab_size} pieces")
    command = "finetune" if isinstance(recipe, FinetuneConfig) else "pretrain"
    print(f"next       deepspeed launcher/{command}.py {shlex.join(['--config', args.config, *args.overrides])}")
    return 0


def _verify(corpus: str) -> int:
    from data.verify import verify

    found = verify(corpus)
    if found.wrong:
        print("\n".join(found.wrong), file=sys.stderr)
        print(f"{corpus}: {len(found.wrong)} wrong among {found.files:,} files and the tokenizer", file=sys.stderr)
        return 1
    elsewhere = f"; not read: {', '.join(found.at_urls)}, at a URL" if found.at_urls else ""
    print(f"verified   {corpus}: {found.files:,} files, {found.n_bytes:,} bytes of tokens, and the tokenizer are as they "
          f"were written{elsewhere}")  # fmt: skip
    return 0


def part_of(asked: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(number, of): the part asked for as "I/N", else this task's among those of a SLURM array and of srun.

    A batch script itself is task 0 of so many as sbatch was told (SLURM_PROCID, SLURM_NTASKS), though it runs alone; only
    in a step of srun (SLURM_STEP_ID) does each of them run. Raises ConfigError for what is not I/N.
    """
    from launcher.config import ConfigError

    if asked is not None:
        if not (found := re.fullmatch(r"(\d+)/(\d+)", asked)):
            raise ConfigError(f"--part {asked}; expected I/N such as 0/4, the first of four parts")
        return int(found[1]), int(found[2])
    number, of = 0, 1
    if (count := int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))) > 1:
        first, stride = (
            int(environment.get("SLURM_ARRAY_TASK_MIN", 0)),
            int(environment.get("SLURM_ARRAY_TASK_STEP", 1)),
        )
        number, of = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // max(stride, 1), count
        if not 0 <= number < of:
            raise ConfigError(
                f"SLURM_ARRAY_TASK_ID={environment['SLURM_ARRAY_TASK_ID']} is none of {of} equal steps from {first}; "
                "use an array without gaps such as --array=0-3, or --part"
            )
    if "SLURM_STEP_ID" in environment and (tasks := int(environment.get("SLURM_NTASKS", 1))) > 1:
        number, of = number * tasks + int(environment["SLURM_PROCID"]), of * tasks
    return number, of


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python launcher/prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--verify", action="store_true", help="prove that a finished corpus is as it was written")
    one.add_argument("--part", metavar="I/N", help="do the units whose number is I modulo N (0/N to N-1/N)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C, told again every second until main has heard it: Python drops what is raised in a callback of an import."""
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    raise KeyboardInterrupt


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job in the background
        for number in (signal.SIGINT, signal.SIGALRM):
            signal.signal(number, _interrupt)
    sys.exit(main())
