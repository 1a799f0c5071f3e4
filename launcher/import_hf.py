"""From a Hugging Face folder to a run to go on from: its model is step 0 of a run of your own.

    python launcher/import_hf.py FOLDER --config RECIPE run.name=NAME        # or hf://ORG/NAME
    deepspeed launcher/pretrain.py --config runs/NAME/config.yaml

The recipe is a pretraining's without a model section, which comes from the folder like the tokenizer. The run's folder
then holds config.yaml, tokenizer/ and a checkpoint of step 0 that every command reads; pretraining goes on from it with the
recipe's own schedule and AdamW's moments at zero, and needs the Hugging Face folder no more. Weights are written a file at
a time; killed at any time the run's folder is absent or whole. Exit codes: 0 written, 1 not written, 2 refused.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError
from launcher.config import ConfigError, RunConfig, is_finetune, read_recipe, to_yaml, validate
from launcher.origin import HUB, FolderOrigin, GrownOrigin, Origin, open_origin
from launcher.origin_config import grown_as_asked, put_in_model, tokenizer_section
from launcher.origin_weights import match_model
from launcher.redaction import hide
from launcher.run_dir import Ledger
from launcher.staging import StagingError, check_absent, staging_for
from launcher.teacher import with_teacher
from launcher.trained import build_plain
from model.hf_folder import CONFIG, is_hf_folder
from parallel.checkpoint import Manifest
from parallel.step_zero import write_step_zero

CHOOSE = "another run.name"
SLACK_BYTES = 2**25  # for tokenizer and config


def open_folder(place: str) -> FolderOrigin:
    """Raises ConfigError or DataError where it cannot be used."""
    if not place.startswith(HUB) and not is_hf_folder(Path(place)):
        more = "; it is a run's folder: go on from it by its own recipe, or name it as init of launcher/finetune.py"
        raise ConfigError(
            f"{place} is no Hugging Face folder, as it has no {CONFIG}"
            + (more if (Path(place) / "checkpoints").is_dir() else f"; a model of the hub is {HUB}ORG/NAME")
        )
    try:
        opened = open_origin(place)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("init: ")) from None
    assert isinstance(opened, FolderOrigin)
    return opened


def load_import_config(path: str, overrides: list[str], opened: FolderOrigin) -> tuple[RunConfig, Origin]:
    """A recipe with model and tokenizer of the folder put in, and the folder's model, grown where the recipe adds tokens.

    Raises ConfigError where recipe and folder contradict each other.
    """
    raw = read_recipe(path, overrides)
    if is_finetune(raw):
        raise ConfigError(
            f"{path} has init and task, so it is of a fine-tuning, which begins with a folder by itself: "
            f"launcher/finetune.py --config {path} init={opened.place}"
        )
    origin, tokenizer = grown_as_asked(opened, raw)
    put_in_model(raw, path, str(opened), origin.model, tokenizer)
    cfg = validate(raw, path)
    raw["data"]["tokenizer"] = tokenizer_section(origin.tokenizer) | {"path": str(cfg.run_dir / "tokenizer")}
    return with_teacher(validate(raw, path)), origin


def shapes_of(opened: Origin, cfg: RunConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """(weights that the run has, the folder's that it has no place for). Raises ConfigError."""
    with torch.device("meta"):
        model = build_plain(cfg)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes, match_model(model, shapes, opened)[1]


def import_folder(opened: Origin, shapes: dict[str, tuple[int, ...]], cfg: RunConfig, place: str) -> None:
    """Write the run's folder. Raises StagingError where it cannot be, ValueError for weights that are not finite."""
    n_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
    with staging_for(cfg.run_dir, n_bytes + SLACK_BYTES, "import", CHOOSE) as staging:
        opened.tokenizer.save(staging / "tokenizer")
        write_step_zero(staging / "checkpoints", manifest_of(shapes, cfg), weights_of(opened, shapes))
        (staging / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        Ledger(staging).add("imported", step=0, place=place, digest=opened.digest)


def manifest_of(shapes: dict[str, tuple[int, ...]], cfg: RunConfig) -> Manifest:
    return Manifest(
        step=0,
        adam_steps=0,
        world_size=1,
        zero_stage=0,
        shapes={name: list(shape) for name, shape in shapes.items()},
        files={},
        cursor={},
        config=cfg.model_dump(mode="json"),
        totals={"tokens": 0},
        versions={name: version(name) for name in ("torch", "transformers", "longhaul")},
    )


def weights_of(opened: Origin, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, opened.read(name, 0, math.prod(shape))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/import_hf.py",
        description="Make a run of a Hugging Face folder, to go on pretraining from.",
        epilog="example: python launcher/import_hf.py exports/embedded --config more.yaml run.name=more",
    )
    parser.add_argument("folder", help=f"of a GPT-2, Llama, Qwen3, BERT, DistilBERT or ELECTRA, or {HUB}ORG/NAME")
    parser.add_argument("--config", required=True, help="recipe of a pretraining, without a model section")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        cfg, origin = load_import_config(args.config, args.overrides, open_folder(args.folder))
        check_absent(cfg.run_dir, CHOOSE)
        shapes, dropped = shapes_of(origin, cfg)
        import_folder(origin, shapes, cfg, args.folder)
    except (ConfigError, DataError, StagingError, ValueError) as error:
        print(hide(f"import_hf: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        print(hide(f"import_hf: {error}"), file=sys.stderr)
        return 1
    recipe, n = cfg.run_dir / "config.yaml", sum(map(math.prod, shapes.values()))
    print(f"{cfg.run_dir}: {n:,} parameters of {args.folder} as step 0")
    if isinstance(origin, GrownOrigin):
        print(origin.told())
    if dropped:
        print(f"  dropped: {', '.join(f'{name} {origin.shapes[name]}' for name in dropped)}")
    print(f"  prepare its text  python launcher/prepare.py --config {recipe}")
    print(f"  go on from it     deepspeed launcher/pretrain.py --config {recipe}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
