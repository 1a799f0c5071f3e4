"""What a fine-tuning begins with: a run's checkpoint, read without its engine, or a Hugging Face folder.

Model and tokenizer are the origin's. Every weight of the new run is either the origin's, element by element whatever
topology wrote it, or named as new; what the new model has no place for is named as dropped. Both are allowed for heads
alone, so that no weight stays at random values unseen. Once the run has begun its origin is not needed any more.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from data.errors import DataError
from data.fast_tokenizer import load_exported
from data.hf_tokenizer import HuggingFaceTokenizer
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from launcher.config import (
    ConfigError,
    FinetuneConfig,
    OriginConfig,
    RunConfig,
    is_finetune,
    load_config,
    read_recipe,
    validate,
)
from launcher.run_dir import RunDirError, read_saved_config
from launcher.trained import NEW, Initial, build_model, build_plain, lora_of, open_checkpoint
from model.config import ModelConfig
from model.hf_config import AnyModelConfig, HfModelConfig
from model.hf_folder import CONFIG, fetch, is_hf_folder, read_config, read_state, weight_files
from model.hf_model import HfClassifier, HfModel
from model.init import initial_values
from model.lora import LoraError, import_peft, is_adapter, plain_name, targets_of
from model.network import Network
from parallel.checkpoint import CheckpointError, body_hash, faults_together, file_hash

if TYPE_CHECKING:
    from parallel.mesh import Mesh  # which costs DeepSpeed; launcher/prepare.py does without

HUB = "hf://"  # before the name of a model of the hub
EMBEDDING = "embed.weight"
HEAD = "head.weight"  # which a model with labels has no place for
SAMPLE_BYTES = 2**22  # of each of three places of a file of weights
MAY_DIFFER = ("dropout", "seq_len")  # of the model section; seq_len where positions are rotary


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

    def __init__(self, place: Path, step: int | None) -> None:
        """Raises ConfigError where it cannot be used; hashes are compared later, by all ranks."""
        try:
            self._checkpoint = open_checkpoint(place, step, hashed=False)
        except CheckpointError as error:
            raise ConfigError(
                f"init: {error}".replace("choose another with --step", "name another as init: RUN@STEP")
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

    def __init__(self, place: Path) -> None:
        """Raises ConfigError where it cannot be used."""
        self.place = place
        _refuse_remote_code(place)
        try:
            self.model = read_config(place)
            self._state = read_state(place, self.model)  # mapped into memory, not read yet
        except ValueError as error:
            raise ConfigError(f"init: {error}") from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        if isinstance(self.model, ModelConfig) and self.model.tie_embeddings:
            del self.shapes[HEAD]  # which is embed.weight
        if self.tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"init: the tokenizer of {place} has {self.tokenizer.vocab_size} ids, its {CONFIG} says vocab_size="
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


def open_origin(init: str, step: int | None = None) -> Origin:
    """What `init` names.    step: of a run, where init names none. Raises ConfigError or DataError."""
    if init.startswith(HUB):
        try:
            return FolderOrigin(fetch(init.removeprefix(HUB)))
        except ValueError as error:
            raise ConfigError(f"init: {error}") from None
    place, found = Path(init), re.fullmatch(r"(.+)@(\d+)", init)
    if found and not place.exists():
        place, step = Path(found[1]), int(found[2])
    if (place / "checkpoints").is_dir():
        return RunOrigin(place, step)
    if is_hf_folder(place):
        if found and step is not None and not Path(init).exists():
            raise ConfigError(f"init={init}: {place} is a Hugging Face folder and has no steps; leave @{step} out")
        return FolderOrigin(place)
    near = sorted(
        str(path.parent) for path in (place.parent if place.parent.is_dir() else Path("runs")).glob("*/checkpoints")
    )
    raise ConfigError(
        f"init={init} is neither a run's folder (with checkpoints/) nor a Hugging Face folder (with {CONFIG}); runs there: "
        f"{', '.join(near) or 'none'}. A model of the hub is {HUB}ORG/NAME"
    )


def _refuse_remote_code(place: Path) -> None:
    try:
        asks = json.loads((place / CONFIG).read_bytes()).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return  # read_config tells
    if asks:
        raise ConfigError(
            f"init: {place / CONFIG} demands code of its own (auto_map), which is never run; its weights may mean something "
            "else to it"
        )


# -- the config ---------------------------------------------------------------------------------------------------------


def load_recipe(path: str, overrides: list[str]) -> RunConfig:
    """The config of either kind of recipe. Raises ConfigError, DataError."""
    return (load_finetune_config if is_finetune(read_recipe(path, overrides)) else load_config)(path, overrides)


def load_finetune_config(path: str, overrides: list[str]) -> FinetuneConfig:
    """A recipe of a fine-tuning, with what comes from its origin put in: model, tokenizer, identity.

    Once the run has a folder they come from there. Raises ConfigError, DataError or RunDirError.
    """
    raw = read_recipe(path, overrides)
    init = raw.get("init")
    if not is_finetune(raw):
        raise ConfigError(
            f"{path} has no init and no task, so it is of a pretraining: start it with launcher/pretrain.py"
        )
    if not isinstance(init, str) or not init:
        raise ConfigError(f"{path}: init: got {init!r}; expected runs/NAME, runs/NAME@STEP or a Hugging Face folder")
    saved = _saved_beside(raw)
    if saved is not None and saved.get("init") == init:
        try:
            origin = OriginConfig.model_validate(saved["origin"])
            tokenizer = saved["data"]["tokenizer"]
        except (ValidationError, KeyError, TypeError) as error:
            raise RunDirError(f"the run's config.yaml does not say what it began with ({error}); restore it") from None
    else:
        opened = open_origin(
            init, (raw.get("origin") or {}).get("step") if isinstance(raw.get("origin"), dict) else None
        )
        opened, tokenizer = grown_as_asked(opened, raw)
        origin = opened.identity()
    _put_in(raw, path, origin, tokenizer)
    cfg = validate(raw, path)
    assert isinstance(cfg, FinetuneConfig)
    refuse_lora(cfg, path)
    return cfg


def refuse_lora(cfg: FinetuneConfig, path: str) -> None:
    """Raise ConfigError where the recipe's lora section has no place in the model, or peft is not there."""
    if cfg.lora is None:
        return
    try:
        import_peft()
        with torch.device("meta"):
            targets_of(build_plain(cfg), cfg.lora)
    except LoraError as error:
        raise ConfigError(f"{path}: {error}") from None


def grown_as_asked(opened: Origin, raw: dict[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """The origin with the tokens that a recipe adds, if any, and its tokenizer as data.tokenizer names it."""
    section, data = tokenizer_section(opened.tokenizer), raw.get("data")
    asked = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(asked, dict) or not (tokens := asked.get("add_tokens")):
        return opened, section
    section["add_tokens"] = tokens
    try:
        TokenizerConfig.model_validate(section)
    except ValidationError:
        return opened, section  # validate tells
    opened = GrownOrigin(opened, tokens)
    return opened, section | {"vocab_size": opened.tokenizer.vocab_size}


def tokenizer_section(tokenizer: Tokenizer) -> dict[str, Any]:
    """The data section's, of a tokenizer that is there."""
    return {
        "kind": "huggingface" if isinstance(tokenizer, HuggingFaceTokenizer) else "sentencepiece",
        "path": str(tokenizer.folder),
        "vocab_size": tokenizer.vocab_size,
    }


def _saved_beside(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The config of the run's folder, where the recipe says which that is and it is there."""
    run = raw.get("run")
    if not isinstance(run, dict) or not isinstance(run.get("name"), str):
        return None  # validate tells
    return read_saved_config(Path(str(run.get("folder", "runs"))) / run["name"])


def _put_in(raw: dict[str, Any], path: str, origin: OriginConfig, tokenizer: dict[str, Any]) -> None:
    """Complete a recipe with what its origin says. Raises ConfigError where the two contradict each other."""
    wrong, before = [], raw.get("origin")
    if before is not None and before != (found := origin.model_dump(mode="json")):
        differ = sorted(k for k in found if not isinstance(before, dict) or before.get(k) != found[k])
        wrong.append(
            f"  origin: {raw['init']} is not what it was: another {', '.join(differ)}; restore it, or leave origin out"
        )
    put_in_model(raw, path, raw["init"], origin.model, tokenizer, wrong)
    raw["origin"] = origin.model_dump(mode="json")


def put_in_model(
    raw: dict[str, Any],
    path: str,
    init: str,
    model: AnyModelConfig,
    tokenizer: dict[str, Any],
    wrong: Sequence[str] = (),
) -> None:
    """Complete a recipe with the model and tokenizer of `init`.

    wrong: lines of what is wrong already. Raises ConfigError where recipe and origin contradict each other.
    """
    wrong, theirs = list(wrong), model.model_dump(mode="json")
    given = raw.get("model") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: model: got {type(given).__name__}; expected keys such as dropout, or none at all")
    for key, value in given.items():
        rotary = isinstance(model, ModelConfig) and model.positions == "rope"
        allowed = key in MAY_DIFFER and (key != "seq_len" or rotary)
        if key in theirs and not allowed and value != theirs[key]:
            wrong.append(f"  model.{key}: got {value!r}, and {init} has {theirs[key]!r}; leave it out")
    data = raw.setdefault("data", {})
    own = data.get("tokenizer") if isinstance(data, dict) else None
    asked = own if isinstance(own, dict) else {}
    for key, value in asked.items():
        if key != "add_tokens" and value != tokenizer.get(key):
            has = f"has {tokenizer[key]!r}" if key in tokenizer else "has one already"
            wrong.append(f"  data.tokenizer.{key}: got {value!r}, and {init} {has}; leave it out")
    if (asked.get("add_tokens") or []) != (added := tokenizer.get("add_tokens") or []):
        wrong.append(
            f"  data.tokenizer.add_tokens: got {asked.get('add_tokens') or []!r}, and the run began with {added!r}; a "
            "vocabulary grows before the first step alone: set it back, or use another run.name"
        )
    if wrong:
        raise ConfigError(f"{path}: {len(wrong)} wrong\n" + "\n".join(wrong))
    raw["model"] = theirs | given
    if isinstance(data, dict) and (own is None or isinstance(own, dict)):  # validate tells of another
        data["tokenizer"] = tokenizer


def refuse_other_tokenizer(cfg: FinetuneConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the data's tokenizer is not the origin's."""
    if tokenizer.fingerprint != cfg.origin.tokenizer:
        data = cfg.data
        where = (
            f"data.corpus={data.corpus}" if data.stream is None else f"data.stream.tokenizer={data.stream.tokenizer}"
        )
        raise ConfigError(
            f"{where} has the tokenizer {tokenizer.fingerprint}, {cfg.init} was trained with {cfg.origin.tokenizer}, to "
            "which other ids mean other text; prepare a corpus for it: launcher/prepare.py with this recipe takes "
            "the origin's tokenizer, if data.tokenizer is left out"
        )


def tokenizer_of(cfg: FinetuneConfig) -> Tokenizer:
    """The origin's, from the run's own folder once it has begun. Raises DataError or ConfigError."""
    own = cfg.run_dir / "tokenizer"
    tokenizer = load_tokenizer(own) if own.is_dir() else _open(cfg).tokenizer
    if tokenizer.fingerprint != cfg.origin.tokenizer:
        raise DataError(
            f"{tokenizer.folder} has the tokenizer {tokenizer.fingerprint}, the run began with {cfg.origin.tokenizer}; "
            "restore it"
        )
    return tokenizer


def _open(cfg: FinetuneConfig) -> Origin:
    opened, tokens = open_origin(cfg.init, cfg.origin.step), cfg.data.tokenizer.add_tokens
    return GrownOrigin(opened, tokens) if tokens else opened


# -- weights ------------------------------------------------------------------------------------------------------------


def origin_weights(cfg: FinetuneConfig, mesh: "Mesh") -> Initial:
    """The weights that a fine-tuned run begins with. All ranks call it.

    Raises ConfigError, on all of them, where the origin is damaged, or another than the config's, or a weight of the new
    model would have no value.
    """
    opened, wrong = None, ""
    try:
        opened = _open(cfg)
        if opened.digest != cfg.origin.digest:
            wrong = (
                f"{opened} is not what the run is to begin with: its digest is {opened.digest}, not {cfg.origin.digest}"
            )
    except (ConfigError, DataError, OSError) as error:
        wrong = f"rank {mesh.rank}: {error}"
    if told := next(filter(None, mesh.gather(wrong)), None):
        raise ConfigError(told)
    assert opened is not None
    try:
        damaged = opened.faults(mesh)
    except CheckpointError as error:  # the same on every rank
        raise ConfigError(f"init={cfg.init}: {error}") from None
    if damaged:
        raise ConfigError(f"init={cfg.init}: {opened} is damaged: {damaged[0]}; name another as init: RUN@STEP")
    with torch.device("meta"):
        model, whole = build_plain(cfg), build_model(cfg)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new, dropped = match_model(model, shapes, opened)
    lines = _told(shapes, opened, new, dropped)
    if (lora := lora_of(cfg)) is not None:
        n_adapters = sum(is_adapter(name) for name, _ in whole.named_parameters())
        lines.append(f"  new beside them: {n_adapters} matrices of LoRA, rank {lora.rank}, that add 0 as yet")
    return Initial(_reader(cfg, opened, new), tuple(lines))


def match_model(model: Network, shapes: dict[str, tuple[int, ...]], origin: Origin) -> tuple[list[str], list[str]]:
    """As match, with the heads that this model may have new or its origin may lose."""
    if isinstance(model, HfClassifier):
        return match(shapes, origin, model.is_head, model.is_head)
    if isinstance(model, HfModel):
        return match(shapes, origin, lambda name: False, model.is_head)
    return match(shapes, origin)


def match(
    shapes: dict[str, tuple[int, ...]],
    origin: Origin,
    may_be_new: Callable[[str], bool] = lambda name: name.startswith(NEW),
    may_be_dropped: Callable[[str], bool] = lambda name: name == HEAD,
) -> tuple[list[str], list[str]]:
    """Names of weights of a model that are new, and of the origin's that it has no place for.

    shapes: of the model. Raises ConfigError where others than heads would be either.
    """
    new, dropped = sorted(shapes.keys() - origin.shapes.keys()), sorted(origin.shapes.keys() - shapes.keys())
    other = [name for name in shapes.keys() & origin.shapes.keys() if shapes[name] != origin.shapes[name]]
    wrong = [f"{name} has no value in it" for name in new if not may_be_new(name)]
    wrong += [f"its {name} has no place in the model" for name in dropped if not may_be_dropped(name)]
    wrong += [f"its {name} is {origin.shapes[name]}, the model's {shapes[name]}" for name in sorted(other)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{origin} is not of the model that is needed here: {'; '.join(wrong[:3])}{more}. A head for labels begins new "
            "from a language model, or from one with the same labels; nothing else may be missing"
        )
    return new, dropped


def _reader(cfg: FinetuneConfig, origin: Origin, new: list[str]) -> Callable[[str, tuple[int, ...], int, int], Tensor]:
    def read(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name in new or is_adapter(name):
            return initial_values(name, shape, cfg.model, cfg.run.seed, start, stop)
        return origin.read(plain_name(name), start, stop)

    return read


def _told(shapes: dict[str, tuple[int, ...]], origin: Origin, new: list[str], dropped: list[str]) -> list[str]:
    count = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in new)
    lines = [f"loaded {len(shapes) - len(new)} tensors, {count:,} numbers, from {origin} (digest {origin.digest})"]
    if isinstance(origin, GrownOrigin):
        lines.append(origin.told())
    if new:
        lines.append(f"  new, with values drawn: {', '.join(f'{name} {shapes[name]}' for name in new)}")
    if dropped:
        lines.append(f"  dropped: {', '.join(f'{name} {origin.shapes[name]}' for name in dropped)}")
    return lines
