"""Refuse a run before it is queued: `python launcher/check.py --config R --ranks 16 [section.key=value …]`.

What launcher/pretrain.py or launcher/finetune.py, whichever the recipe is for, would refuse at its start, but for what only
the machine that computes can tell: recipe, data, another run in its folder, space for a checkpoint. The last line is JSON:
run_dir, name, finished, command. Exit code 2 where the run is refused.
"""

import argparse
import json
import os
import sys

from data.errors import DataError
from launcher.config import ConfigError
from launcher.finetune import command_for
from launcher.limits import LimitError
from launcher.pretrain import begin_logging
from launcher.redaction import hide
from launcher.run_dir import RunDirError, prepare_run_dir
from launcher.start import check_run, is_finished, refuse_stop_behind
from parallel.checkpoint import committed_steps


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/check.py",
        description="Refuse a run before it is queued.",
        epilog="example: python launcher/check.py --config configs/embedded.yaml --ranks 2 train.steps=100",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--ranks", required=True, type=int, help="that the run will have")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as launcher/pretrain.py")
    parser.add_argument("--write-nothing", action="store_true", help="do not make the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    begin_logging()
    try:
        command = command_for(args.config)
        cfg = command.load(args.config, args.overrides)
        check_run(cfg, args.allow_change, args.ranks, command)
        if not args.write_nothing:
            prepare_run_dir(cfg, needed_bytes=12 * cfg.model.n_params)  # fp32 weights and two moments
        refuse_stop_behind(cfg, committed_steps(cfg.run_dir / "checkpoints"))
    except (ConfigError, DataError, RunDirError, LimitError) as error:
        print(hide(str(error)), file=sys.stderr)
        return 2
    facts = {"run_dir": os.path.abspath(cfg.run_dir), "name": cfg.run.name, "finished": is_finished(cfg)}
    print(json.dumps({**facts, "command": command.name}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
