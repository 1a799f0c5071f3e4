"""LoRA's layers are peft's own: the same loss and gradients as peft around transformers' model, and the same merge."""

import sys

import peft
import pytest
import torch
from pydantic import ValidationError
from test_hf import assert_same, batch, build_hf, llama, ours_from
from test_hf_model import config_of, rows
from transformers import AutoModelForMaskedLM

from model.classifier import Classifier
from model.config import ModelConfig
from model.hf_config import to_transformers
from model.hf_model import HfModel
from model.init import initial_values
from model.lora import (
    LoraConfig,
    LoraError,
    add_adapters,
    is_adapter,
    linear_layers,
    merged,
    plain_name,
    targets_of,
    within,
)
from model.transformer import Transformer

CFG = ModelConfig(vocab_size=50, seq_len=8, d_model=12, n_layers=2, n_heads=2, d_ff=20)
THEIRS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj", "w_up": "up_proj",
          "w_down": "down_proj", "attn": "self_attn"}  # fmt: skip


def values_of(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """None of them 0, as B is at the start."""
    g = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(parameter.shape, generator=g) * 0.3


def theirs_for(name: str) -> str:
    parts = [THEIRS.get(part, part) for part in name.removeprefix("blocks.").split(".")]
    return "base_model.model.model.layers." + ".".join(parts)


@pytest.mark.parametrize("targets", [None, ["wq", "w_down"]])
def test_losses_and_gradients_are_those_of_peft_around_transformers(targets):
    hf = build_hf(llama())
    lora = LoraConfig(rank=3, alpha=7.0, targets=targets)
    ours = ours_from(hf)
    names = [THEIRS[name] for name in targets_of(ours, lora)]
    add_adapters(ours, lora, ())
    theirs = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=names, bias="none"))
    with torch.no_grad():
        of_theirs = dict(theirs.named_parameters())
        adapters = [(name, p) for name, p in ours.named_parameters() if is_adapter(name)]
        for name, p in adapters:
            p.copy_(values_of(name, p))
            of_theirs[theirs_for(name)].copy_(p)
    tokens, targets_of_tokens = batch(hf.config)
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_of_tokens.flatten(), reduction="sum")
    loss.backward()
    summed = ours(tokens, targets_of_tokens)
    summed.backward()
    assert_same(ours(tokens).detach(), logits.detach(), "logits")
    assert_same(summed.detach(), loss.detach(), "loss")
    assert len(adapters) == sum(p.requires_grad for p in theirs.parameters())
    for name, p in adapters:
        assert_same(p.grad, of_theirs[theirs_for(name)].grad, name, 1e-4)
    assert all(p.grad is None for name, p in ours.named_parameters() if not is_adapter(name))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "modernbert"])
def test_models_that_transformers_builds_take_them_as_well(kind):
    cfg, lora = config_of("masked", kind), LoraConfig(rank=2, alpha=3.0)
    ours = HfModel(cfg).init_weights(3)
    layers = [name for names in linear_layers(ours).values() for name in names]
    add_adapters(ours, lora, ())
    theirs = AutoModelForMaskedLM.from_config(to_transformers(cfg, pad_token_id=None))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=layers))
    of_theirs = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(values_of(name, p) if is_adapter(name) else p + values_of(name, p) / 3)
            of_theirs[name].copy_(p)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in of_theirs.items() if p.requires_grad}
    tokens, targets = rows()
    loss = ours.eval()(tokens, targets)
    logits = theirs.eval()(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_same(loss.detach(), expected.detach(), "loss")
    loss.backward()
    expected.backward()
    for name, p in trained.items():
        assert_same(p.grad, of_theirs[name].grad, name, 1e-4)


def test_layers_that_are_not_linear_layers_of_torch_are_refused():
    with pytest.raises(LoraError, match="lora: the model's blocks have no torch.nn.Linear, which alone gets adapters"):
        targets_of(HfModel(config_of("causal", "gpt2")), LoraConfig())


def test_merged_weights_are_those_that_peft_merges_and_any_range_has_the_same_bits():
    model = add_adapters(Transformer(CFG), LoraConfig(rank=5, alpha=3.0), ())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values_of(name, p))
    layer = model.blocks[1].mlp.w_up
    weight, a, b = (p.detach().clone() for p in (layer.base_layer.weight, layer.lora_A.default.weight,
                                                 layer.lora_B.default.weight))  # fmt: skip
    whole = merged(weight.flatten(), a, b, 3.0 / 5, 0)
    layer.merge()
    torch.testing.assert_close(whole.view(weight.shape), layer.base_layer.weight.detach(), rtol=1e-6, atol=1e-6)
    for start, stop in [(0, 1), (5, 6), (11, 37), (12, 24), (200, 240)]:
        assert torch.equal(merged(weight.flatten()[start:stop], a, b, 3.0 / 5, start), whole[start:stop])


def test_all_is_frozen_but_adapters_and_a_head_for_labels():
    model = add_adapters(Classifier(CFG, 3), LoraConfig(targets=["wv"]), ("score.",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {f"blocks.{i}.attn.wv.lora_{part}.default.weight" for i in (0, 1) for part in "AB"}
    assert trained == {*parts, "score.weight"}
    with torch.device("meta"):
        plain = [name for name, _ in Classifier(CFG, 3).named_parameters()]
    assert sorted(plain_name(name) for name, _ in model.named_parameters() if not is_adapter(name)) == sorted(plain)
    assert within("blocks.0.attn.wv.weight", ".base_layer.") in dict(model.named_parameters())


def test_a_is_drawn_as_peft_draws_it_and_b_is_nothing():
    a, shape = "blocks.0.attn.wq.lora_A.default.weight", (64, 400)
    drawn = initial_values(a, shape, CFG, seed=3)
    theirs = torch.nn.Linear(400, 64, bias=False)
    torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5)
    bound = theirs.weight.abs().max().item()
    assert 0.999 * bound < drawn.abs().max() <= 1 / 400**0.5
    assert abs(drawn.mean()) < 0.01 * bound
    assert drawn.std() == pytest.approx(theirs.weight.std().item(), rel=0.01)
    assert torch.equal(initial_values(a, shape, CFG, 3, 17, 900), drawn[17:900])
    assert not torch.equal(initial_values(a.replace("wq", "wk"), shape, CFG, 3), drawn)
    assert not initial_values(a.replace("lora_A", "lora_B"), (400, 64), CFG, seed=3).any()


def test_a_target_that_names_nothing_is_refused():
    gpt2 = Transformer(CFG.model_copy(update={"mlp": "gelu"}))
    assert sorted(linear_layers(gpt2)) == ["w_down", "w_up", "wk", "wo", "wq", "wv"]
    message = "lora.targets: w_gate, score names no linear layer of the model's blocks; they are w_down, w_up, wk"
    with pytest.raises(LoraError, match=message):
        add_adapters(gpt2, LoraConfig(targets=["wq", "w_gate", "score"]), ())


def test_peft_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoraError, match=r"lora needs peft .*; run: pip install -c constraints.txt -e '.\[lora\]'"):
        add_adapters(Transformer(CFG), LoraConfig(), ())


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}, {"rank": 2.5}, {"alpha": float("inf")}]
)
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(ValidationError, match=f"LoraConfig\n{next(iter(wrong))}"):
        LoraConfig(**wrong)
