"""Continue prompts with a run's checkpoint or a Hugging Face folder.

    python launcher/generate.py runs/NAME --prompt 'def '
    python launcher/generate.py exports/NAME --prompt 'def ' --prompt 'class ' --top-p 0.95 --stop $'\\n\\n'
    python launcher/generate.py runs/CHAT --chat                         # a line you type, a line it answers

The sharded checkpoint is read without its engine, whatever topology wrote it. One prompt's text is shown as it comes,
that of several when each is finished. Exit code 2 when something cannot be read or asked for.
"""

import argparse
import sys
from pathlib import Path

from data.errors import DataError
from data.tokenizer import Tokenizer
from launcher.chat import Chat, talk, template_of
from launcher.config import ConfigError
from launcher.continuation import Options, continue_prompts
from launcher.trained import Trained, how_to_fill, load_trained, open_checkpoint
from model.hf_config import is_masked
from model.hf_folder import DTYPES
from model.network import Network
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError


def load_model(run_dir: Path, step: int | None) -> tuple[Network, Tokenizer]:
    """The model of a run in fp32, and its tokenizer. step: a checkpoint's step, None for the newest.

    Raises CheckpointError where there is none or it is damaged.
    """
    checkpoint = open_checkpoint(run_dir, step)
    return checkpoint.model(), checkpoint.tokenizer()


def show(number: int, text: str) -> None:
    print(text, end="", flush=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/generate.py",
        description="Continue prompts with a pretrained run, or with a Hugging Face folder of a GPT-2, Llama or Qwen3.",
        epilog="example: python launcher/generate.py runs/embedded --prompt 'def main(' --tokens 100 --top-p 0.95",
    )
    parser.add_argument("model", type=Path, help="a run's folder, or a Hugging Face folder such as export.py writes")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue, with --chat a message; may "
                        "be repeated")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="answer messages, each prompt the first of a conversation; "
                        "without prompts those of the terminal, as one conversation")  # fmt: skip
    parser.add_argument("--system", help="with --chat: what the model is told before the first message")
    parser.add_argument("--tokens", type=int, default=100, help="at most so many new tokens (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="and among the likeliest that have so much of the "
                        "probability together; 1 for all")  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint of a run to read (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="to compute in (default fp32)")
    parser.add_argument("--no-cache", action="store_true", help="read the whole text again for every token; the same "
                        "numbers but for rounding")  # fmt: skip
    return parser.parse_args(argv)


def refuse_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go together."""
    if not args.prompt and not args.chat:
        raise ValueError("there is nothing to continue; give --prompt TEXT, or --chat")
    if args.system is not None and not args.chat:
        raise ValueError("--system has no effect without --chat; add it, or leave --system out")


def refuse_model(trained: Trained, name: Path) -> None:
    """Raise ValueError for a model that continues no text, or none here."""
    if trained.head is not None:
        raise ValueError(f"{name} gives labels and no text; label texts with launcher/label.py {name}")
    if is_masked(trained.model.cfg):
        raise ValueError(
            f"{name} is a masked model, which fills in hidden tokens and continues no text; {how_to_fill(trained, name)}"
        )
    if not isinstance(trained.model, Transformer):
        raise ValueError(
            f"{name} is of model.family=hf, whose text is not drawn here; launcher/export.py {name} --output FOLDER, then "
            "transformers.pipeline('text-generation', model=FOLDER)"
        )


def chat(trained: Trained, args: argparse.Namespace, options: Options) -> None:
    """Answer the prompts, or the terminal until its end (Ctrl-D)."""
    template = template_of(trained, args.model)
    if not args.prompt:
        talk(Chat(trained, template, options, args.system), sys.stdin, lambda text: show(0, text))
    for prompt in args.prompt:
        Chat(trained, template, options, args.system).say(prompt, lambda text: show(0, text))
        print()


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        options = Options(
            n_tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
            stop=tuple(args.stop), cache=not args.no_cache,
        )  # fmt: skip
        refuse_arguments(args)
        trained = load_trained(args.model, args.step, DTYPES[args.dtype])
        refuse_model(trained, args.model)
        if args.chat:
            chat(trained, args, options)
            return 0
        prompts = [trained.prompt_ids(prompt) for prompt in args.prompt]
        if len(prompts) == 1:
            show(0, args.prompt[0])
            continue_prompts(trained.model, trained.tokenizer, prompts, options, show)
            print()
        else:
            for row in continue_prompts(trained.model, trained.tokenizer, prompts, options):
                print(row.prompt_text + row.text)
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
