"""A trained model for the commands that use one: of a run's sharded checkpoint, read without its engine, or of a folder
of Hugging Face's.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.fast_tokenizer import before_text, load_exported
from data.tokenizer import Tokenizer
from launcher.config import FinetuneConfig, RunConfig, validate
from launcher.task_config import ClassifyTask, TagTask
from model.hf import LabelHead
from model.hf_folder import DTYPES, is_hf_folder, read_config, read_head, read_model
from model.network import Network, build_classifier, build_network
from parallel.checkpoint import CheckpointError, CheckpointReader, committed_steps, faults, folder_name


def build_model(cfg: RunConfig) -> Network:
    """The model that a run of this config trains; its parameters have no values."""
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, ClassifyTask | TagTask):
        return build_classifier(cfg.model, len(cfg.task.labels), isinstance(cfg.task, TagTask))
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

    def read_weight(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter, fp32."""
        return self.reader.read(name, "weight", start, stop)

    @property
    def label_head(self) -> LabelHead | None:
        """What it has in place of a head for tokens."""
        task = self.cfg.task if isinstance(self.cfg, FinetuneConfig) else None
        if isinstance(task, TagTask):
            return LabelHead(tuple(task.labels), True, {"join": task.join, "word_token": task.word_token})
        return LabelHead(tuple(task.labels), False) if isinstance(task, ClassifyTask) else None

    def model(self, rounded_to: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> Network:
        """The model in eval mode, computing in `dtype` with weights that were rounded to `rounded_to` before."""
        model = build_model(self.cfg).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.reader.tensor(name).to(rounded_to))
        return model.eval()


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
    if (place / "checkpoints").is_dir() or not is_hf_folder(place):
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


def _placed(model: Network) -> Network:
    device = torch.accelerator.current_accelerator()
    return model if device is None or not torch.accelerator.is_available() else model.to(device)
