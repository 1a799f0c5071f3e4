"""Refuse a run before it is queued: `python launcher/check.py --config R --ranks 16 [section.key=value …]`.

What launcher/pretrain.py would refuse at its start, but for what only the machine that computes can tell: recipe, data,
another run in its folder, space for a checkpoint. The last line is JSON: run_dir, name, finished, and which of
--fewer-ranks the batch divides over. Exit code 2 where the run is refused.
"""

import argparse
import json
import os
import sys

from data.errors import DataError
from launcher.config import ConfigError, RunConfig, load_config
from launcher.limits import LimitError
from launcher.pretrain import begin_logging, open_again, refuse_stop_behind
from launcher.redaction import hide
from launcher.run_dir import Ledger, RunDirError, prepare_run_dir, refuse_other_config
from parallel.checkpoint import committed_steps
from parallel.deepspeed_config import check_passthrough


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/check.py",
        description="Refuse a run before it is queued.",
        epilog="example: python launcher/check.py --config configs/embedded.yaml --ranks 2 train.steps=100",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--ranks", required=True, type=int, help="that the run will have")
    parser.add_argument(
        "--fewer-ranks", action="append", type=int, default=[], help="that it may have, too; of several each"
    )
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as launcher/pretrain.py")
    parser.add_argument("--write-nothing", action="store_true", help="do not make the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    begin_logging()
    try:
        cfg = load_config(args.config, args.overrides)
        if wrong := check_passthrough(cfg.parallel):
            raise ConfigError("\n".join(wrong))
        cfg.grad_accum_steps(args.ranks)
        refuse_other_config(cfg, args.allow_change)
        open_again(cfg, args.ranks, Ledger(cfg.run_dir).left_out())
        if not args.write_nothing:
            prepare_run_dir(cfg, needed_bytes=12 * cfg.model.n_params)  # fp32 weights and two moments
        steps = committed_steps(cfg.run_dir / "checkpoints")
        refuse_stop_behind(cfg, steps)
        finished = bool(steps) and steps[-1] >= cfg.train.steps and Ledger(cfg.run_dir).tells_finished(steps[-1])
    except (ConfigError, DataError, RunDirError, LimitError) as error:
        print(hide(str(error)), file=sys.stderr)
        return 2
    fewer = [ranks for ranks in args.fewer_ranks if divides(cfg, ranks)]
    told = {"run_dir": os.path.abspath(cfg.run_dir), "name": cfg.run.name, "finished": finished, "fewer_ranks": fewer}
    print(json.dumps(told))
    return 0


def divides(cfg: RunConfig, ranks: int) -> bool:
    try:
        cfg.grad_accum_steps(ranks)
    except ConfigError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
