"""A model as a Hugging Face folder: config and safetensors, written and read without ever holding a second copy."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from model.config import ModelConfig
from model.hf import (
    LabelHead,
    from_hf_config,
    from_hf_state,
    read_labels,
    to_hf_config,
    weight_rules,
    with_labels,
)
from model.hf_config import TESTED, HfModelConfig, Objective, from_transformers, is_masked
from model.hf_model import HfModel
from model.hf_state import state_of
from model.hf_tensors import SAFETENSORS_NAMES, Entry, FloatEntry, ReadRange
from model.int8 import int8_entries, quantization_config
from model.lora import linear_layers
from model.network import Network, build_classifier, build_network
from model.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # of a model of the hub
MOST_SUPPRESSED = 4096  # ids that a generation_config lists one by one

_CONFIGS: dict[str, type[PreTrainedConfig]] = {"gpt2": GPT2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}


# -- writing -----------------------------------------------------------------------------------------------------------


def int8_weights(cfg: ModelConfig | HfModelConfig, head: LabelHead | None = None) -> frozenset[str]:
    """Our names of the matrices that int8 is for: those of the blocks' linear layers.

    Raises ValueError for a model whose layers are of another kind in transformers, and as to_hf_config does.
    """
    with torch.device("meta"):
        layers = [name for names in linear_layers(_empty(cfg, head)).values() for name in names]
    rules = {name: rule for rule in weight_rules(cfg, head) for name in rule.ours}
    found = frozenset(f"{name}.weight" for name in layers)
    if not found or any(rules[name].conv1d for name in found):
        raise ValueError(
            "--dtype int8 is for linear layers, and GPT-2's are Conv1D in transformers, which nothing loads as int8; "
            "export it with --dtype bf16"
        )
    # transformers 5.23 would draw weights for such layers of it, which have none
    if isinstance(cfg, HfModelConfig) and cfg.model_type == "modernbert":
        raise ValueError("--dtype int8: transformers loads no ModernBERT with int8 layers; export it with --dtype bf16")
    return found


def plan_files(
    cfg: ModelConfig | HfModelConfig,
    dtype: torch.dtype,
    shard_bytes: int,
    head: LabelHead | None = None,
    int8: frozenset[str] = frozenset(),
) -> dict[str, list[Entry]]:
    """The weight files and what each holds: at most shard_bytes, or one tensor that is larger. A tied head is in none.

    head: in place of the one for tokens.    int8: our names of what is not of dtype.

    Raises ValueError as to_hf_config does.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in _empty(cfg, head).named_parameters()}
    if head is not None and isinstance(cfg, ModelConfig):
        shapes |= head.shapes(cfg.d_model)  # with the bias that ours has not
    groups: list[list[Entry]] = []
    room = 0
    for rule in weight_rules(cfg, head):
        of_rule: tuple[Entry, ...] = (
            int8_entries(rule.hf, rule.ours[0], shapes[rule.ours[0]])
            if int8.issuperset(rule.ours)
            else (FloatEntry(rule, tuple(shapes[name] for name in rule.ours), dtype),)
        )
        for entry in of_rule:
            if not groups or entry.n_bytes > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(entry)
            room -= entry.n_bytes
    for group in groups:
        group.sort(key=lambda entry: -entry.dtype.itemsize)  # so that each begins at a multiple of its element
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_weights(folder: Path, files: dict[str, list[Entry]], read: ReadRange) -> None:
    """Write the planned files, and the index where there are several; each is on disk before the next is begun."""
    for name, entries in files.items():
        with open(folder / name, "wb") as file:
            file.write(_header(entries))
            for entry in entries:
                for block in entry.blocks(read):
                    file.write(block.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    if len(files) > 1:
        everything = [entry for entries in files.values() for entry in entries]
        index = {
            "metadata": {
                "total_parameters": sum(entry.n_params for entry in everything),
                "total_size": sum(entry.n_bytes for entry in everything),
            },
            "weight_map": {entry.name: name for name, entries in files.items() for entry in entries},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(entries: list[Entry]) -> bytes:
    """The head of a safetensors file: its length, 8 bytes little-endian, and JSON, padded so that data is aligned."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        tree[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [at, at + entry.n_bytes],
        }
        at += entry.n_bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_configs(
    folder: Path,
    cfg: ModelConfig | HfModelConfig,
    dtype: torch.dtype,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    n_known: int,
    head: LabelHead | None = None,
    int8: frozenset[str] = frozenset(),
) -> str:
    """config.json, and generation_config.json of what generates. Returns the name of the architecture.

    n_known: ids that the tokenizer knows; the rows of the model beyond them can never be generated.
    int8: as plan_files takes it.
    """
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config = to_hf_config(cfg, **ids)
    if head is not None:
        config = with_labels(config, head)
    config.dtype = dtype
    if int8:
        with torch.device("meta"):
            theirs = _auto_class(head, is_masked(cfg)).from_config(config)
        matrices = {rule.hf for rule in weight_rules(cfg, head) if int8.issuperset(rule.ours)}
        config.quantization_config = quantization_config(theirs, matrices)
    config.save_pretrained(folder)
    if head is not None or is_masked(cfg):
        return str(config.architectures[0])
    beyond = list(range(n_known, cfg.vocab_size))
    GenerationConfig(**ids, **({"suppress_tokens": beyond} if beyond else {})).save_pretrained(folder)
    return str(config.architectures[0])


# -- reading -----------------------------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The folder of a model of the hub, ORG/NAME or ORG/NAME@REVISION: of the local cache, else downloaded.

    Weights that are not safetensors, and code, are not fetched. Raises ValueError where it cannot be had.
    """
    repository, _, revision = name.partition("@")
    try:
        for local in (True, False):
            with contextlib.suppress(LocalEntryNotFoundError):
                found = snapshot_download(
                    repository, revision=revision or None, allow_patterns=FETCHED, local_files_only=local
                )
                if not local or (Path(found) / WEIGHTS).is_file() or (Path(found) / INDEX).is_file():
                    return Path(found)
        raise ValueError("it is not in the local cache, and the hub cannot be reached")
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(
            f"hf://{name} cannot be had: {error}. Where there is a network: hf download {repository} --local-dir FOLDER; "
            "then name the folder"
        ) from None


def is_hf_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_config(
    folder: Path, objective: Objective | None = None, quantized: bool = False
) -> ModelConfig | HfModelConfig:
    """Our config of the folder's model. Raises ValueError, naming the file, where it is broken or has no equal here.

    objective: of a model of family hf; None: such a one if the folder's is masked.    quantized: whether its weights may be.
    """
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_bytes())
        if (said := raw.get("quantization_config")) is not None and not quantized:
            raise ValueError(
                f"its weights are quantized ({said.get('quant_method')}), and are read here as they were trained alone; "
                "name the run or the folder that it was made from, or use transformers"
            )
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
        if objective is not None or raw.get("model_type") in TESTED["masked"]:
            return from_transformers(raw, objective or "masked")
        model_type = raw.get("model_type")
        if model_type not in _CONFIGS:
            expected = ", ".join((*_CONFIGS, *TESTED["masked"]))
            raise ValueError(f"model_type {model_type!r} has no equal here; expected {expected}")
        return from_hf_config(_CONFIGS[model_type].from_dict(raw))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_head(folder: Path) -> LabelHead | None:
    """The head for labels that the folder's config says; None for a language model. Raises ValueError."""
    file = folder / CONFIG
    try:
        return read_labels(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_state(folder: Path, cfg: ModelConfig | HfModelConfig, head: LabelHead | None = None) -> dict[str, Tensor]:
    """The folder's weights by our names, as they are there. cfg: read_config of it.    head: read_head of it, if wanted.

    Of a masked model those of whatever head it has are among them.

    Raises ValueError where they are no safetensors, cut short, or do not fit the config.
    """
    state: dict[str, Tensor] = {}
    for name in weight_files(folder):
        try:
            state |= load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}; fetch or export the folder again") from None
    if isinstance(cfg, HfModelConfig):
        with torch.device("meta"):
            model = HfModel(cfg)
        try:
            return state_of(model, state)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    heads = sorted(name for name in state if name.startswith(("score.", "classifier.")))
    if heads and head is None:
        raise ValueError(
            f"{folder} has a head for labels ({', '.join(heads)}), and a language model is expected here; name the one that "
            "it was tuned from, or, for the same labels again, the run that it was exported from"
        )
    try:
        ours = from_hf_state(cfg, state, head)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in _empty(cfg, head).named_parameters()}
    if other := sorted(name for name, shape in shapes.items() if ours[name].shape != shape):
        name = other[0]
        raise ValueError(
            f"{folder}: size mismatch for {name}: {tuple(ours[name].shape)}, its {CONFIG} says {tuple(shapes[name])}; fetch "
            "or export the folder again"
        )
    return ours


def read_model(
    folder: Path, cfg: ModelConfig | HfModelConfig, dtype: torch.dtype = torch.float32, head: LabelHead | None = None
) -> Network:
    """Our model with the folder's weights, in eval mode. cfg, head: as read_state takes them. Raises ValueError as it."""
    state = {name: tensor.to(dtype) for name, tensor in read_state(folder, cfg, head).items()}
    if isinstance(cfg, HfModelConfig):
        return _filled(folder, _empty(cfg, head), state)
    with torch.device("meta"):
        model = _empty(cfg, head)
    model.load_state_dict(state, assign=True)  # the tensors themselves: no copy
    if head is None and cfg.tie_embeddings:
        assert isinstance(model, Transformer)
        model.head.weight = model.embed.weight
    return model.eval()


def _empty(cfg: ModelConfig | HfModelConfig, head: LabelHead | None) -> Network:
    return build_network(cfg) if head is None else build_classifier(cfg, len(head.labels), head.per_token)


@torch.no_grad()
def _filled(folder: Path, model: Network, state: dict[str, Tensor]) -> Network:
    """model with the values of state. Raises ValueError where one has none, or another shape."""
    parameters = dict(model.named_parameters())
    wrong = sorted(name for name, p in parameters.items() if name not in state or state[name].shape != p.shape)
    if wrong:
        has = tuple(state[wrong[0]].shape) if wrong[0] in state else "not there"
        raise ValueError(
            f"{folder}: {wrong[0]} is {has}, its {CONFIG} says {tuple(parameters[wrong[0]].shape)}; fetch or export the "
            "folder again"
        )
    for name, parameter in parameters.items():
        parameter.data = state[name]  # the tensors themselves: no copy
    return model.eval()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files. Raises ValueError where there are none, or the index is damaged."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        todo = (
            f"{pickles[0]} may hold pickled code and is never loaded: convert it, with save_pretrained of transformers"
            if pickles
            else "fetch the folder whole (hf download ORG/NAME --local-dir FOLDER) or export it again"
        )
        raise ValueError(f"{folder} has no weights, neither {WEIGHTS} nor {INDEX}; {todo}")
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error!r}); fetch or export the folder again") from None
    if wrong := sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name):
        raise ValueError(f"{folder / INDEX} names {wrong[0]!r}, which is not a file beside it")
    return sorted(names)


# -- as transformers computes it ---------------------------------------------------------------------------------------


def logits_of_transformers(
    folder: Path, windows: list[Tensor], head: LabelHead | None = None, masked: bool = False
) -> list[Tensor]:
    """What AutoModelForCausalLM, of a masked model AutoModelForMaskedLM, makes of windows (T,): logits (T, V) each, computed
    in fp32 from the folder's weights.

    head: as AutoModelForTokenClassification, (T, L), or as AutoModelForSequenceClassification, (1, L): then the windows
    are read as one batch, the shorter ones padded, as their users will.
    Raises ValueError where it does not find every tensor, or finds others.
    """
    transformers_logging.disable_progress_bar()
    model, info = _auto_class(head, masked).from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if wrong := {kind: sorted(map(str, found)) for kind, found in info.items() if found}:
        raise ValueError(f"transformers does not take the folder {folder} as it is: {wrong}")
    model.eval()
    with torch.inference_mode():
        if head is None or head.per_token:
            return [model(window.unsqueeze(0)).logits[0] for window in windows]
        pad = model.config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(window) for window in windows], batch_first=True)
        return list(model(input_ids=ids, attention_mask=mask).logits.unsqueeze(1))


def _auto_class(head: LabelHead | None, masked: bool) -> Any:
    if head is None:
        return AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return AutoModelForTokenClassification if head.per_token else AutoModelForSequenceClassification
