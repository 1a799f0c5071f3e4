"""A recipe of a fine-tuning, completed with what its origin says: model, tokenizer, identity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from data.errors import DataError
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
from launcher.origin import GrownOrigin, Origin, open_origin, origin_of
from launcher.run_dir import RunDirError, read_saved_config
from launcher.trained import build_plain
from model.config import ModelConfig
from model.hf_config import AnyModelConfig
from model.lora import LoraError, import_peft, targets_of

MAY_DIFFER = ("dropout", "seq_len")  # of the model section; seq_len where positions are rotary


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
            "the origin's tokenizer, if data.tokenizer is left out. A run and its export have two, as they are kept in "
            "other files: begin with the one that the corpus was prepared for"
        )


def tokenizer_of(cfg: FinetuneConfig) -> Tokenizer:
    """The origin's, from the run's own folder once it has begun. Raises DataError or ConfigError."""
    own = cfg.run_dir / "tokenizer"
    tokenizer = load_tokenizer(own) if own.is_dir() else origin_of(cfg).tokenizer
    if tokenizer.fingerprint != cfg.origin.tokenizer:
        raise DataError(
            f"{tokenizer.folder} has the tokenizer {tokenizer.fingerprint}, the run began with {cfg.origin.tokenizer}; "
            "restore it"
        )
    return tokenizer
