"""Refuse a job before it is queued: `python launcher/check.py --config R --ranks 16 [section.key=value …]`.

Of a run: what launcher/pretrain.py or launcher/finetune.py, whichever the recipe is for, would refuse at its start, but for
what only the machine that computes can tell: recipe, data, another run in its folder, space for a checkpoint. With --job
prepare or evaluate: what those commands would.

The last line is JSON. Of a run: run_dir, name, finished, command, fewer_ranks (those of --fewer-ranks that the batch divides
over). Of prepare: corpus, name, units, finished, and passes: how many times the parts must be started. Of evaluate: run_dir,
name, steps. Exit code 2 where the job is refused.
"""

import argparse
import json
import os
import sys
from typing import Any

from data.errors import DataError
from data.prepare import unfinished
from data.sources import Limits, open_source
from launcher.config import ConfigError, FinetuneConfig, RunConfig, validate
from launcher.evaluate import corpus_among, open_held_out, source_of
from launcher.finetune import command_for
from launcher.limits import LimitError
from launcher.pretrain import begin_logging
from launcher.redaction import hide
from launcher.results import refuse_other_data, result_path
from launcher.run_dir import RunDirError, prepare_run_dir, read_saved_config
from launcher.saving import checkpoint_bytes
from launcher.start import check_run, is_finished, refuse_stop_behind
from launcher.task_config import TextTask
from launcher.teacher import with_teacher
from parallel.checkpoint import committed_steps


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/check.py",
        description="Refuse a job before it is queued.",
        epilog="example: python launcher/check.py --config configs/embedded.yaml --ranks 2 train.steps=100",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--job", choices=("pretrain", "prepare", "evaluate"), default="pretrain")
    parser.add_argument("--ranks", type=int, default=1, help="that the run will have")
    parser.add_argument(
        "--fewer-ranks", action="append", type=int, default=[], help="that it may have, too; of several each"
    )
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as launcher/pretrain.py")
    parser.add_argument(
        "--steps", help="of the checkpoints to evaluate, with commas; all without a result if not given"
    )
    parser.add_argument("--save", metavar="NAME", default="held-out", help="of the results, as launcher/evaluate.py")
    parser.add_argument("--data", action="append", default=[], help="as launcher/evaluate.py; may be repeated")
    parser.add_argument("--write-nothing", action="store_true", help="do not make the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def check_training(args: argparse.Namespace, cfg: RunConfig) -> dict[str, Any]:
    command, cfg = command_for(args.config), with_teacher(cfg, needed=not is_finished(cfg))
    check_run(cfg, args.allow_change, args.ranks, command)
    if not args.write_nothing:
        prepare_run_dir(cfg, checkpoint_bytes(cfg, command.build_model))
    refuse_stop_behind(cfg, committed_steps(cfg.run_dir / "checkpoints"))
    fewer = [ranks for ranks in args.fewer_ranks if divides(cfg, ranks)]
    return {"run_dir": os.path.abspath(cfg.run_dir), "name": cfg.run.name, "finished": is_finished(cfg),
            "command": command.name, "fewer_ranks": fewer}  # fmt: skip


def divides(cfg: RunConfig, ranks: int) -> bool:
    try:
        cfg.grad_accum_steps(ranks)
    except ConfigError:
        return False
    return True


def check_prepare(args: argparse.Namespace, cfg: RunConfig) -> dict[str, Any]:
    units = unfinished(cfg.data)
    # Where documents are compared with each other, parts that do not run at the same time end before it is decided
    passes = 2 if cfg.data.clean.two_passes else 1
    return {"corpus": os.path.abspath(cfg.data.corpus), "name": cfg.run.name, "units": units, "finished": units is None,
            "passes": passes}  # fmt: skip


def check_evaluate(args: argparse.Namespace, cfg: RunConfig) -> dict[str, Any]:
    saved, have = read_saved_config(cfg.run_dir), committed_steps(cfg.run_dir / "checkpoints")
    if saved is None or not have:
        near = sorted(str(path.parent) for path in cfg.run_dir.parent.glob("*/checkpoints"))
        what = "is no folder of a run" if saved is None else "has no checkpoint yet"
        raise ValueError(f"{cfg.run_dir} {what}; beside it: {', '.join(near) or 'none'}")
    run = validate(saved, str(cfg.run_dir / "config.yaml"))
    corpus, is_corpus = corpus_among(args.data)
    if isinstance(run, FinetuneConfig) and not isinstance(run.task, TextTask):
        pass  # its examples are files that launcher/evaluate.py judges
    elif is_corpus:
        open_held_out(run, corpus)
    else:
        for path in args.data:
            open_source(source_of(path, "text"), Limits())
    refuse_other_data(cfg.run_dir, args.save, args.data)
    steps = [step for step in have if not result_path(cfg.run_dir, args.save, step).is_file()]
    if args.steps is not None:
        steps = _steps(args.steps)
        if missing := sorted(set(steps) - set(have)):
            raise ValueError(
                f"{cfg.run_dir} has no checkpoint of step {', '.join(map(str, missing))}; it has: "
                + ", ".join(map(str, have))
            )
    return {"run_dir": os.path.abspath(cfg.run_dir), "name": cfg.run.name, "steps": steps}


def _steps(text: str) -> list[int]:
    try:
        return sorted({int(step) for step in text.split(",")})
    except ValueError:
        raise ValueError(f"--steps {text}; expected steps with commas between them, such as 1000,2000") from None


CHECKS = {"pretrain": check_training, "prepare": check_prepare, "evaluate": check_evaluate}


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    begin_logging()
    try:
        found = CHECKS[args.job](args, command_for(args.config).load(args.config, args.overrides))
    except (DataError, RunDirError, LimitError, ValueError) as error:  # ConfigError is a ValueError
        print(hide(str(error)), file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
