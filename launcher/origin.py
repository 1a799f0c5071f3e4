"""What a fine-tuning begins with: a run's checkpoint, read without its engine, or a Hugging Face folder.

Model and tokenizer are the origin's. Once the run has begun its origin is not needed any more.
"""

import json
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from data.fast_tokenizer import load_exported
from data.tokenizer import Tokenizer
from launcher.config import (
    ConfigError,
    FinetuneConfig,
    OriginConfig,
)
from launcher.trained import open_checkpoint
from model.config import ModelConfig
from model.hf_config import HfModelConfig
from model.hf_folder import CONFIG, fetch, is_hf_folder, read_config, read_state, weight_files
from parallel.checkpoint import CheckpointError, body_hash, faults_together, file_hash

if TYPE_CHECKING:
    from parallel.mesh import Mesh  # which costs DeepSpeed; launcher/prepare.py does without

HUB = "hf://"  # before the name of a model of the hub
EMBEDDING = "embed.weight"
HEAD = "head.weight"  # which a model with labels has no place for
SAMPLE_BYTES = 2**22  # of each of three places of a file of weights


class Origin(ABC):
    """A trained model, before any of its weights is read."""

    place: Path
    model: ModelConfig | HfModelConfig
    step: int | None
    shapes: dict[str, tuple[int, ...]]  # of every weight

    @cached_property
    @abstractmethod
    def digest(self) -> str: ...

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened weight, 1-D fp32."""

    @abstractmethod
    def faults(self, mesh: "Mesh") -> list[str]:
        """What all ranks together find damaged; empty when nothing."""

    def identity(self) -> OriginConfig:
        return OriginConfig(step=self.step, digest=self.digest, tokenizer=self.tokenizer.fingerprint, model=self.model)

    def __str__(self) -> str:
        return str(self.place) if self.step is None else f"{self.place}@{self.step}"


class RunOrigin(Origin):
    """A checkpoint of a run."""

    def __init__(self, place: Path, step: int | None, key: str) -> None:
        """Raises ConfigError where it cannot be used; hashes are compared later, by all ranks."""
        try:
            self._checkpoint = open_checkpoint(place, step, hashed=False)
        except CheckpointError as error:
            raise ConfigError(
                f"{key}: {error}".replace("choose another with --step", f"name another as {key}: RUN@STEP")
            ) from None
        self.place, self.step, self.model = place, self._checkpoint.step, self._checkpoint.cfg.model
        self.shapes = self._checkpoint.shapes

    @cached_property
    def digest(self) -> str:
        raw = json.loads((self._checkpoint.reader.path / "manifest.json").read_text(encoding="utf-8"))
        return body_hash({key: value for key, value in raw.items() if key != "xxh3"})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._checkpoint.read_weight(name, start, stop)

    def faults(self, mesh: "Mesh") -> list[str]:
        return faults_together(self._checkpoint.reader.path, mesh)


class FolderOrigin(Origin):
    """A folder of Hugging Face's."""

    step = None

    def __init__(self, place: Path, key: str) -> None:
        """Raises ConfigError where it cannot be used."""
        self.place = place
        _refuse_remote_code(place, key)
        try:
            self.model = read_config(place)
            self._state = read_state(place, self.model)  # mapped into memory, not read yet
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        if isinstance(self.model, ModelConfig) and self.model.tie_embeddings:
            del self.shapes[HEAD]  # which is embed.weight
        if self.tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"{key}: the tokenizer of {place} has {self.tokenizer.vocab_size} ids, its {CONFIG} says vocab_size="
                f"{self.model.vocab_size}; they are not of one model"
            )

    @cached_property
    def digest(self) -> str:
        """Of config.json, and of each file of weights its size, its begin (with all names and shapes), middle and end: every
        rank asks for it, and a shared disk is not to give each the whole."""
        files = {name: _sampled_hash(self.place / name) for name in weight_files(self.place)}
        return xxhash.xxh3_128_hexdigest(json.dumps({CONFIG: file_hash(self.place / CONFIG), **files}).encode())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_exported(self.place)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name].reshape(-1)[start:stop].float()

    def faults(self, mesh: "Mesh") -> list[str]:
        return []  # there is no hash to compare with but the digest


class GrownOrigin(Origin):
    """A decoder with more tokens than it was made with: the rows of these are the mean of the others.

    So a new token begins as likely as the average one and takes no other's place (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). Rows beyond the vocabulary that were there for padding are used first.
    """

    def __init__(self, origin: Origin, tokens: list[str]) -> None:
        """Raises ConfigError or DataError where it cannot grow so."""
        if EMBEDDING not in origin.shapes:
            raise ConfigError(
                f"data.tokenizer.add_tokens: {origin} has no {EMBEDDING}; only a decoder's vocabulary can grow"
            )
        self.origin, self.place, self.step, self._tokens = origin, origin.place, origin.step, tokens
        rows = max(origin.model.vocab_size, self.tokenizer.vocab_size)
        self.model = origin.model.model_copy(update={"vocab_size": rows})
        self.shapes = {n: (rows, *shape[1:]) if n in (EMBEDDING, HEAD) else shape for n, shape in origin.shapes.items()}
        self._means: dict[str, Tensor] = {}

    @cached_property
    def digest(self) -> str:
        return self.origin.digest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.origin.tokenizer.grown(self._tokens)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in (EMBEDDING, HEAD):
            return self.origin.read(name, start, stop)
        width = self.shapes[name][1]
        first, behind = (n * width for n in (self.origin.tokenizer.vocab_size, self.tokenizer.vocab_size))
        a, b = min(max(start, first), stop), max(min(stop, behind), start)  # [a, b) is of new rows
        parts = [self.origin.read(name, start, a)] if start < a else []
        if a < b:
            parts.append(self._mean(name)[torch.arange(a, b) % width])
        if max(a, b) < stop:
            parts.append(self.origin.read(name, max(a, b), stop))
        return torch.cat(parts) if parts else torch.empty(0)

    def _mean(self, name: str) -> Tensor:
        """(width,) fp32, of all rows that the origin's tokenizer has an id for; summed in fp64, always in one order."""
        if name not in self._means:
            n, width = self.origin.tokenizer.vocab_size, self.shapes[name][1]
            rows, total = max(1, SAMPLE_BYTES // width), torch.zeros(width, dtype=torch.float64)
            for at in range(0, n, rows):
                total += self.origin.read(name, at * width, min(n, at + rows) * width).view(-1, width).double().sum(0)
            self._means[name] = (total / n).float()
        return self._means[name]

    def faults(self, mesh: "Mesh") -> list[str]:
        return self.origin.faults(mesh)

    def told(self) -> str:
        first, behind = self.origin.tokenizer.vocab_size, self.tokenizer.vocab_size
        names = " and ".join(name for name in (EMBEDDING, HEAD) if name in self.shapes)
        return (
            f"  grown: rows {first} to {behind - 1} of {names} are the mean of those before, for "
            f"{', '.join(map(repr, self._tokens))}"
        )


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    sampled = xxhash.xxh3_128(str(size).encode())
    with open(path, "rb") as file:
        for at in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(at)
            sampled.update(file.read(SAMPLE_BYTES))
    return sampled.hexdigest()


def open_origin(init: str, step: int | None = None, key: str = "init") -> Origin:
    """What `init` names.    step: of a run, where init names none.    key: of the recipe, for messages.

    Raises ConfigError or DataError.
    """
    if init.startswith(HUB):
        try:
            return FolderOrigin(fetch(init.removeprefix(HUB)), key)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
    place, found = Path(init), re.fullmatch(r"(.+)@(\d+)", init)
    if found and not place.exists():
        place, step = Path(found[1]), int(found[2])
    if (place / "checkpoints").is_dir():
        return RunOrigin(place, step, key)
    if is_hf_folder(place):
        if found and step is not None and not Path(init).exists():
            raise ConfigError(f"{key}={init}: {place} is a Hugging Face folder and has no steps; leave @{step} out")
        return FolderOrigin(place, key)
    near = sorted(
        str(path.parent) for path in (place.parent if place.parent.is_dir() else Path("runs")).glob("*/checkpoints")
    )
    raise ConfigError(
        f"{key}={init} is neither a run's folder (with checkpoints/) nor a Hugging Face folder (with {CONFIG}); runs there: "
        f"{', '.join(near) or 'none'}. A model of the hub is {HUB}ORG/NAME"
    )


def origin_of(cfg: FinetuneConfig) -> Origin:
    """What a run begins with, grown as it asks. Raises ConfigError or DataError."""
    opened, tokens = open_origin(cfg.init, cfg.origin.step), cfg.data.tokenizer.add_tokens
    return GrownOrigin(opened, tokens) if tokens else opened


def _refuse_remote_code(place: Path, key: str) -> None:
    try:
        asks = json.loads((place / CONFIG).read_bytes()).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return  # read_config tells
    if asks:
        raise ConfigError(
            f"{key}: {place / CONFIG} demands code of its own (auto_map), which is never run; its weights may mean "
            "something else to it"
        )
