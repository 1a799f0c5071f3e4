"""Make a prepared corpus: train or load the tokenizer, turn text into token shards.

    python launcher/prepare.py --config configs/R.yaml
    python launcher/prepare.py --config configs/R.yaml data.tokenizer.vocab_size=4096 data.corpus=corpora/small

Which text, which tokenizer and which folder: the recipe's data section. All cores take part. Stopped at any point, the
same command goes on with the shards that are not finished. Exit codes: 0 done, 1 the machine failed, 2 something asked
for cannot be done, 130 stopped by Ctrl-C.
"""

import argparse
import logging
import sys

from data.errors import DataError
from data.prepare import prepare, report
from data.workers import WorkerDied


def main(arguments: list[str] | None = None) -> int:
    # not at the top: worker processes import this file again, and the whole config brings in the model and torch
    from launcher.config import ConfigError, load_config

    parser = argparse.ArgumentParser(
        prog="python launcher/prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    again = "finished shards are kept: run the same command to go on"
    try:
        cfg = load_config(args.config, args.overrides).data
        manifest = prepare(cfg)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, WorkerDied) as error:
        print(f"{error}\n{again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {again}", file=sys.stderr)
        return 130
    print(report(manifest))
    n_shards = sum(len(split.shards) for split in manifest.splits.values())
    print(f"corpus     {cfg.corpus}: {n_shards} shards, {manifest.dtype} tokens")
    print(f"tokenizer  {cfg.corpus}/tokenizer: {manifest.tokenizer.vocab_size} pieces")
    print(f"next       deepspeed launcher/pretrain.py {' '.join(['--config', args.config, *args.overrides])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
