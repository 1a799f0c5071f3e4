"""Sample text from a run's newest checkpoint: `python launcher/generate.py runs/NAME --prompt 'def '`.

The sharded checkpoint is read without its engine, whatever topology wrote it. Exit code 2 when it cannot be read.
"""

import argparse
import sys
from pathlib import Path

import torch

from data.errors import DataError
from data.tokenizer import Tokenizer
from launcher.config import ConfigError
from launcher.sampling import sample
from launcher.trained import open_checkpoint
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError


def load_model(run_dir: Path, step: int | None) -> tuple[Transformer, Tokenizer]:
    """The model of a run in fp32, and its tokenizer. step: a checkpoint's step, None for the newest.

    Raises CheckpointError where there is none or it is damaged.
    """
    checkpoint = open_checkpoint(run_dir, step)
    return checkpoint.model(), checkpoint.tokenizer()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python launcher/generate.py",
        description="Continue prompts with a pretrained run.",
        epilog="example: python launcher/generate.py runs/embedded --prompt 'def main(' --tokens 100",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    parser.add_argument("--tokens", type=int, default=100, help="at most so many new tokens (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_model(args.run, args.step)
        for prompt in args.prompt:
            with torch.inference_mode():
                ids = sample(
                    model,
                    tokenizer.encode(prompt).tolist(),
                    args.tokens,
                    seq_len=model.cfg.seq_len,
                    eos_id=tokenizer.eos_id,
                    vocab_size=tokenizer.vocab_size,
                    temperature=args.temperature,
                    top_k=args.top_k,
                    seed=args.seed,
                )
            print(tokenizer.decode(ids))
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
