"""A trained model for the commands that use one: from a run's sharded checkpoint, read without its engine."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from launcher.config import RunConfig, validate
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError, CheckpointReader, committed_steps, faults, folder_name


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

    def model(self, rounded_to: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> Transformer:
        """The model in eval mode, computing in `dtype` with weights that were rounded to `rounded_to` before."""
        model = Transformer(self.cfg.model).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.reader.tensor(name).to(rounded_to))
        return model.eval()


def open_checkpoint(run_dir: Path, step: int | None, fall_back: bool = False) -> Checkpoint:
    """A checkpoint of a run, every file of it compared with its hash. Nothing in the run's folder is changed.

    step: its step; None: the newest, or with fall_back the newest that is whole.
    Raises CheckpointError where there is none or it is damaged, ConfigError where its config cannot be used.
    """
    folder = run_dir / "checkpoints"
    steps = committed_steps(folder)
    if not steps or (step is not None and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"{folder} has no checkpoint{f' of step {step}' if step is not None else ''}; it has: {have}"
        )
    passed_over: list[str] = []
    for candidate in reversed(steps if step is None else [step]):
        path = folder / folder_name(candidate)
        if not (wrong := faults(path)):
            reader = CheckpointReader(path)
            cfg = validate(reader.manifest.config, str(path / "manifest.json"))
            return Checkpoint(run_dir, reader, cfg, tuple(passed_over))
        passed_over.append(f"{path} is damaged: {wrong[0]}")
        if step is not None or not fall_back:
            raise CheckpointError(f"{passed_over[0]}; choose another with --step")
    raise CheckpointError(
        f"{folder} has no checkpoint that is whole: {'; '.join(passed_over)}; restore one from a copy"
    )
