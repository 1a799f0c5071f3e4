"""One process against two, ZeRO stage against stage, recomputation against none: same losses, same weights."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention

import model.transformer as transformer
from launcher.bad_steps import BadStep
from model.attention import document_mask
from parallel.config import ParallelConfig
from parallel.recompute import _is_dear, _selective_contexts, apply_recompute
from ranks import MODEL, OPTIM, batch_of, build, config_of, run_ranks, run_steps, whole_state

STAGES = (0, 1, 2, 3)
RECOMPUTE = ("none", "full", "every_k", "selective")
STEPS = 4
# (stage, precision, what is in host memory), for what is done about single updates
UPDATES = [
    (stage, precision, offload)
    for precision in ("fp32", "bf16")
    for stage, offload in [*((s, "none") for s in STAGES), *((s, "optimizer") for s in STAGES[1:]), (3, "both")]
]


class Alone:
    """A mesh of one process, as far as batch_of asks."""

    dp_rank, dp_size = 0, 1


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
    from ranks import BATCH

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


DOCUMENT_STEPS = 2


def with_documents(batch):
    """Documents for a batch, of 2 to 6 tokens by sample, and targets that stay within them."""
    samples = torch.from_numpy(batch.samples).unsqueeze(-1)
    documents = (torch.arange(batch.tokens.shape[-1]) + samples) // (2 + samples % 5)
    targets = batch.targets.clone()
    targets[..., :-1][documents[..., 1:] != documents[..., :-1]] = -100
    return documents, targets


@pytest.fixture
def choose(monkeypatch):
    """Masks of one kind, whatever the device, and gradients for the plain formula of FlexAttention on CPU."""

    def chosen(way):
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        monkeypatch.setattr(transformer, "flex_serves", lambda *_: way == "flex")

    return chosen


@pytest.mark.parametrize(("way", "dropout"), [("dense", 0.0), ("flex", 0.0), ("dense", 0.2)])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_recomputed_blocks_take_documents(recompute, way, dropout, choose):
    """Without an engine: loss and gradients to the bit, dropout drawing the same numbers twice."""
    choose(way)
    batch = batch_of(Alone, 0, accum=1)
    documents, targets = with_documents(batch)
    results = []
    for mode in ("none", recompute):
        model = transformer.Transformer(MODEL.model_copy(update={"dropout": dropout})).init_weights(5)
        apply_recompute(model.blocks, ParallelConfig(activation_checkpointing=mode))
        torch.manual_seed(0)
        loss = model(batch.tokens[0], targets[0], documents[0])
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_selective_leaves_compiled_attention_compiled():
    """Under a mode that is not made for it, a compiled function runs eagerly: on a GPU with all scores in memory."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention.flex_attention, backend=counter)
    mask = document_mask(torch.zeros(1, 128, dtype=torch.int64), flex=True)
    q = torch.ones(1, 2, 128, 16)
    for mode in _selective_contexts():
        with torch.no_grad(), mode:
            compiled(q, q, q, block_mask=mask)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_flash_attention_for_cpu", ()),
        ("_scaled_dot_product_efficient_attention", (None, True)),
        ("_scaled_dot_product_cudnn_attention", (None, True)),
    ],
)
def test_attention_that_draws_dropout_is_not_kept(name, without):
    """By arguments alone: kernels with dropout of their own exist on GPUs only. Arguments as torch passes them."""
    func = getattr(torch.ops.aten, name).default
    qkv = (torch.empty(0),) * 3
    assert _is_dear(func, (*qkv, *without), {})
    assert _is_dear(func, (*qkv, *without, 0.0, True), {})
    assert not _is_dear(func, (*qkv, *without, 0.1, True), {})
    assert not _is_dear(func, (*qkv, *without), {"dropout_p": 0.1})
    assert not _is_dear(torch.ops.aten.add.Tensor, qkv[:2], {})


def run_document_steps(engine):
    """(loss, gradient norm) of each step."""
    results = []
    for step in range(DOCUMENT_STEPS):
        batch = batch_of(engine.mesh, step)
        documents, targets = with_documents(batch)
        n_targets = int(engine.mesh.sum([float((targets != -100).sum())])[0])
        loss = 0.0
        for a in range(len(batch.tokens)):
            part = engine.forward(batch.tokens[a], targets[a], documents[a])
            engine.backward(part, n_targets)
            loss += part.item()
        results.append((engine.mesh.sum([loss])[0] / n_targets, engine.update(OPTIM.lr).grad_norm))
    return results


def train_documents(mesh, flex):
    """Rows of several documents through stages and kinds of recomputation; ZeRO 3 last, it replaces F.linear."""
    if flex:  # the way of a GPU, by FlexAttention's plain formula, for which torch refuses gradients on CPU
        flex_attention._validate_device = lambda *_: None
        transformer.flex_serves = lambda *_: True
    results = {}
    for stage in (1, 3):
        for precision in ("fp32", "bf16"):
            for recompute in RECOMPUTE:
                cfg = ParallelConfig(zero_stage=stage, precision=precision, activation_checkpointing=recompute)
                engine = build(mesh, cfg)
                results[stage, precision, recompute] = run_document_steps(engine), whole_state(engine)
                engine.close()
    return results


@pytest.fixture(scope="module")
def trained_on_documents():
    return {way: run_ranks(2, train_documents, way == "flex")[0] for way in ("dense", "flex")}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dense", "flex"])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputation_changes_no_bit_with_documents(trained_on_documents, stage, precision, recompute, way):
    losses, state = trained_on_documents[way][stage, precision, recompute]
    expected_losses, expected = trained_on_documents[way][stage, precision, "none"]
    assert losses == expected_losses
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dense", "flex"])
@pytest.mark.parametrize("stage", [1, 3])
def test_documents_reach_the_model(trained_on_documents, stage, way):
    """The first loss is the model's own with the same documents, and not the one without; 1e-5: the order of adding."""
    model = transformer.Transformer(MODEL).init_weights(5)
    batch = batch_of(Alone, 0, accum=1)
    documents, targets = with_documents(batch)
    n_targets = (targets != -100).sum()
    loss = trained_on_documents[way][stage, "fp32", "none"][0][0][0]
    with torch.no_grad():
        assert loss == pytest.approx((model(batch.tokens[0], targets[0], documents[0]) / n_targets).item(), rel=1e-5)
        assert loss != pytest.approx((model(batch.tokens[0], targets[0]) / n_targets).item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_masks_of_both_kinds_train_alike(trained_on_documents, stage):
    """1e-5 as between stages: another order of adding up."""
    dense, flex = (trained_on_documents[way][stage, "fp32", "none"] for way in ("dense", "flex"))
    torch.testing.assert_close(torch.tensor(flex[0]), torch.tensor(dense[0]), rtol=1e-5, atol=1e-5)
    for key in dense[1]:
        torch.testing.assert_close(flex[1][key], dense[1][key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def poison(mesh, case):
    """A step with a NaN on the last rank only, between two good ones."""
    engine = build(mesh, config_of(*case))
    before = run_steps(engine, range(1))
    state = whole_state(engine)
    forward = engine.forward
    engine.forward = lambda *batch: forward(*batch) * (math.nan if mesh.rank == mesh.world_size - 1 else 1)
    bad = run_steps(engine, range(1, 2))
    engine.forward = forward
    unchanged = all(torch.equal(state[key], value) for key, value in whole_state(engine).items())
    steps_after_bad = engine.adam_steps
    return before, bad, unchanged, steps_after_bad, run_steps(engine, range(2, 3))


def poison_all(mesh):
    return {case: poison(mesh, case) for case in UPDATES}


@pytest.fixture(scope="module")
def poisoned():
    return run_ranks(2, poison_all)


@pytest.mark.parametrize("case", UPDATES, ids=str)
@pytest.mark.fault(35)
def test_a_nan_on_one_rank_skips_the_update_on_all(poisoned, case):
    for rank in poisoned:
        before, bad, unchanged, adam_steps, after = rank[case]
        assert bad[0][2], "the update was taken"
        assert bad[0][1] == math.inf
        assert unchanged
        assert adam_steps == 1
        assert not before[0][2]
        assert not after[0][2]
        assert math.isfinite(after[0][0])


def veto_one(mesh, case):
    """Steps 0 and 2 with a step between that the caller does not want; and the same two without it."""
    results = {}
    for name in ("vetoed", "without"):
        engine = build(mesh, config_of(*case))
        first = run_steps(engine, range(1))
        asked = []
        if name == "vetoed":
            (loss, norm, left_out) = run_steps(engine, range(1, 2), judge=Refusing(asked))[0]
            assert left_out
            assert asked == [(loss, norm)]  # once, whatever the parts of the update
            assert math.isfinite(norm)
        results[name] = first, run_steps(engine, range(2, 3)), engine.adam_steps, whole_state(engine)
        engine.close()
    return results


class Refusing:
    """A judge of steps that wants none of them."""

    def __init__(self, asked):
        self.asked = asked

    def look(self, loss, norm):
        self.asked.append((loss, norm))
        return BadStep("loss_spike", "skip", "a test's")


def veto_all(mesh):
    return {case: veto_one(mesh, case) for case in UPDATES}


@pytest.fixture(scope="module")
def vetoed():
    return run_ranks(2, veto_all)[0]


@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_an_update_that_the_caller_refuses_leaves_no_trace(vetoed, case):
    """Weights, moments and Adam's step as if the step had not been; DeepSpeed's own state does not matter to the next."""
    with_it, without = vetoed[case]["vetoed"], vetoed[case]["without"]
    assert with_it[:3] == without[:3]
    assert with_it[2] == 2
    for key, value in without[3].items():
        assert torch.equal(with_it[3][key], value), key
