"""What a model section may say, and the arithmetic that follows from it."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.transformer import Transformer

BASE = {"vocab_size": 50, "seq_len": 16, "d_model": 24, "n_layers": 2, "n_heads": 4, "d_ff": 40}
LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_len": 8}


def config(**options) -> ModelConfig:
    return ModelConfig(**{**BASE, **options})


COUNTED = [
    {},
    {"n_kv_heads": 2, "head_dim": 8, "qk_norm": True, "tie_embeddings": True},
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    {"attention_bias": True, "n_kv_heads": 1},
    {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "mlp_bias": True, "tie_embeddings": True},
    {"norm": "layernorm", "qk_norm": True, "mlp": "gelu", "attention_output_bias": True},
]


@pytest.mark.parametrize("options", COUNTED)
def test_n_params_is_what_is_built(options):
    cfg = config(**options)
    model = Transformer(cfg)
    assert cfg.n_params == sum(p.numel() for p in model.parameters())
    lookups = {"embed.weight", "pos_embed.weight"}
    matrices = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2 and n not in lookups}
    assert cfg.n_matrix_params == sum(p.numel() for p in matrices.values())


@pytest.mark.parametrize("options", COUNTED)
def test_flops_per_token_is_three_times_the_matrix_products_of_a_forward(options):
    cfg, batch, seq_len = config(**options), 2, 12
    model = Transformer(cfg).init_weights(0)
    # The math kernel is counted product by product; flash attention on the CPU has no formula in torch's counter.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(batch, seq_len, dtype=torch.int64))
    assert cfg.flops_per_token(seq_len) * batch * seq_len == 3 * counter.get_total_flops()


def test_resolved_values():
    assert (config().kv_heads, config().dim_per_head) == (4, 6)
    assert (config(n_kv_heads=2, head_dim=10).kv_heads, config(n_kv_heads=2, head_dim=10).dim_per_head) == (2, 10)


@pytest.mark.parametrize("options", [*COUNTED, {"rope_scaling": LLAMA3_SCALING, "rope_theta": 5e5}])
def test_a_saved_config_loads_again(options):
    cfg = config(**options)
    assert ModelConfig(**cfg.model_dump()) == cfg
    assert ModelConfig.model_validate_json(cfg.model_dump_json()) == cfg


def test_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        config().d_model = 48


def test_text_that_spells_a_number_is_one():
    assert config(norm_eps="1e-5").norm_eps == 1e-5  # what yaml.safe_load makes of norm_eps: 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_modle": 24}, "Extra inputs are not permitted"),
        ({"n_layers": 0}, "greater than 0"),
        ({"n_layers": -1}, "greater than 0"),
        ({"n_layers": True}, "valid integer"),
        ({"n_layers": 2.0}, "valid integer"),
        ({"n_layers": "2"}, "valid integer"),
        ({"n_kv_heads": 0}, "greater than 0"),
        ({"init_std": True}, "truth value; expected a number"),
        ({"dropout": False}, "truth value; expected a number"),
        ({"init_std": 0}, "greater than 0"),
        ({"init_std": float("inf")}, "finite number"),
        ({"init_std": float("nan")}, "greater than 0"),
        ({"rope_theta": -1.0}, "greater than 0"),
        ({"dropout": 1.0}, "less than 1"),
        ({"dropout": -0.1}, "greater than or equal to 0"),
        ({"dropout": float("nan")}, "greater than or equal to 0"),
        ({"qk_norm": 1}, "valid boolean"),
        ({"tie_embeddings": "yes"}, "valid boolean"),
        ({"mlp": "relu"}, "'swiglu' or 'gelu'"),
        (
            {"d_model": 26},
            r"d_model=26 is not a multiple of model.n_heads=4; use d_model 24 or 28, or set model.head_dim",
        ),
        ({"d_model": 3}, "use d_model 4, or set"),
        ({"n_kv_heads": 3}, r"n_heads=4 is not a multiple of model.n_kv_heads=3; n_kv_heads can be one of \[1, 2, 4\]"),
        ({"n_kv_heads": 8}, "n_heads=4 is not a multiple of model.n_kv_heads=8"),
        ({"head_dim": 5}, "even head width, got 5"),
        ({"positions": "learned", "rope_theta": 5e5}, "rope_theta=500000.0 has no effect"),
        ({"positions": "learned", "rope_scaling": LLAMA3_SCALING}, "rope_scaling has no effect"),
        (
            {"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1}},
            "high_freq_factor=1.0 must exceed low_freq_factor=1.0",
        ),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": 0.5}}, "greater than or equal to 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        config(**options)
