"""The `model` section of a recipe whose network transformers builds, and the choice between it and the own decoder.

    model:
      family: hf
      objective: masked
      vocab_size: 8192
      seq_len: 128
      config: {model_type: bert, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 1024}

What stands in `config` has transformers' own names and is checked against the class of its model_type; what does not stand
there has that class's default. A model of this family is built by transformers' own code alone, never by code of a folder.
"""

import difflib
import functools
import json
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, PlainSerializer, PlainValidator, SerializationInfo, model_validator
from torch import nn

from model.config import Count, ModelConfig

Objective = Literal["masked", "causal"]

# Architectures that tests/model/test_hf_model.py holds to what HfModel promises: documents apart, the loss in chunks,
# transformers' own initial values. Others may keep documents apart in another way, or change logits behind their head.
TESTED: dict[str, tuple[str, ...]] = {"masked": ("bert", "distilbert", "electra", "modernbert"), "causal": ("gpt2",)}

_LANGUAGE = {"masked": "MaskedLM", "causal": "CausalLM"}  # ends of names of transformers' classes

# Keys of `config` that Longhaul sets, and what to set for them.
_OURS = {
    "vocab_size": "model.vocab_size",
    "max_position_embeddings": "model.seq_len",
    "n_positions": "model.seq_len",
    "dtype": "parallel.precision",
    "torch_dtype": "parallel.precision",
    "architectures": "model.objective",
    "pad_token_id": "the tokenizer",
    "bos_token_id": "the tokenizer",
    "eos_token_id": "the tokenizer",
    "cls_token_id": "the tokenizer",
    "sep_token_id": "the tokenizer",
}
# What a model would become with these is not what this family trains.
_REFUSED = ("sinusoidal_pos_embds", "is_decoder", "add_cross_attention", "chunk_size_feed_forward",
            "rope_parameters", "sparse_prediction", "quantization_config", "auto_map", "trust_remote_code",
            "is_encoder_decoder", "problem_type", "id2label", "label2id", "num_labels")  # fmt: skip
_ACTIVATIONS = (
    "hidden_act",
    "hidden_activation",
    "activation",
    "activation_function",
)  # keys that name a function of transformers
_LABELS = ("problem_type", "id2label", "label2id", "num_labels")  # of a head, which a folder may have
_OF_HEADS = ("classifier_dropout", "qa_dropout", "seq_classif_dropout", "summary_first_dropout", "summary_last_dropout")
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "model_type", "use_cache", "return_dict",
                     "output_hidden_states", "output_attentions", "position_embedding_type")  # fmt: skip


class HfModelConfig(BaseModel, frozen=True, extra="forbid"):
    """A masked or a causal language model as transformers builds it."""

    family: Literal["hf"]
    objective: Objective  # masked: foretell tokens that were hidden, from both sides; causal: the next token
    vocab_size: Count  # rows of the embedding and of the head
    seq_len: Count  # tokens; the longest sequence the model takes
    config: dict[str, Any]  # model_type, and what differs from the defaults of its config class

    @model_validator(mode="after")
    def _is_one_of_theirs(self) -> "HfModelConfig":
        known = TESTED[self.objective]
        if (kind := self.config.get("model_type")) not in known:
            raise ValueError(
                f"model.config.model_type={kind!r} is none that can be trained as a {self.objective} model here; expected "
                f"{' or '.join(known)}"
            )
        wrong = []
        defaults = _defaults(str(kind))
        for key, value in self.config.items():
            if key in _OURS:
                wrong.append(f"model.config.{key}: got {value!r}; it is said by {_OURS[key]}: leave it out here")
            elif key in _REFUSED:
                wrong.append(f"model.config.{key}: got {value!r}; it would make another kind of model: leave it out")
            elif key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(defaults))}"
                wrong.append(f"model.config.{key}: transformers' {kind} has no such key; {hint}")
            elif key in _ACTIVATIONS and value not in (known_activations := _activations()):
                near = difflib.get_close_matches(str(value), known_activations, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                wrong.append(f"model.config.{key}: got {value!r}; {hint}expected {', '.join(known_activations)}")
        if self.config.get("classifier_pooling", "cls") != "cls":
            wrong.append(
                f"model.config.classifier_pooling: got {self.config['classifier_pooling']!r}; a label of a text is read "
                "at its begin here: leave it out"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        _counts(self.model_dump_json())  # builds it, without memory
        return self

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def n_layers(self) -> int:
        return int(to_transformers(self).num_hidden_layers)

    @property
    def d_model(self) -> int:
        return int(to_transformers(self).hidden_size)

    @property
    def dropout(self) -> float:
        """The largest of the dropout probabilities, but for those of heads that are not for tokens."""
        found = [
            value for key, value in to_transformers(self).to_dict().items() if "drop" in key and key not in _OF_HEADS
        ]
        return max((float(value) for value in found if value is not None), default=0.0)

    @property
    def init_std(self) -> float:
        """Standard deviation of freshly drawn matrices."""
        return float(to_transformers(self).initializer_range)

    @property
    def init_cutoff(self) -> float | None:
        """Where their distribution ends, in deviations; None: nowhere."""
        return getattr(to_transformers(self), "initializer_cutoff_factor", None)

    @property
    def tie_embeddings(self) -> bool:
        return bool(to_transformers(self).tie_word_embeddings)

    @property
    def n_params(self) -> int:
        """All parameters, a shared one counted once."""
        return _counts(self.model_dump_json())[0]

    @property
    def n_matrix_params(self) -> int:
        """Parameters that each token is multiplied by: the matrices of the blocks, and of a causal model the head.

        The head of a masked model reads the hidden tokens alone, so it is not among them.
        """
        return _counts(self.model_dump_json())[1]

    def flops_per_token(self, seq_len: int) -> int:
        """As ModelConfig's: 6 N + 12 L D T. Of a masked model without its head."""
        return 6 * self.n_matrix_params + 12 * self.n_layers * self.d_model * seq_len


def to_transformers(cfg: HfModelConfig, **more: Any) -> Any:
    """The config of transformers that cfg describes.    more: keys of it, such as pad_token_id."""
    from transformers import CONFIG_MAPPING  # two seconds to import, and most runs need none of it

    given = {key: value for key, value in cfg.config.items() if key != "model_type"}
    said: dict[str, Any] = {"vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.seq_len}
    if cfg.model_type == "modernbert":  # whose own defaults are ids of another vocabulary
        said |= dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))
    return CONFIG_MAPPING[cfg.model_type](**{**given, **said, **more})


def from_transformers(raw: dict[str, Any], objective: Objective) -> HfModelConfig:
    """cfg of the content of a folder's config.json. Raises ValueError for a model that cannot be trained here."""
    kind = raw.get("model_type")
    if kind not in TESTED[objective]:
        raise ValueError(f"model_type {kind!r} is none of {', '.join(TESTED[objective])}")
    from transformers import CONFIG_MAPPING

    if (positions := raw.get("position_embedding_type", "absolute")) != "absolute":  # as older transformers knew others
        raise ValueError(f"position_embedding_type={positions!r} is none that transformers builds; expected 'absolute'")
    theirs = CONFIG_MAPPING[kind].from_dict(raw)
    plain = CONFIG_MAPPING[kind]().to_dict()
    found = theirs.to_dict()
    if differs := [key for key in _REFUSED if key not in _LABELS and found.get(key) != plain.get(key)]:
        raise ValueError(f"{differs[0]}={found[differs[0]]!r} makes another kind of model of it than is trained here")
    set_here = {theirs.attribute_map.get(key, key) for key in (*_OURS, *_REFUSED)} | set(_NOT_OF_THE_MODEL)
    config = {
        key: value for key, value in found.items() if key in plain and key not in set_here and value != plain[key]
    }
    length: int = theirs.max_position_embeddings
    return HfModelConfig(
        family="hf",
        objective=objective,
        vocab_size=theirs.vocab_size,
        seq_len=length,
        config={"model_type": kind, **config},
    )


def build_unset(cfg: HfModelConfig, n_labels: int = 0, per_token: bool = False) -> nn.Module:
    """transformers' model, its parameters without values, on whatever device torch makes tensors.

    n_labels: with a head for so many labels in place of the one for tokens, of each token or of the text.
    It is told of no token for padding, whose embedding would get no gradient: which id that is, the tokenizer says.
    """
    import transformers
    from transformers.initialization import no_init_weights

    task = ("TokenClassification" if per_token else "SequenceClassification") if n_labels else _LANGUAGE[cfg.objective]
    kind = getattr(transformers, f"AutoModelFor{task}")
    labels = {"num_labels": n_labels} if n_labels else {}
    config = to_transformers(cfg, pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False, **labels)
    with no_init_weights():
        model: nn.Module = kind.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    model.tie_weights()  # type: ignore[operator]  # no_init_weights leaves it out
    return model


@functools.cache
def _defaults(model_type: str) -> dict[str, Any]:
    """The keys that a config of this type may have, with transformers' own names and their other spellings."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[model_type]()
    return default.to_dict() | dict.fromkeys(default.attribute_map)


def _activations() -> list[str]:
    from transformers.activations import ACT2FN

    return sorted(ACT2FN)


@functools.lru_cache(maxsize=16)
def _counts(cfg_json: str) -> tuple[int, int]:
    """(n_params, n_matrix_params) of a model that is built without memory. Raises ValueError where it cannot be."""
    cfg = HfModelConfig.model_construct(**json.loads(cfg_json))
    try:
        with torch.device("meta"):
            model: Any = build_unset(cfg)
    except Exception as error:  # huggingface_hub's checks of config classes have errors of their own
        raise ValueError(
            f"transformers cannot build the model of model.config: {' '.join(str(error).split())}"
        ) from None
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise ValueError(
            f"model.config leaves {empty[0]} without an element; make the size that it follows from larger"
        )
    if not cfg.n_layers:
        raise ValueError("model.config has no layers; give num_hidden_layers or its like at least 1")
    parameters, head = list(model.parameters()), model.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = sum(p.numel() for p in parameters if p.ndim == 2 and id(p) not in looked_up | {id(head)})
    return sum(p.numel() for p in parameters), matrices + (head.numel() if cfg.objective == "causal" else 0)


# -- the choice ---------------------------------------------------------------------------------------------------------


def pick_model(raw: Any) -> ModelConfig | HfModelConfig:
    """The `model` section as the kind that it names. Raises pydantic's ValidationError, or ValueError."""
    if isinstance(raw, ModelConfig | HfModelConfig):
        return raw
    if isinstance(raw, dict) and "family" in raw:
        if raw["family"] != "hf":
            raise ValueError(
                f"model.family={raw['family']!r}; expected hf, with config: {{model_type: bert}}, or no family at all: "
                "Longhaul's own decoder, which is a GPT-2, a Llama or a Qwen3 by its keys"
            )
        return HfModelConfig.model_validate(raw)
    return ModelConfig.model_validate(raw)


def _dump(cfg: ModelConfig | HfModelConfig, info: SerializationInfo) -> dict[str, Any]:
    return cfg.model_dump(mode=info.mode)


AnyModelConfig = Annotated[ModelConfig | HfModelConfig, PlainValidator(pick_model), PlainSerializer(_dump)]


def is_masked(cfg: ModelConfig | HfModelConfig) -> bool:
    """Whether the model foretells hidden tokens from both sides, and not the next one."""
    return isinstance(cfg, HfModelConfig) and cfg.objective == "masked"
