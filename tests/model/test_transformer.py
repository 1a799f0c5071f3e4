"""The decoder by itself: building, shapes, causality, precision, dropout. Parity with transformers is in test_hf.py."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer, rotary_frequencies, rotary_tables, rotate

LLAMA = ModelConfig(
    vocab_size=67, seq_len=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2, qk_norm=True
)
GPT2 = ModelConfig(
    vocab_size=67,
    seq_len=32,
    d_model=32,
    n_layers=2,
    n_heads=4,
    d_ff=48,
    norm="layernorm",
    positions="learned",
    mlp="gelu",
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    init_std=0.2,
)
BOTH = pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])


def tokens_of(cfg, batch=2, seq_len=24, seed=0):
    return torch.randint(0, cfg.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@BOTH
def test_building_draws_no_numbers_and_registers_no_buffers(cfg):
    state = torch.get_rng_state()
    model = Transformer(cfg)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.buffers()) == []


@BOTH
def test_builds_on_the_meta_device_and_becomes_real(cfg):
    with torch.device("meta"):
        model = Transformer(cfg)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").init_weights(3)
    assert (model.head.weight is model.embed.weight) == cfg.tie_embeddings
    tokens = tokens_of(cfg)
    assert torch.equal(model(tokens), Transformer(cfg).init_weights(3)(tokens))


def test_tied_head_is_the_embedding_through_copies_and_casts():
    model = Transformer(GPT2).init_weights(0)
    for other in (model, copy.deepcopy(model), Transformer(GPT2).bfloat16(), Transformer(GPT2).to("meta")):
        assert other.head.weight is other.embed.weight
        assert isinstance(other.head.weight, torch.nn.Parameter)
    untied = Transformer(LLAMA)
    assert untied.head.weight is not untied.embed.weight


@BOTH
def test_loss_is_the_sum_over_the_counted_targets(cfg):
    model = Transformer(cfg).init_weights(0)
    tokens, targets = tokens_of(cfg), tokens_of(cfg, seed=1)
    targets[0, :7] = -100
    logits = model(tokens)
    loss = model(tokens, targets)
    assert logits.shape == (2, 24, cfg.vocab_size)
    assert loss.shape == ()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@BOTH
def test_a_token_sees_the_past_and_not_the_future(cfg):
    model = Transformer(cfg).init_weights(0)
    tokens = tokens_of(cfg)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % cfg.vocab_size
    before, after = model(tokens), model(changed)
    # Within fp32's rounding: the kernels may block the two calls alike or not.
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=1e-5, atol=1e-5)
    assert ((before - after)[:, 10:].abs().amax(-1) > 1e-4).all()


@BOTH
@pytest.mark.parametrize("seq_len", [1, 9, 31])
def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(cfg, seq_len):
    model = Transformer(cfg).init_weights(0)
    tokens = tokens_of(cfg, seq_len=32)
    torch.testing.assert_close(model(tokens[:, :seq_len]), model(tokens)[:, :seq_len], rtol=1e-5, atol=1e-5)


@BOTH
def test_a_longer_sequence_is_refused(cfg):
    model = Transformer(cfg).init_weights(0)
    with pytest.raises(ValueError, match=r"sequences of 33 tokens, but model.seq_len=32 is the longest; cut them"):
        model(tokens_of(cfg, seq_len=33))


@BOTH
def test_bf16_is_near_fp32(cfg):
    model = Transformer(cfg).init_weights(0)
    narrow = copy.deepcopy(model).bfloat16()
    tokens, targets = tokens_of(cfg), tokens_of(cfg, seed=1)
    logits, narrow_logits = model(tokens), narrow(tokens)
    assert narrow_logits.dtype == torch.bfloat16
    # bf16 keeps 4e-3 of a value; about ten roundings lie between a token and its logits.
    assert (narrow_logits - logits).abs().max() < 0.05 * logits.abs().max()
    loss, narrow_loss = model(tokens, targets), narrow(tokens, targets)
    assert narrow_loss.dtype == torch.float32
    torch.testing.assert_close(narrow_loss, loss, rtol=1e-2, atol=0)
    narrow_loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in narrow.parameters())


def test_rotary_angles_stay_exact_far_out_in_bf16():
    cfg = ModelConfig(vocab_size=8, seq_len=8192, d_model=64, n_layers=1, n_heads=1, d_ff=8)
    cos, sin = rotary_tables(cfg, torch.arange(8192))
    assert cos.dtype == sin.dtype == torch.float32
    angle = 8191 * 10_000 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(cos[-1].double(), angle.cos(), rtol=0, atol=2e-3)  # 8191 * fp32's 6e-8, a few times
    x = torch.randn(1, 8192, 1, 64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x.bfloat16(), cos, sin)
    assert turned.dtype == torch.bfloat16
    # One rounding of the input and one of the result; rounding the tables too would show at large positions.
    assert (turned - rotate(x.bfloat16().float(), cos, sin)).abs().max() < 2**-8 * 4


def test_rotary_products_depend_on_distance_alone():
    cos, sin = rotary_tables(LLAMA, torch.arange(32))
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=g).expand(1, 32, 1, 8) for _ in range(2))
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T  # (T, T)
    for distance in (0, 1, 7):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 0.1


def test_rope_scaling_stretches_long_wavelengths_only():
    plain = ModelConfig(vocab_size=8, seq_len=8, d_model=64, n_layers=1, n_heads=1, d_ff=8, rope_theta=5e5)
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_seq_len=1024)
    before = rotary_frequencies(plain, torch.device("cpu"))
    after = rotary_frequencies(plain.model_copy(update={"rope_scaling": scaling}), torch.device("cpu"))
    wavelength = 2 * torch.pi / before
    assert torch.equal(after[wavelength < 256], before[wavelength < 256])
    assert torch.equal(after[wavelength > 1024], before[wavelength > 1024] / 8)
    between = (wavelength > 256) & (wavelength < 1024)
    assert between.any()
    assert ((after < before) & (after > before / 8))[between].all()


@BOTH
def test_dropout_acts_in_training_only(cfg):
    plain = Transformer(cfg).init_weights(0)
    model = Transformer(cfg.model_copy(update={"dropout": 0.3})).init_weights(0)
    tokens = tokens_of(cfg)
    expected = plain(tokens)
    assert not torch.allclose(model(tokens), expected, atol=1e-2)
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), expected)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


@BOTH
def test_blocks_can_be_recomputed(cfg):
    """The block takes and returns plain tensors, so activation checkpointing from outside changes no number."""
    tokens, targets = tokens_of(cfg), tokens_of(cfg, seed=1)
    plain, recomputed = (Transformer(cfg).init_weights(0) for _ in range(2))
    for block in recomputed.blocks:
        block.forward = lambda *args, inner=block.forward: torch.utils.checkpoint.checkpoint(
            inner, *args, use_reentrant=False
        )
    for model in (plain, recomputed):
        model(tokens, targets).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
