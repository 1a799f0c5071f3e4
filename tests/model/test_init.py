"""Initial weights: any cut gives the same values, and they are distributed as stated."""

import itertools
import math
import random

import pytest
import torch

from model.config import ModelConfig
from model.init import BLOCK, initial_values
from model.transformer import Transformer

CFG = ModelConfig(vocab_size=61, seq_len=16, d_model=24, n_layers=8, n_heads=4, d_ff=40, init_std=0.05, qk_norm=True)
NAME = "blocks.3.attn.wq.weight"


@pytest.mark.parametrize("shape", [(7, 5), (1024, 1024), (1100, 2000)])  # within one block, exactly one, three
@pytest.mark.parametrize("cut_seed", range(3))
def test_any_cut_concatenates_to_the_whole(shape, cut_seed):
    numel = math.prod(shape)
    whole = initial_values(NAME, shape, CFG, seed=1)
    cuts = sorted({0, numel, *random.Random(cut_seed).choices(range(numel + 1), k=6)})
    cuts += [numel]  # and an empty range at the end
    parts = [initial_values(NAME, shape, CFG, 1, a, b) for a, b in itertools.pairwise(cuts)]
    assert whole.shape == (numel,)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat(parts), whole)


def test_cuts_at_block_borders():
    shape = (2 * BLOCK + 3,)
    whole = initial_values(NAME, shape, CFG, seed=1)
    for start, stop in [(BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK + 3), (0, BLOCK), (5, 5)]:
        assert torch.equal(initial_values(NAME, shape, CFG, 1, start, stop), whole[start:stop])


def test_blocks_differ():
    whole = initial_values(NAME, (2 * BLOCK,), CFG, seed=1)
    assert not torch.equal(whole[:BLOCK], whole[BLOCK:])


def test_pinned_values():
    # A run that starts sharded over machines with other library versions relies on these bits.
    expected = torch.tensor([0.111317456, 0.0222512558, 0.0477243103, 0.0683692023, 0.0646834522, 0.0634096041])
    assert torch.equal(initial_values("embed.weight", (3, 2), CFG, seed=1234), expected)


def test_values_depend_on_name_and_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = initial_values(NAME, (30, 10), CFG, seed=1)
    assert torch.equal(a, initial_values(NAME, (10, 30), CFG, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (
        initial_values("blocks.4.attn.wq.weight", (30, 10), CFG, seed=1),
        initial_values("blocks.3.attn.wk.weight", (30, 10), CFG, seed=1),
        initial_values(NAME, (30, 10), CFG, seed=2),
        initial_values(NAME, (30, 10), CFG, seed=1 + 2**32),  # torch's CPU generator would not tell these two apart
    ):
        assert abs(torch.corrcoef(torch.stack((a, other)))[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed.weight", 0.05),
        ("pos_embed.weight", 0.05),
        ("head.weight", 0.05),
        ("blocks.0.attn.wk.weight", 0.05),
        ("blocks.0.mlp.w_gate.weight", 0.05),
        ("blocks.0.mlp.w_up.weight", 0.05),
        ("blocks.0.attn.wo.weight", 0.05 / 4),  # sqrt(2 * 8 layers) = 4
        ("blocks.0.mlp.w_down.weight", 0.05 / 4),
    ],
)
def test_matrices_are_normal_with_the_stated_width(name, std):
    x = initial_values(name, (1000, 1000), CFG, seed=3).double() / std
    # A million samples: the errors of mean, deviation and fourth moment are 1e-3, 7e-4 and 1e-2; four times that.
    assert abs(x.mean()) < 4e-3
    assert abs(x.std() - 1) < 3e-3
    assert abs((x**4).mean() - 3) < 4e-2


def test_residual_projections_unscaled_when_asked():
    cfg = CFG.model_copy(update={"scale_residual_init": False})
    for name in ("blocks.0.attn.wo.weight", "blocks.0.mlp.w_down.weight"):
        assert abs(initial_values(name, (500, 500), cfg, seed=3).std() - 0.05) < 5e-4


def test_norms_are_one_and_biases_zero():
    for name in ("norm.weight", "blocks.1.attn_norm.weight", "blocks.1.mlp_norm.weight", "blocks.1.attn.q_norm.weight"):
        assert torch.equal(initial_values(name, (24,), CFG, 0, 3), torch.ones(21))
    for name in ("norm.bias", "blocks.1.attn.wq.bias", "blocks.1.mlp.w_down.bias"):
        assert torch.equal(initial_values(name, (24,), CFG, 0, 3), torch.zeros(21))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 7), (7, None)])
def test_range_outside_is_refused(start, stop):
    with pytest.raises(ValueError, match=r"of embed.weight is not within \[0, 6\)"):
        initial_values("embed.weight", (3, 2), CFG, 0, start, stop)


@pytest.mark.parametrize("name", ["blocks.0.attn.c_attn.weight", "embed.scale", "weight", ""])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"no initial values are defined for the parameter '{name}'"):
        initial_values(name, (3, 2), CFG, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gpt2", [False, True])
def test_init_weights_fills_every_parameter(tied, gpt2):
    options = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "attention_bias": True, "mlp_bias": True}
    cfg = ModelConfig(**{**CFG.model_dump(), **(options if gpt2 else {}), "tie_embeddings": tied})
    model = Transformer(cfg)
    for p in model.parameters():
        p.data.fill_(float("nan"))
    assert model.init_weights(7) is model
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().flatten(), initial_values(name, p.shape, cfg, 7)), name
    narrow = Transformer(cfg).bfloat16().init_weights(7)
    for a, b in zip(model.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_init_weights_over_several_blocks():
    cfg = ModelConfig(vocab_size=40_000, seq_len=4, d_model=32, n_layers=1, n_heads=2, d_ff=8)
    model = Transformer(cfg).init_weights(0)
    assert model.embed.weight.numel() > BLOCK
    assert torch.equal(model.embed.weight.detach().flatten(), initial_values("embed.weight", (40_000, 32), cfg, 0))


def test_init_weights_on_meta_is_refused():
    with torch.device("meta"):
        model = Transformer(CFG)
    with pytest.raises(ValueError, match=r"embed.weight is on the meta device.*to_empty"):
        model.init_weights(0)
