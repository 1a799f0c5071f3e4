"""One process against two, ZeRO stage against stage, recomputation against none: same losses, same weights."""

import math

import pytest
import torch

from parallel.config import ParallelConfig
from ranks import build, run_ranks, run_steps, whole_state

STAGES = (0, 1, 2, 3)
RECOMPUTE = ("none", "full", "every_k", "selective")
STEPS = 4


def train_all(mesh):
    """Every stage, precision and kind of recomputation in one set of processes; ZeRO 3 last, it replaces F.linear."""
    results = {}
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            for recompute in RECOMPUTE:
                cfg = ParallelConfig(zero_stage=stage, precision=precision, activation_checkpointing=recompute)
                engine = build(mesh, cfg)
                results[stage, precision, recompute] = run_steps(engine, range(STEPS)), whole_state(engine)
                engine.close()
    return results


@pytest.fixture(scope="module", params=[1, 2])
def trained(request):
    return run_ranks(request.param, train_all)[0]


@pytest.fixture(scope="module")
def plain():
    """One process without DeepSpeed: the model, torch's AdamW and clipping."""
    from model.transformer import Transformer
    from parallel.optim import build_adamw
    from ranks import BATCH, MODEL, OPTIM, batch_of

    class Alone:
        dp_rank, dp_size = 0, 1

    model = Transformer(MODEL).init_weights(5)
    optimizer = build_adamw(model.named_parameters(), OPTIM, checked=False)
    losses = []
    for step in range(STEPS):
        batch = batch_of(Alone, step, accum=1)
        assert batch.tokens.shape[:2] == (1, BATCH)
        loss = model(batch.tokens[0], batch.targets[0]) / batch.n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item(), False))
    return losses, {name: p.detach().flatten() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_equals_a_plain_process_in_fp32(trained, plain, stage):
    """1e-5: sums over ranks and micro-batches are taken in another order, a few units in the last of 24 bits."""
    (losses, state), (plain_losses, plain_weights) = trained[stage, "fp32", "none"], plain
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain_losses), rtol=1e-5, atol=1e-5)
    for name, weights in plain_weights.items():
        torch.testing.assert_close(
            state[name, "weight"], weights, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_fp32(trained, plain, stage):
    """2e-3 of a loss of 7: bf16 has 8 bits, its rounding of logits averages out over tokens."""
    losses, _ = trained[stage, "bf16", "none"]
    torch.testing.assert_close(torch.tensor(losses)[:, 0], torch.tensor(plain[0])[:, 0], rtol=2e-3, atol=0)


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_changes_no_bit(trained, stage, precision, recompute):
    losses, state = trained[stage, precision, recompute]
    expected_losses, expected = trained[stage, precision, "none"]
    assert losses == expected_losses
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


def poison(mesh, stage, precision):
    """A step with a NaN on the last rank only, between two good ones."""
    engine = build(mesh, ParallelConfig(zero_stage=stage, precision=precision))
    before = run_steps(engine, range(1))
    state = whole_state(engine)
    forward = engine.forward
    engine.forward = lambda tokens, targets: (
        forward(tokens, targets) * (math.nan if mesh.rank == mesh.world_size - 1 else 1)
    )
    bad = run_steps(engine, range(1, 2))
    engine.forward = forward
    unchanged = all(torch.equal(state[key], value) for key, value in whole_state(engine).items())
    steps_after_bad = engine.adam_steps
    return before, bad, unchanged, steps_after_bad, run_steps(engine, range(2, 3))


def poison_all(mesh):
    return {(s, p): poison(mesh, s, p) for s in STAGES for p in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def poisoned():
    return run_ranks(2, poison_all)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_skips_the_update_on_all(poisoned, stage, precision):
    for rank in poisoned:
        before, bad, unchanged, adam_steps, after = rank[stage, precision]
        assert bad[0][2], "the update was taken"
        assert bad[0][1] == math.inf
        assert unchanged
        assert adam_steps == 1
        assert not before[0][2]
        assert not after[0][2]
        assert math.isfinite(after[0][0])
