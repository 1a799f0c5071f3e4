"""A trained model for the commands that use one: of a run's sharded checkpoint, read without its engine, or of a folder
of Hugging Face's.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.fast_tokenizer import before_text, load_exported
from data.tokenizer import Tokenizer
from launcher.config import FinetuneConfig, RunConfig, validate
from launcher.task_config import ClassifyTask, PreferenceTask, TagTask
from model.config import ModelConfig
from model.distill import Student
from model.hf import LabelHead
from model.hf_folder import CONFIG, DTYPES, is_hf_folder, read_config, read_head, read_model
from model.hf_model import HfClassifier
from model.lora import BASE, A, B, LoraConfig, add_adapters, is_adapter, merged, plain_name, within
from model.network import Network, build_classifier, build_network
from model.preference import Preference
from parallel.checkpoint import CheckpointError, CheckpointReader, committed_steps, faults, folder_name

NEW = "score."  # with which the names of a head for labels begin


def lora_of(cfg: RunConfig) -> LoraConfig | None:
    return cfg.lora if isinstance(cfg, FinetuneConfig) else None


def build_model(cfg: RunConfig) -> Network:
    """The model that a run of this config trains, with its adapters; its parameters have no values. Raises LoraError."""
    model, lora = build_plain(cfg), lora_of(cfg)
    if lora is not None:
        names = [name for name, _ in model.named_parameters()]
        is_head = model.is_head if isinstance(model, HfClassifier) else lambda name: name.startswith(NEW)
        add_adapters(model, lora, tuple(filter(is_head, names)))
    return model


def build_plain(cfg: RunConfig) -> Network:
    """The model that comes out of the run; its parameters have no values."""
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, ClassifyTask | TagTask):
        return build_classifier(cfg.model, len(cfg.task.labels), isinstance(cfg.task, TagTask))
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, PreferenceTask):
        assert isinstance(cfg.model, ModelConfig), "the config saw to it"
        return Preference(cfg.model, cfg.task.beta)
    if cfg.distill is not None:
        assert isinstance(cfg.model, ModelConfig), "the config saw to it"
        return Student(cfg.model)
    return build_network(cfg.model)


@dataclass(frozen=True)
class Initial:
    """What a run begins with."""

    read: Callable[[str, tuple[int, ...], int, int], Tensor]  # (name, whole shape, start, stop) -> (stop - start,) fp32
    told: tuple[str, ...] = ()  # lines that say where it is from


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a run, and what the run was then."""

    run_dir: Path
    reader: CheckpointReader
    cfg: RunConfig
    passed_over: tuple[str, ...] = ()  # what was wrong with newer ones, a line each

    @property
    def step(self) -> int:
        return self.reader.manifest.step

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.run_dir / "tokenizer")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that read_weight has."""
        shapes = self.reader.manifest.shapes
        return {plain_name(name): tuple(shape) for name, shape in shapes.items() if not is_adapter(name)}

    def read_weight(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter of the model without adapters, which are merged; fp32."""
        lora = lora_of(self.cfg)
        if lora is None or within(name, BASE) not in self.reader.manifest.shapes:
            return self.reader.read(name, "weight", start, stop)
        weight = self.reader.read(within(name, BASE), "weight", start, stop)
        if not name.endswith(".weight"):
            return weight
        a, b = (self.reader.tensor(within(name, part)) for part in (A, B))
        return merged(weight, a, b, lora.scaling, start)

    @property
    def label_head(self) -> LabelHead | None:
        """What it has in place of a head for tokens."""
        task = self.cfg.task if isinstance(self.cfg, FinetuneConfig) else None
        if isinstance(task, TagTask):
            return LabelHead(tuple(task.labels), True, {"join": task.join, "word_token": task.word_token})
        return LabelHead(tuple(task.labels), False) if isinstance(task, ClassifyTask) else None

    def model(self, dtype: torch.dtype = torch.float32) -> Network:
        """The model as it was trained, in eval mode, computing in `dtype`."""
        return filled(build_model(self.cfg).to(dtype), self.reader.tensor)

    def merged_model(self) -> Network:
        """The model with its adapters merged into its weights, else as `model` gives it."""

        def read(name: str) -> Tensor:
            shape = torch.Size(self.shapes[name])
            return self.read_weight(name, 0, shape.numel()).view(shape)

        return filled(build_plain(self.cfg), read)


@torch.no_grad()
def filled(model: Network, read: Callable[[str], Tensor]) -> Network:
    """The model, in eval mode, with the values that `read` has of each parameter."""
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model.eval()


def told_trained(cfg: RunConfig, shapes: Mapping[str, tuple[int, ...]], trained: frozenset[str]) -> str:
    """What of a model's parameters is trained, in words. shapes: of all; trained: their names."""
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    part, whole = sum(counts[name] for name in trained), sum(counts.values())
    lora = lora_of(cfg)
    assert lora is not None, "all of them"
    targets = sorted({name.split(A)[0].rpartition(".")[2] for name in shapes if A in name})
    heads = sorted(name for name in trained if not is_adapter(name))
    of_heads = f", and {', '.join(heads)} in full" if heads else ""
    return (
        f"trains {part:,} of {whole:,} parameters ({100 * part / whole:.2g} %), LoRA rank {lora.rank} on "
        f"{', '.join(targets)}{of_heads}"
    )


def told_too_many(cfg: RunConfig, shapes: Mapping[str, tuple[int, ...]], trained: frozenset[str]) -> str:
    """A warning where LoRA trains more than half as many parameters as the model has without it; else ""."""
    part = sum(torch.Size(shapes[name]).numel() for name in trained)
    plain = sum(torch.Size(shape).numel() for name, shape in shapes.items() if not is_adapter(name))
    lora = lora_of(cfg)
    if lora is None or 2 * part <= plain:
        return ""
    return (
        f"lora.rank={lora.rank} trains {part:,} parameters, more than half of the model's {plain:,}; lower it, or leave the "
        "lora section out, which tunes them all"
    )


def open_checkpoint(run_dir: Path, step: int | None, fall_back: bool = False, hashed: bool = True) -> Checkpoint:
    """A checkpoint of a run, every file of it compared with its hash. Nothing in the run's folder is changed.

    step: its step; None: the newest, or with fall_back the newest that is whole.    hashed: False compares sizes alone.
    Raises CheckpointError where there is none or it is damaged, ConfigError where its config cannot be used.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        near = sorted(str(path.parent) for path in run_dir.parent.glob("*/checkpoints"))
        raise CheckpointError(f"{run_dir} is no folder of a run; beside it: {', '.join(near) or 'none'}")
    steps = committed_steps(folder)
    if not steps or (step is not None and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"{folder} has no checkpoint{f' of step {step}' if step is not None else ''}; it has: {have}"
        )
    passed_over: list[str] = []
    for candidate in reversed(steps if step is None else [step]):
        path = folder / folder_name(candidate)
        if not (wrong := faults(path, hashed=hashed)):
            reader = CheckpointReader(path)
            cfg = validate(reader.manifest.config, str(path / "manifest.json"))
            return Checkpoint(run_dir, reader, cfg, tuple(passed_over))
        passed_over.append(f"{path} is damaged: {wrong[0]}")
        if step is not None or not fall_back:
            raise CheckpointError(f"{passed_over[0]}; choose another with --step")
    raise CheckpointError(
        f"{folder} has no checkpoint that is whole: {'; '.join(passed_over)}; restore one from a copy"
    )


@dataclass(frozen=True)
class Trained:
    """A model in memory, and what turns text into its tokens."""

    model: Network
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None  # None: it is of a Hugging Face folder
    before: tuple[int, ...] = ()  # ids that the folder's tokenizer puts before every text
    head: LabelHead | None = None  # in place of one for tokens

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text to continue."""
        return [*self.before, *self.tokenizer.encode(text).tolist()]


def load_trained(place: Path, step: int | None, dtype: torch.dtype | None = None) -> Trained:
    """The model of a run's folder or of a Hugging Face folder, on the accelerator if there is one.

    step: of a run's checkpoint, None for the newest.    dtype: to compute in, None for what the run trained in.
    Raises CheckpointError, ConfigError, DataError or ValueError where it cannot be read.
    """
    is_run = (place / "checkpoints").is_dir()
    if not is_run and not is_hf_folder(place):
        near = sorted(str(path.parent) for name in ("checkpoints", CONFIG) for path in place.parent.glob(f"*/{name}"))
        raise CheckpointError(
            f"{place} is neither a run's folder (with checkpoints/) nor a Hugging Face folder such as launcher/export.py "
            f"writes (with {CONFIG}); beside it: {', '.join(near) or 'none'}"
        )
    if is_run:
        checkpoint = open_checkpoint(place, step, fall_back=True)
        for line in checkpoint.passed_over:
            print(f"{line}; taking step {checkpoint.step}", file=sys.stderr)
        dtype = dtype or DTYPES[checkpoint.cfg.parallel.precision]
        model = _placed(checkpoint.model(dtype=dtype))
        return Trained(model, checkpoint.tokenizer(), checkpoint, head=checkpoint.label_head)
    if step is not None:
        raise ValueError(f"--step {step} is of a run's checkpoints; {place} is a Hugging Face folder: leave it out")
    cfg, head, tokenizer = read_config(place), read_head(place), load_exported(place)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} ids, config.json has vocab_size={cfg.vocab_size}; they are "
            "not of one model"
        )
    model = read_model(place, cfg, dtype or torch.float32, head)
    return Trained(_placed(model), tokenizer, None, tuple(before_text(tokenizer)), head)


def how_to_fill(trained: Trained, place: Path) -> str:
    """What else to do with a masked model than was asked for."""
    if trained.checkpoint is None:
        return f"use transformers.pipeline('fill-mask', model='{place}')"
    return f"launcher/export.py {place} --output FOLDER, then transformers.pipeline('fill-mask', model='FOLDER')"


def _placed(model: Network) -> Network:
    device = torch.accelerator.current_accelerator()
    return model if device is None or not torch.accelerator.is_available() else model.to(device)
