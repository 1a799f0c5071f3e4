"""The schedule against its formulas; which parameters decay; the checked optimizer."""

import itertools
import math

import pytest
import torch

from parallel.config import OptimConfig
from parallel.optim import build_adamw, lr_at


def test_warm_up_is_linear_and_reaches_the_peak():
    cfg = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(s, 100, cfg) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_is_near_the_floor_and_none_is_below(schedule):
    cfg = OptimConfig(
        lr=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule=schedule, decay_steps=50 * (schedule == "wsd")
    )
    rates = [lr_at(s, 1000, cfg) for s in range(1000)]
    assert rates[-1] == pytest.approx(0.1, abs=0.02)
    assert min(rates[10:]) >= 0.1
    assert max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_shapes_between():
    cosine = OptimConfig(lr=2.0, warmup_steps=0, min_lr_ratio=0.0)
    assert lr_at(25, 100, cosine) == pytest.approx(1 + math.cos(math.pi / 4))
    linear = OptimConfig(lr=2.0, warmup_steps=0, min_lr_ratio=0.5, schedule="linear")
    assert lr_at(50, 100, linear) == pytest.approx(1.5)
    wsd = OptimConfig(lr=2.0, warmup_steps=0, min_lr_ratio=0.0, schedule="wsd", decay_steps=10)
    assert [lr_at(s, 100, wsd) for s in (0, 89, 90, 95)] == pytest.approx([2.0, 2.0, 2.0, 1.0])
    assert lr_at(99, 100, OptimConfig(lr=2.0, warmup_steps=0, schedule="constant")) == 2.0


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    optimizer = build_adamw(model.named_parameters(), OptimConfig(weight_decay=0.3), checked=False)
    decay, keep = optimizer.param_groups
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    assert {tuple(p.shape) for p in decay["params"]} == {(5, 4), (3, 4)}
    assert {tuple(p.shape) for p in keep["params"]} == {(4,), (3,)}


@pytest.mark.fault(35)
def test_the_checked_optimizer_equals_clipping_and_adamw_and_skips_nan():
    torch.manual_seed(0)
    cfg = OptimConfig(lr=0.1, grad_clip=0.5)
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    ours = build_adamw([("w", weights[0])], cfg, checked=True)
    theirs = build_adamw([("w", weights[1])], cfg, checked=False)
    weights[1].data.copy_(weights[0].data)
    for _ in range(3):
        grad = torch.randn(4, 3) * 5
        weights[0].grad, weights[1].grad = grad.clone(), grad.clone()
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_([weights[1]], cfg.grad_clip)
        theirs.step()
        assert ours._global_grad_norm == pytest.approx(norm.item())
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    before = weights[0].detach().clone()
    weights[0].grad = torch.full((4, 3), torch.nan)
    ours.step()
    assert ours.overflow
    assert torch.equal(weights[0], before)
