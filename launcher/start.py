"""What the commands that train do before a process group exists, and the little that is different between them."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.tokenizer_base import CONFIG_FILE, read_config
from launcher.config import (
    ConfigError,
    FinetuneConfig,
    RunConfig,
    contradictions,
    load_config,
    unknown_keys,
    validate,
)
from launcher.evaluation import evaluate_text
from launcher.limits import allow_files, check_threads
from launcher.metrics import MetricsLog
from launcher.run_data import RunData, open_data
from launcher.run_dir import Ledger, read_saved_config
from launcher.saving import Progress, fresh_weights
from launcher.teacher import with_teacher
from launcher.trained import Initial, build_model
from model.hf_config import is_masked
from parallel.checkpoint import CheckpointError, Manifest, committed_steps, folder_name, read_manifest
from parallel.deepspeed_config import check_passthrough
from parallel.engine import Engine
from parallel.mesh import Mesh, Place, check_device, device_index, place_from_environment

# (cfg, engine, data, sample, metrics, step, enter) -> scores by name, the same on every rank; see launcher/evaluation.py
Evaluate = Callable[[RunConfig, Engine, RunData, int, MetricsLog | None, int, Callable[[str], None]], dict[str, float]]


@dataclass(frozen=True)
class Command:
    """All that differs between launcher/pretrain.py and launcher/finetune.py; the train loop is the same."""

    name: str  # with which its refusals begin
    description: str
    example: str
    load: Callable[[str, list[str]], RunConfig]  # recipe and overrides; raises ConfigError, DataError
    # (cfg, cursor, step, dp_size, left_out) -> the run's data; see launcher/run_data.py
    open_data: Callable[[RunConfig, dict[str, Any] | None, int, int, list[tuple[int, int]]], RunData]
    build_model: Callable[[RunConfig], nn.Module]  # parameters without values
    initial: Callable[
        [RunConfig, Mesh], Initial
    ]  # values of the first step; all ranks call it, before the model is built
    evaluate: Evaluate
    uses: Callable[[RunConfig], dict[str, str]]  # what to do with the result, and how to type it after `python`


def uses_of_text(cfg: RunConfig) -> dict[str, str]:
    """Of a language model."""
    if is_masked(cfg.model):
        return {
            "make a folder for transformers of it": f"launcher/export.py {cfg.run_dir} --output exports/{cfg.run.name}"
        }
    return {"sample its text": f"launcher/generate.py {cfg.run_dir} --prompt 'def '"}


PRETRAIN = Command(
    name="pretrain",
    description="Pretrain, or go on from the run's newest good checkpoint.",
    example="deepspeed --num_accelerators 2 launcher/pretrain.py --config configs/embedded.yaml "
    "train.steps=100 run.name=try",
    load=load_config,
    open_data=open_data,
    build_model=build_model,
    initial=fresh_weights,
    evaluate=evaluate_text,
    uses=uses_of_text,
)


def parse_arguments(argv: list[str], command: Command = PRETRAIN) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"deepspeed launcher/{command.name}.py",
        description=command.description,
        epilog=f"example: {command.example}",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="config key that a resumed "
                        "run may change on purpose; may be repeated")  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # passed by deepspeed
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)  # options may stand between overrides


def check(args: argparse.Namespace, command: Command = PRETRAIN) -> tuple[RunConfig, Place, RunData]:
    """Everything that can be refused before a process group or a model exists."""
    cfg = command.load(args.config, args.overrides)
    cfg = with_teacher(cfg, needed=not is_finished(cfg))
    place = place_from_environment(os.environ)
    check_device(cfg.parallel.precision)
    device_index(place)
    data = check_run(cfg, args.allow_change, place.world_size, command)
    check_threads()
    allow_files(data.most_files(), place.world_size)
    return cfg, place, data


def check_run(cfg: RunConfig, allow_change: list[str], ranks: int, command: Command) -> RunData:
    """What can be refused on any machine, also on one that will not compute. Returns the run's data."""
    if wrong := check_passthrough(cfg.parallel):
        raise ConfigError("\n".join(wrong))
    cfg.grad_accum_steps(ranks)
    refuse_other_config(cfg, allow_change)
    data = open_again(cfg, ranks, Ledger(cfg.run_dir).left_out(), command)
    _refuse_other_tokenizer(cfg, data)
    scores = data.scores()
    if cfg.eval.keep_best is not None and cfg.eval.keep_best not in scores:
        raise ConfigError(
            f"eval.keep_best={cfg.eval.keep_best} is nothing that this run measures; it measures "
            f"{', '.join(scores) or 'nothing, as no data is held out'}"
        )
    return data


def refuse_other_config(cfg: RunConfig, allowed: list[str]) -> None:
    """Raise ConfigError when the run's folder holds a run of another config, listing the keys."""
    if unknown := unknown_keys(cfg, allowed):
        raise ConfigError(
            f"--allow-change {unknown[0]}: no such key; expected section.key, one for each --allow-change"
        )
    saved = read_saved_config(cfg.run_dir)
    if saved is None:
        return
    if committed_steps(cfg.run_dir / "checkpoints") and (reshaped := _other_shapes(saved, cfg)):
        begin = f", which may begin with what this one has learned: init={cfg.run_dir}" * isinstance(
            cfg, FinetuneConfig
        )
        raise ConfigError(
            f"{cfg.run_dir} holds a run of another model, whose checkpoints cannot be read into this one:\n"
            + "\n".join(f"  {line}" for line in reshaped)
            + f"\nthese cannot be changed in a run: set them back, or use another run.name{begin}"
        )
    wrong = contradictions(saved, cfg.model_dump(mode="json"), allowed)
    if wrong:
        raise ConfigError(
            f"{cfg.run_dir} holds a run of another config:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nuse another run.name, set the keys back, or allow each on purpose with --allow-change KEY"
        )


def _other_shapes(saved: dict[str, Any], cfg: RunConfig) -> list[str]:
    """The keys that differ and that the weights' names and shapes depend on, where these then differ."""
    try:
        before = validate(saved, "")
    except ConfigError:  # of another version of this program: contradictions tells
        return []
    if _shapes(before) == _shapes(cfg):
        return []
    told = contradictions(saved, cfg.model_dump(mode="json"), [])
    return [line for line in told if line.startswith(("model.", "lora", "task:", "task.kind:", "task.labels:"))]


def _shapes(cfg: RunConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in build_model(cfg).named_parameters()}


def _refuse_other_tokenizer(cfg: RunConfig, data: RunData) -> None:
    """Raise ConfigError where the run was imported, or learns from a teacher, of another tokenizer than its data's."""
    teacher = cfg.distill.origin if cfg.distill is not None else None
    if cfg.distill is not None and teacher is not None and teacher.tokenizer != data.tokenizer.fingerprint:
        raise ConfigError(
            f"distill.teacher={cfg.distill.teacher} was trained with the tokenizer {teacher.tokenizer}, the data has "
            f"{data.tokenizer.fingerprint}, to which other ids mean other text; name another teacher, or "
            "prepare the text with the teacher's"
        )
    own = cfg.run_dir / "tokenizer"
    if Ledger(cfg.run_dir).imported() is None:
        return  # its first save holds it to its data
    if (theirs := read_config(own / CONFIG_FILE).get("fingerprint")) != data.tokenizer.fingerprint:
        raise ConfigError(
            f"{data.tokenizer.folder} has the tokenizer {data.tokenizer.fingerprint}, the run has {theirs} in {own}, to "
            "which other ids mean other text; prepare a corpus for it: launcher/prepare.py --config "
            f"{cfg.run_dir / 'config.yaml'}"
        )


def open_again(cfg: RunConfig, dp_size: int, left_out: list[tuple[int, int]], command: Command = PRETRAIN) -> RunData:
    """The run's data as it is from the newest checkpoint on, or from the beginning."""
    return command.open_data(cfg, *saved_position(cfg.run_dir / "checkpoints"), dp_size, left_out)


def saved_position(checkpoints: Path) -> tuple[dict[str, Any] | None, int]:
    """Data cursor and step of the newest checkpoint; None and 0 before any step, or where it is damaged (resume tells)."""
    manifest = _newest(checkpoints)
    return (None, 0) if manifest is None or not manifest.step else (manifest.cursor, manifest.step)


def _newest(checkpoints: Path) -> Manifest | None:
    steps = committed_steps(checkpoints)
    if not steps:
        return None
    try:
        return read_manifest(checkpoints / folder_name(steps[-1]))
    except CheckpointError:
        return None


def is_finished(cfg: RunConfig) -> bool:
    """Whether the run was evaluated and ended, with all its steps or because eval.patience was at its end."""
    steps = committed_steps(cfg.run_dir / "checkpoints")
    if not steps or not Ledger(cfg.run_dir).tells_finished(steps[-1]):
        return False
    if steps[-1] >= cfg.train.steps:
        return True
    manifest = _newest(cfg.run_dir / "checkpoints")
    return manifest is not None and Progress(step=manifest.step, **manifest.totals).at_end(cfg)


def refuse_stop_behind(cfg: RunConfig, saved: list[int]) -> None:
    """Raise ConfigError where the run is to stop at a step that it has behind it. saved: steps of its checkpoints."""
    if saved and cfg.train.end <= saved[-1] < cfg.train.steps:
        raise ConfigError(
            f"{cfg.run_dir} stands at step {saved[-1]} and train.stop_at={cfg.train.stop_at}; to go on, give a later step "
            "or leave it out"
        )
