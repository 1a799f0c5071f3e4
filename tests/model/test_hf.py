"""Our network is transformers' network: logits, gradients, weights and configs, both ways."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.config import ModelConfig, RopeScaling
from model.hf import from_hf_config, from_hf_state, to_hf_config, to_hf_state, weight_rules
from model.transformer import Transformer

MODELS = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def gpt2(**options) -> GPT2Config:
    sizes = {"vocab_size": 71, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return GPT2Config(**{**sizes, **off, **options})


def llama(kind=LlamaConfig, **options):
    sizes = {
        "vocab_size": 71,
        "max_position_embeddings": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 52,
    }
    return kind(**{**sizes, **options})


def qwen3(**options) -> Qwen3Config:
    return llama(Qwen3Config, **{"head_dim": 16, "tie_word_embeddings": True, **options})


CASES = {
    "gpt2": lambda: gpt2(),
    "gpt2 untied, one head, d_ff": lambda: gpt2(n_head=1, n_inner=36, tie_word_embeddings=False),
    "gpt2 eps": lambda: gpt2(layer_norm_epsilon=0.3, activation_function="gelu_pytorch_tanh"),
    "gpt2 init": lambda: gpt2(initializer_range=0.5),
    "llama gqa": lambda: llama(initializer_range=0.5),
    "llama tied, mqa": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama no gqa, theta, eps": lambda: llama(num_key_value_heads=4, rope_theta=50.0, rms_norm_eps=0.3),
    "llama3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama biases, head_dim": lambda: llama(attention_bias=True, mlp_bias=True, head_dim=12),
    "qwen3 tied": lambda: qwen3(),
    "qwen3 untied, bias": lambda: qwen3(tie_word_embeddings=False, attention_bias=True, head_dim=8),
    "qwen3 llama3 rope, 3 kv of 6": lambda: qwen3(
        num_attention_heads=6, num_key_value_heads=3, head_dim=10, rope_parameters=LLAMA3_ROPE
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def build_hf(config, attention="sdpa", seed=0):
    """Their model with no parameter at a special value: norms not 1, biases not 0, scores far from even."""
    model = MODELS[config.model_type]._from_config(config, attn_implementation=attention)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
    return model.eval()


def ours_from(hf_model) -> Transformer:
    cfg = from_hf_config(hf_model.config)
    model = Transformer(cfg)
    model.load_state_dict(from_hf_state(cfg, hf_model.state_dict()))
    return model


def batch(config, seq_len=33, seed=1):
    tokens = torch.randint(0, config.vocab_size, (2, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def assert_same(actual, expected, what, tolerance=1e-5):
    """Equal but for the order of fp32 sums: 1e-5 of the largest value is about a hundred roundings of 1.2e-7.

    A swapped layout, a missing bias or another epsilon shows in the first digits. Gradients get 1e-4: what reaches wq
    and wk has gone through the backward of softmax, where numbers ten times the result cancel.
    """
    assert actual.shape == expected.shape, what
    assert expected.abs().max() > 0, what
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{what}: off by {error:.1e} of the largest value"


@EVERY_CASE
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_are_equal(case, attention):
    theirs = build_hf(CASES[case](), attention)
    ours = ours_from(theirs)
    tokens, targets = batch(theirs.config)

    logits = theirs(tokens).logits
    assert_same(ours(tokens), logits, "logits")

    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    loss = ours(tokens, targets)
    loss.backward()
    assert_same(loss, expected, "loss")
    gradients = from_hf_state(ours.cfg, {name: p.grad for name, p in theirs.named_parameters()})
    compared = dict(ours.named_parameters())
    for name, parameter in compared.items():
        if name.endswith("attn.wk.bias"):
            # The same amount added to every score of a query: softmax ignores it without rotary, so this is rounding.
            scale = compared[name.replace("wk", "wq")].grad.abs().max()
            assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * scale, name
        else:
            assert_same(parameter.grad, gradients[name], name, tolerance=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama3 rope", "qwen3 tied"])
@pytest.mark.parametrize("seq_len", [1, 7, 40])
def test_other_lengths(case, seq_len):
    theirs = build_hf(CASES[case]())
    tokens, _ = batch(theirs.config, seq_len)
    assert_same(ours_from(theirs)(tokens), theirs(tokens).logits, "logits")


def test_gpt2_dropout_is_theirs():
    """The same places, rates and order: from one seed, both draw the same masks."""
    theirs = build_hf(gpt2(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)).train()
    ours = ours_from(theirs).train()
    assert ours.cfg.dropout == 0.2
    tokens, _ = batch(theirs.config)
    torch.manual_seed(5)
    expected = theirs(tokens).logits
    torch.manual_seed(5)
    actual = ours(tokens)
    assert_same(actual, expected, "logits with dropout")
    assert not torch.allclose(actual, ours.eval()(tokens), atol=0.1)


@EVERY_CASE
def test_weights_go_round_exactly(case):
    theirs = build_hf(CASES[case]())
    cfg = from_hf_config(theirs.config)
    original = theirs.state_dict()
    ours = from_hf_state(cfg, original)
    assert ours.keys() == Transformer(cfg).state_dict().keys()
    back = to_hf_state(cfg, ours)
    dropped = {"lm_head.weight"} if cfg.tie_embeddings else set()
    assert back.keys() == original.keys() - dropped
    for name, tensor in back.items():
        assert torch.equal(tensor, original[name]), name
        assert tensor.is_contiguous(), name
    again = from_hf_state(cfg, back)
    for name, tensor in ours.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.is_contiguous(), name


@EVERY_CASE
def test_configs_go_round(case):
    cfg = from_hf_config(CASES[case]())
    converted = to_hf_config(cfg)
    assert converted.initializer_range == cfg.init_std
    # transformers' configs do not hold how residual projections are drawn
    assert from_hf_config(converted).model_dump(exclude={"scale_residual_init"}) == cfg.model_dump(
        exclude={"scale_residual_init"}
    )


@EVERY_CASE
def test_their_model_from_our_config_and_weights(case):
    """The way of an export: nothing of theirs but what to_hf_config and to_hf_state give."""
    cfg = from_hf_config(CASES[case]())
    ours = Transformer(cfg.model_copy(update={"init_std": 0.2})).init_weights(3)
    theirs = MODELS[to_hf_config(cfg).model_type](to_hf_config(cfg)).eval()
    assert to_hf_config(cfg).architectures == [type(theirs).__name__]
    missing, unexpected = theirs.load_state_dict(to_hf_state(cfg, ours.state_dict()), strict=False)
    assert missing == (["lm_head.weight"] if cfg.tie_embeddings else [])
    assert unexpected == []
    tokens, _ = batch(theirs.config)
    assert_same(ours(tokens), theirs(tokens).logits, "logits")


def test_to_hf_takes_parameters_named_once():
    """named_parameters() leaves out the tied head, state_dict() has it; both are a whole state."""
    model = Transformer(from_hf_config(qwen3())).init_weights(0)
    once = to_hf_state(model.cfg, dict(model.named_parameters()))
    assert once.keys() == to_hf_state(model.cfg, model.state_dict()).keys()


def test_token_ids_are_left_alone():
    for config in (gpt2(bos_token_id=50256, eos_token_id=50256), llama(), qwen3()):
        converted, default = to_hf_config(from_hf_config(config)), type(config)()
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(converted, key) == getattr(default, key), key


def test_dropout_is_handed_to_gpt2_and_off_by_default():
    cfg = from_hf_config(gpt2())
    for rate in (0.0, 0.1):
        converted = to_hf_config(cfg.model_copy(update={"dropout": rate}))
        assert (converted.embd_pdrop, converted.attn_pdrop, converted.resid_pdrop) == (rate, rate, rate)
    assert to_hf_config(from_hf_config(llama())).attention_dropout == 0.0


def test_published_llama_31_8b_config():
    """Values of the published config.json."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    )
    cfg = from_hf_config(config)
    assert cfg.n_params == 8_030_261_248
    assert cfg.rope_theta == 500000.0
    assert cfg.rope_scaling == RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_seq_len=8192)


def test_default_gpt2_config_is_the_published_124m():
    cfg = from_hf_config(GPT2Config())
    assert cfg.n_params == 124_439_808
    assert (cfg.d_ff, cfg.dropout, cfg.scale_residual_init) == (3072, 0.1, True)


def test_older_files_are_read():
    """The published GPT-2 has no 'transformer.' prefix and carries causal masks; old Llamas carry frequencies."""
    theirs = build_hf(gpt2())
    cfg = from_hf_config(theirs.config)
    expected = from_hf_state(cfg, theirs.state_dict())
    old = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    old["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    read = from_hf_state(cfg, old)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)

    theirs = build_hf(llama())
    cfg = from_hf_config(theirs.config)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert from_hf_state(cfg, theirs.state_dict() | frequencies).keys() == Transformer(cfg).state_dict().keys()


def test_rules_name_every_tensor_once():
    cfg = from_hf_config(gpt2())
    rules = weight_rules(cfg)
    assert len({rule.hf for rule in rules}) == len(rules)
    names = [name for rule in rules for name in rule.ours]
    assert sorted(names) == sorted(name for name, _ in Transformer(cfg).named_parameters())


@pytest.mark.parametrize("convert", [to_hf_state, from_hf_state])
def test_missing_and_unexpected_keys_are_listed(convert):
    theirs = build_hf(llama())
    cfg = from_hf_config(theirs.config)
    state = dict(theirs.state_dict()) if convert is from_hf_state else Transformer(cfg).state_dict()
    gone = "model.layers.1.mlp.up_proj.weight" if convert is from_hf_state else "blocks.1.mlp.w_up.weight"
    more = state | {"extra.weight": torch.zeros(1)}
    fewer = {name: tensor for name, tensor in state.items() if name != gone}
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['extra.weight'\]; use the config"):
        convert(cfg, more)
    with pytest.raises(ValueError, match=rf"missing \['{gone}'\], unexpected \[\]; use the config"):
        convert(cfg, fewer)


def test_untied_model_needs_its_head():
    theirs = build_hf(llama())
    state = {name: t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        from_hf_state(from_hf_config(theirs.config), state)


@pytest.mark.parametrize("convert", [to_hf_state, from_hf_state])
def test_tied_head_that_differs_is_refused(convert):
    theirs = build_hf(qwen3())
    cfg = from_hf_config(theirs.config)
    head = "lm_head.weight" if convert is from_hf_state else "head.weight"
    state = dict(theirs.state_dict()) if convert is from_hf_state else from_hf_state(cfg, theirs.state_dict())
    state[head] = state[head].clone()
    convert(cfg, state)  # an equal copy is fine
    state[head] = state[head] + 1
    with pytest.raises(ValueError, match=f"{head} differs from .*tie_embeddings"):
        convert(cfg, state)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (gpt2, {"norm": "rmsnorm"}, r"nearest is GPT-2, but model.norm='rmsnorm' \(needs 'layernorm'\)"),
        (gpt2, {"mlp": "swiglu"}, r"model.mlp='swiglu' \(needs 'gelu'\)"),
        (gpt2, {"qk_norm": True}, r"nearest is GPT-2, but model.qk_norm=True"),
        (gpt2, {"attention_bias": False}, r"model.attention_bias=False \(needs True\)"),
        (gpt2, {"attention_output_bias": False}, r"model.attention_output_bias=False \(needs True\)"),
        (gpt2, {"mlp_bias": False}, r"model.mlp_bias=False \(needs True\)"),
        (gpt2, {"n_kv_heads": 2}, r"model.n_kv_heads=2 \(needs 4, as n_heads\)"),
        (gpt2, {"head_dim": 16}, r"model.head_dim=16 \(needs n_heads \* head_dim = d_model = 32\)"),
        (llama, {"norm": "layernorm"}, r"nearest is Llama, but model.norm='layernorm' \(needs 'rmsnorm'\)"),
        (llama, {"mlp": "gelu"}, r"model.mlp='gelu' \(needs 'swiglu'\)"),
        (llama, {"attention_output_bias": True}, r"model.attention_output_bias=True \(needs False\)"),
        (llama, {"n_heads": 6, "head_dim": 8}, r"model.n_heads=6 \(needs a divisor of d_model=32\)"),
        (llama, {"dropout": 0.1}, r"model.dropout=0.1 \(needs 0.0\); dropout plays no part outside training"),
        (qwen3, {"norm": "layernorm"}, r"nearest is Qwen3, but model.norm='layernorm'"),
        (qwen3, {"mlp": "gelu"}, r"model.mlp='gelu' \(needs 'swiglu'\)"),
        (qwen3, {"mlp_bias": True}, r"model.mlp_bias=True \(needs False\)"),
        (qwen3, {"attention_bias": True}, r"model.attention_output_bias=False \(needs True\)"),
        (qwen3, {"dropout": 0.1}, r"model.dropout=0.1 \(needs 0.0\)"),
        (llama, {"norm": "layernorm", "mlp": "gelu"}, r"model.norm='layernorm' .*, model.mlp='gelu'"),
    ],
)
def test_models_without_an_equal_are_refused(base, change, message):
    cfg = ModelConfig(**{**from_hf_config(base()).model_dump(), **change})
    with pytest.raises(ValueError, match=message):
        to_hf_config(cfg)
    with pytest.raises(ValueError, match=message):
        weight_rules(cfg)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertConfig(), "model_type 'bert' has no equal here; expected gpt2, llama or qwen3"),
        (
            lambda: gpt2(activation_function="relu"),
            "activation_function='relu' has no equal here; expected 'gelu_new' or",
        ),
        (lambda: gpt2(activation_function="gelu"), "activation_function='gelu' has no equal here"),
        (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights=False has no equal here; expected True"),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True has no equal"),
        (lambda: gpt2(add_cross_attention=True), "add_cross_attention=True has no equal here"),
        (lambda: gpt2(resid_pdrop=0.1), "dropouts differ, .*'resid_pdrop': 0.1.*; model.dropout is one number"),
        (lambda: llama(hidden_act="gelu"), "llama with hidden_act='gelu' has no equal here; expected 'silu'"),
        (lambda: llama(attention_dropout=0.1), "attention_dropout=0.1 has no equal here; expected 0.0"),
        (
            lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type='linear' has no equal here; expected 'default' or 'llama3'",
        ),
        (
            lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor=0.5 has no equal here; expected 1.0",
        ),
        (lambda: qwen3(hidden_act="relu"), "qwen3 with hidden_act='relu' has no equal here"),
        (
            lambda: qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            r"layer_types=\['full_attention', 'sliding_attention'\] has no equal here",
        ),
    ],
)
def test_their_options_without_an_equal_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(make())
