"""The bridge to transformers: configs and weights of GPT-2, Llama and Qwen3, both ways. Its names appear only here."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from model.config import ModelConfig, RopeScaling
from model.hf_config import HfModelConfig, to_transformers
from model.hf_model import HfClassifier, HfModel
from model.transformer import Transformer

# with which the names of architectures with a head for labels end, and whether each token has one
_PER_TOKEN = {"ForTokenClassification": True, "ForSequenceClassification": False}
_OF_WORDS = "token-classification"  # of task_specific_params in a config.json

# ---------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Rule:
    """One tensor there and the tensors here that it holds; '*' in a name stands for the layer."""

    hf: str  # name in transformers
    ours: tuple[str, ...]  # names here; several are stacked along dimension 0, in this order
    conv1d: bool = False  # transformers keeps it (in, out), as GPT-2's Conv1D does; here it is (out, in)

    def to_hf(self, *tensors: Tensor) -> Tensor:
        """The tensor there from those in `ours`."""
        stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return stacked.T.contiguous() if self.conv1d else stacked

    def from_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensors in `ours` from the one there."""
        stacked = tensor.T if self.conv1d else tensor
        return tuple(part.contiguous() for part in stacked.chunk(len(self.ours)))


@dataclass(frozen=True)
class LabelHead:
    """A head for labels where a language model has one for tokens: model/classifier.py's, in transformers' terms."""

    labels: tuple[str, ...]
    per_token: bool  # a label for each token; else one for the text, of its last token
    words: Mapping[str, str] = field(default_factory=dict)  # per_token: what data/task.py's TagTask says of words

    @property
    def task(self) -> str:
        return next(task for task, per_token in _PER_TOKEN.items() if per_token == self.per_token)

    def shapes(self, d_model: int) -> dict[str, torch.Size]:
        """Of its parameters. Ours have no bias; transformers' heads for tokens have one, which is 0 then."""
        n = len(self.labels)
        weight = {"score.weight": torch.Size([n, d_model])}
        return weight | {"score.bias": torch.Size([n])} if self.per_token else weight

    def rules(self, family: str) -> list[Rule]:
        name = "classifier" if self.per_token and family == "GPT-2" else "score"
        return [Rule(ours.replace("score", name), (ours,)) for ours in self.shapes(1)]


_QKV = ("blocks.*.attn.wq", "blocks.*.attn.wk", "blocks.*.attn.wv")

_GPT2_RULES = (
    Rule("transformer.wte.weight", ("embed.weight",)),
    Rule("transformer.wpe.weight", ("pos_embed.weight",)),
    Rule("transformer.h.*.ln_1.weight", ("blocks.*.attn_norm.weight",)),
    Rule("transformer.h.*.ln_1.bias", ("blocks.*.attn_norm.bias",)),
    Rule("transformer.h.*.attn.c_attn.weight", tuple(f"{name}.weight" for name in _QKV), conv1d=True),
    Rule("transformer.h.*.attn.c_attn.bias", tuple(f"{name}.bias" for name in _QKV)),
    Rule("transformer.h.*.attn.c_proj.weight", ("blocks.*.attn.wo.weight",), conv1d=True),
    Rule("transformer.h.*.attn.c_proj.bias", ("blocks.*.attn.wo.bias",)),
    Rule("transformer.h.*.ln_2.weight", ("blocks.*.mlp_norm.weight",)),
    Rule("transformer.h.*.ln_2.bias", ("blocks.*.mlp_norm.bias",)),
    Rule("transformer.h.*.mlp.c_fc.weight", ("blocks.*.mlp.w_up.weight",), conv1d=True),
    Rule("transformer.h.*.mlp.c_fc.bias", ("blocks.*.mlp.w_up.bias",)),
    Rule("transformer.h.*.mlp.c_proj.weight", ("blocks.*.mlp.w_down.weight",), conv1d=True),
    Rule("transformer.h.*.mlp.c_proj.bias", ("blocks.*.mlp.w_down.bias",)),
    Rule("transformer.ln_f.weight", ("norm.weight",)),
    Rule("transformer.ln_f.bias", ("norm.bias",)),
    Rule("lm_head.weight", ("head.weight",)),
)

_LLAMA_RULES = (  # Qwen3 has the same names and adds q_norm and k_norm
    Rule("model.embed_tokens.weight", ("embed.weight",)),
    Rule("model.layers.*.input_layernorm.weight", ("blocks.*.attn_norm.weight",)),
    Rule("model.layers.*.self_attn.q_proj.weight", ("blocks.*.attn.wq.weight",)),
    Rule("model.layers.*.self_attn.q_proj.bias", ("blocks.*.attn.wq.bias",)),
    Rule("model.layers.*.self_attn.k_proj.weight", ("blocks.*.attn.wk.weight",)),
    Rule("model.layers.*.self_attn.k_proj.bias", ("blocks.*.attn.wk.bias",)),
    Rule("model.layers.*.self_attn.v_proj.weight", ("blocks.*.attn.wv.weight",)),
    Rule("model.layers.*.self_attn.v_proj.bias", ("blocks.*.attn.wv.bias",)),
    Rule("model.layers.*.self_attn.o_proj.weight", ("blocks.*.attn.wo.weight",)),
    Rule("model.layers.*.self_attn.o_proj.bias", ("blocks.*.attn.wo.bias",)),
    Rule("model.layers.*.self_attn.q_norm.weight", ("blocks.*.attn.q_norm.weight",)),
    Rule("model.layers.*.self_attn.k_norm.weight", ("blocks.*.attn.k_norm.weight",)),
    Rule("model.layers.*.post_attention_layernorm.weight", ("blocks.*.mlp_norm.weight",)),
    Rule("model.layers.*.mlp.gate_proj.weight", ("blocks.*.mlp.w_gate.weight",)),
    Rule("model.layers.*.mlp.gate_proj.bias", ("blocks.*.mlp.w_gate.bias",)),
    Rule("model.layers.*.mlp.up_proj.weight", ("blocks.*.mlp.w_up.weight",)),
    Rule("model.layers.*.mlp.up_proj.bias", ("blocks.*.mlp.w_up.bias",)),
    Rule("model.layers.*.mlp.down_proj.weight", ("blocks.*.mlp.w_down.weight",)),
    Rule("model.layers.*.mlp.down_proj.bias", ("blocks.*.mlp.w_down.bias",)),
    Rule("model.norm.weight", ("norm.weight",)),
    Rule("lm_head.weight", ("head.weight",)),
)

# Tensors that older files carry and no parameter stands behind: GPT-2's causal masks, Llama's rotary frequencies.
_NOT_PARAMETERS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")


def weight_rules(cfg: ModelConfig | HfModelConfig, head: LabelHead | None = None) -> list[Rule]:
    """The rules for this model, one for each tensor there, layers filled in; a tied head has none.

    head: in place of the one for tokens.

    An exporter or a loader that goes tensor by tensor walks this list. Raises ValueError as to_hf_config does.
    """
    if isinstance(cfg, HfModelConfig):
        with torch.device("meta"):
            theirs = HfModel(cfg) if head is None else HfClassifier(cfg, len(head.labels), head.per_token)
        return [Rule(name, (name,)) for name, _ in theirs.named_parameters()]
    family = _family(cfg)
    with torch.device("meta"):
        ours = {name for name, _ in Transformer(cfg).named_parameters()}
    if head is not None:
        ours.discard("head.weight")
    rules = []
    for rule in _GPT2_RULES if family == "GPT-2" else _LLAMA_RULES:
        for layer in range(cfg.n_layers) if "*" in rule.hf else (0,):
            names = tuple(name.replace("*", str(layer)) for name in rule.ours)
            if ours.issuperset(names):
                rules.append(Rule(rule.hf.replace("*", str(layer)), names, rule.conv1d))
    assert ours == {name for rule in rules for name in rule.ours}, "a parameter of the model has no rule"
    return rules + (head.rules(family) if head is not None else [])


def to_hf_state(cfg: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state from ours: as its own folders hold it, so without lm_head.weight when the head is tied.

    Raises ValueError for a missing or an unexpected key, and for a tied head that is not the embedding.
    """
    rules = weight_rules(cfg)
    given = _without_tied_copy(cfg, state, "embed.weight", "head.weight")
    _require_keys({name for rule in rules for name in rule.ours}, given, "state of this model")
    return {rule.hf: rule.to_hf(*(given[name] for name in rule.ours)) for rule in rules}


def from_hf_state(cfg: ModelConfig, state: Mapping[str, Tensor], head: LabelHead | None = None) -> dict[str, Tensor]:
    """Our state from transformers', ready for Transformer.load_state_dict; gradients by name go the same way.

    Takes the causal model's state and files without its prefix (as the published GPT-2 is), with or without
    lm_head.weight when the head is tied; masks and rotary frequencies are skipped. head: in place of the one for tokens;
    its bias, which ours has not, must be 0. Raises as to_hf_state does.
    """
    rules = weight_rules(cfg, head)
    prefix = rules[0].hf.partition(".")[0] + "."
    given = {name: tensor for name, tensor in state.items() if not _NOT_PARAMETERS.search(name)}
    if not any(name.startswith(prefix) for name in given):
        given = {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in given.items()}
    given = _without_tied_copy(cfg, given, rules[0].hf, "lm_head.weight")
    _require_keys({rule.hf for rule in rules}, given, f"Hugging Face {_family(cfg)} state")
    ours: dict[str, Tensor] = {}
    for rule in rules:
        ours.update(zip(rule.ours, rule.from_hf(given[rule.hf]), strict=True))
    if head is not None:
        if (bias := ours.pop("score.bias", None)) is not None and bias.any():
            raise ValueError("the bias of its head for labels is not 0, and the one here has none; use transformers")
    elif cfg.tie_embeddings:
        ours["head.weight"] = ours["embed.weight"]
    return ours


def _without_tied_copy(cfg: ModelConfig, state: Mapping[str, Tensor], embed: str, head: str) -> dict[str, Tensor]:
    if not cfg.tie_embeddings or head not in state:
        return dict(state)
    if embed in state and state[embed] is not state[head] and not torch.equal(state[embed], state[head]):
        raise ValueError(
            f"{head} differs from {embed}, but model.tie_embeddings=true has one matrix for both; "
            "set tie_embeddings to false to keep the two"
        )
    return {name: tensor for name, tensor in state.items() if name != head}


def _require_keys(expected: set[str], given: Iterable[str], what: str) -> None:
    names = set(given)
    missing, unexpected = sorted(expected - names), sorted(names - expected)
    if missing or unexpected:
        raise ValueError(
            f"the {what} does not match the model config: missing {missing}, unexpected {unexpected}; "
            "use the config that the weights were saved with"
        )


# ---------------------------------------------------------------------------------------------------------- configs

# What each architecture fixes. An option that is absent is free.
_FIXED: dict[str, dict[str, object]] = {
    "GPT-2": {
        "norm": "layernorm",
        "positions": "learned",
        "mlp": "gelu",
        "qk_norm": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "Llama": {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": False, "dropout": 0.0},
    "Qwen3": {
        "norm": "rmsnorm",
        "positions": "rope",
        "mlp": "swiglu",
        "qk_norm": True,
        "mlp_bias": False,
        "dropout": 0.0,
    },
}


def _family(cfg: ModelConfig) -> str:
    """The architecture there that computes what cfg describes; ValueError, naming the options, when there is none."""
    family = "GPT-2" if cfg.positions == "learned" else "Qwen3" if cfg.qk_norm else "Llama"
    wrong = [
        f"model.{option}={getattr(cfg, option)!r} (needs {value!r})"
        for option, value in _FIXED[family].items()
        if getattr(cfg, option) != value
    ]
    if family == "GPT-2" and cfg.kv_heads != cfg.n_heads:
        wrong.append(f"model.n_kv_heads={cfg.n_kv_heads} (needs {cfg.n_heads}, as n_heads)")
    if family == "GPT-2" and cfg.n_heads * cfg.dim_per_head != cfg.d_model:
        wrong.append(f"model.head_dim={cfg.head_dim} (needs n_heads * head_dim = d_model = {cfg.d_model})")
    if family != "GPT-2" and cfg.attention_output_bias != cfg.attention_bias:
        wrong.append(f"model.attention_output_bias={cfg.attention_output_bias} (needs {cfg.attention_bias})")
    if family == "Llama" and cfg.d_model % cfg.n_heads:
        wrong.append(f"model.n_heads={cfg.n_heads} (needs a divisor of d_model={cfg.d_model})")
    if wrong:
        message = f"no Hugging Face architecture equals this model; the nearest is {family}, but " + ", ".join(wrong)
        if cfg.dropout and family != "GPT-2":
            message += "; dropout plays no part outside training: convert cfg.model_copy(update={'dropout': 0.0})"
        raise ValueError(message)
    return family


def with_labels(config: PreTrainedConfig, head: LabelHead) -> PreTrainedConfig:
    """The config of a language model as that of the architecture with this head."""
    config.architectures = [
        re.sub("LMHeadModel$|ForCausalLM$|ForMaskedLM$", head.task, name) for name in config.architectures or []
    ]
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: number for number, label in enumerate(head.labels)}
    if head.words:
        config.task_specific_params = {_OF_WORDS: dict(head.words)}
    if not head.per_token:
        config.problem_type = "single_label_classification"
    return config


def read_labels(config: Mapping[str, Any]) -> LabelHead | None:
    """The head for labels that a config.json says; None where it is of another model. Raises ValueError."""
    name = next(iter(config.get("architectures") or []), "")
    task = next((task for task in _PER_TOKEN if name.endswith(task)), None)
    if task is None:
        return None
    labels = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    if len(labels) < 2 or sorted(labels) != list(range(len(labels))):
        raise ValueError(f"id2label={config.get('id2label')!r}; expected a label for each number from 0, at least two")
    if (kind := config.get("problem_type")) not in (None, "single_label_classification"):
        raise ValueError(f"problem_type={kind!r} is not one label of several; expected single_label_classification")
    words = (config.get("task_specific_params") or {}).get(_OF_WORDS, {})
    return LabelHead(tuple(labels[number] for number in range(len(labels))), _PER_TOKEN[task], words)


def to_hf_config(cfg: ModelConfig | HfModelConfig, **token_ids: int) -> PreTrainedConfig:
    """The config of the transformers architecture that computes exactly what `cfg` describes.

    token_ids: bos_token_id and so on, of who knows the tokenizer; those not given stay at transformers' defaults.
    How fresh weights are drawn is not part of the function: of that, init_std alone is handed on. Raises ValueError when
    there is no equal.
    """
    if isinstance(cfg, HfModelConfig):
        with torch.device("meta"):
            architecture = type(HfModel(cfg).theirs).__name__
        theirs: PreTrainedConfig = to_transformers(cfg, architectures=[architecture], **token_ids)
        return theirs
    family = _family(cfg)
    if family == "GPT-2":
        return GPT2Config(
            architectures=["GPT2LMHeadModel"],
            vocab_size=cfg.vocab_size,
            n_positions=cfg.seq_len,
            n_embd=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            n_inner=cfg.d_ff,
            activation_function="gelu_new",
            layer_norm_epsilon=cfg.norm_eps,
            initializer_range=cfg.init_std,
            tie_word_embeddings=cfg.tie_embeddings,
            embd_pdrop=cfg.dropout,
            attn_pdrop=cfg.dropout,
            resid_pdrop=cfg.dropout,
            **token_ids,
        )
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rope_scaling.original_seq_len,
        }
    shared = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.seq_len,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.dim_per_head,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": rope,
        "attention_bias": cfg.attention_bias,
        "attention_dropout": 0.0,
        **token_ids,
    }
    if family == "Qwen3":
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **shared)
    return LlamaConfig(architectures=["LlamaForCausalLM"], mlp_bias=cfg.mlp_bias, **shared)


def from_hf_config(hf_config: PreTrainedConfig) -> ModelConfig:
    """Our config from that of GPT-2, Llama or Qwen3. Raises ValueError for another architecture or option.

    scale_residual_init, which transformers' configs do not hold, is set as its models draw: true for GPT-2 alone.
    """
    if hf_config.model_type == "gpt2":
        return _from_gpt2_config(hf_config)
    if hf_config.model_type in ("llama", "qwen3"):
        return _from_llama_config(hf_config)
    raise ValueError(f"model_type {hf_config.model_type!r} has no equal here; expected gpt2, llama or qwen3")


def _from_gpt2_config(hf: PreTrainedConfig) -> ModelConfig:
    _require_option(hf, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _require_option(hf, "scale_attn_weights", True)
    _require_option(hf, "scale_attn_by_inverse_layer_idx", False)
    _require_option(hf, "add_cross_attention", False)
    dropouts = {name: float(getattr(hf, name)) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(dropouts.values())) != 1:
        raise ValueError(f"GPT-2's dropouts differ, {dropouts}; model.dropout is one number: set them equal")
    return ModelConfig(
        vocab_size=hf.vocab_size,
        seq_len=hf.n_positions,
        d_model=hf.n_embd,
        n_layers=hf.n_layer,
        n_heads=hf.n_head,
        d_ff=4 * hf.n_embd if hf.n_inner is None else hf.n_inner,
        norm="layernorm",
        norm_eps=hf.layer_norm_epsilon,
        positions="learned",
        mlp="gelu",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=hf.tie_word_embeddings,
        dropout=dropouts["embd_pdrop"],
        init_std=hf.initializer_range,
        scale_residual_init=True,
    )


def _from_llama_config(hf: PreTrainedConfig) -> ModelConfig:
    qwen3 = hf.model_type == "qwen3"
    _require_option(hf, "hidden_act", "silu", "swish")
    _require_option(hf, "attention_dropout", 0.0)
    if qwen3 and set(hf.layer_types) != {"full_attention"}:
        raise ValueError(
            f"layer_types={sorted(set(hf.layer_types))} has no equal here; expected full_attention in every layer "
            "(use_sliding_window false)"
        )
    rope = dict(hf.rope_parameters)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type={rope_type!r} has no equal here; expected 'default' or 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} has no equal here; expected 1.0")
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_seq_len=rope["original_max_position_embeddings"],
        )
    usual_head_dim = hf.head_dim * hf.num_attention_heads == hf.hidden_size
    return ModelConfig(
        vocab_size=hf.vocab_size,
        seq_len=hf.max_position_embeddings,
        d_model=hf.hidden_size,
        n_layers=hf.num_hidden_layers,
        n_heads=hf.num_attention_heads,
        n_kv_heads=None if hf.num_key_value_heads == hf.num_attention_heads else hf.num_key_value_heads,
        head_dim=None if usual_head_dim else hf.head_dim,
        d_ff=hf.intermediate_size,
        norm="rmsnorm",
        norm_eps=hf.rms_norm_eps,
        positions="rope",
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        mlp="swiglu",
        qk_norm=qwen3,
        attention_bias=hf.attention_bias,
        attention_output_bias=hf.attention_bias,
        mlp_bias=False if qwen3 else hf.mlp_bias,
        tie_embeddings=hf.tie_word_embeddings,
        dropout=0.0,
        init_std=hf.initializer_range,
        scale_residual_init=False,
    )


def _require_option(hf: PreTrainedConfig, option: str, *accepted: object) -> None:
    value = getattr(hf, option)
    if value not in accepted:
        raise ValueError(
            f"{hf.model_type} with {option}={value!r} has no equal here; expected "
            + " or ".join(repr(option_value) for option_value in accepted)
        )
