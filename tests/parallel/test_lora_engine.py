"""Adapters beside a frozen model: what trains and what does not, whatever the stage, the ranks and what is recomputed."""

from dataclasses import replace

import pytest
import torch
from test_hf_engine import BERT, documents_of

from launcher.pretrain import train_step
from model.config import ModelConfig
from model.hf_model import HfClassifier
from model.init import initial_values
from model.lora import LoraConfig, add_adapters, is_adapter, plain_name
from model.preference import Preference
from model.transformer import Transformer
from parallel.checkpoint import CheckpointReader, folder_name
from parallel.optim import build_adamw
from parallel.state import KINDS
from ranks import ACCUM, BATCH, MODEL, OPTIM, batch_of, build, config_of, run_ranks, run_steps, save, whole_state

LORA = LoraConfig(rank=3, alpha=12.0, targets=["wq", "wv", "w_down"])
SMALL = MODEL.model_copy(update={"n_layers": 2})
STEPS = 2
# (stage, precision, what is in host memory, what is recomputed)
CASES = [
    *((stage, "fp32", "none", "none") for stage in (0, 1, 2, 3)),
    *((stage, "bf16", "none", "full") for stage in (0, 1, 2, 3)),
    (3, "fp32", "none", "selective"),
    (2, "bf16", "optimizer", "none"),
    (3, "bf16", "both", "none"),
]
SAVED = (3, "bf16", "none", "full")


def adapted(cfg: ModelConfig) -> Transformer:
    return add_adapters(Transformer(cfg), LORA, ())


def engine_of(mesh, stage, precision, offload, recompute):
    cfg = config_of(stage, precision, offload).model_copy(update={"activation_checkpointing": recompute})
    return build(mesh, cfg, SMALL, build_model=adapted)


def train_all(mesh):
    """(losses, state before, state after) of every case; ZeRO 3 last, it replaces F.linear."""
    results = {}
    for case in sorted(CASES):
        engine = engine_of(mesh, *case)
        results[case] = whole_state(engine), run_steps(engine, range(STEPS)), whole_state(engine)
        engine.close()
    return results


def plain():
    """One process without DeepSpeed: peft's layers on our model, torch's AdamW and clipping."""
    model = adapted(SMALL)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_values(plain_name(name), p.shape, SMALL, 5).view(p.shape))
    optimizer = build_adamw(model.named_parameters(), OPTIM, checked=False)
    losses = []
    for step in range(STEPS):
        batch = batch_of(One, step, accum=1)
        loss = model(batch.tokens[0], batch.targets[0]) / batch.n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item(), False))
    return losses, {name: p.detach().flatten() for name, p in model.named_parameters()}


class One:
    dp_rank, dp_size = 0, 1


@pytest.mark.slow
def test_adapters_train_as_in_a_plain_process_and_nothing_else_does():
    (plain_losses, weights), trained = plain(), run_ranks(2, train_all)[0]
    for case in CASES:
        before, losses, after = trained[case]
        # 1e-5: sums in another order; 2e-3: bf16 has 8 bits, whose rounding averages out over tokens
        tolerance = 1e-5 if case[1] == "fp32" else 2e-3
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain_losses), rtol=tolerance, atol=tolerance)
        assert {name for name, kind in after if kind != "weight"} == {name for name in weights if is_adapter(name)}
        for name, weight in weights.items():
            here = after[name, "weight"]
            if is_adapter(name):
                assert not torch.equal(here, before[name, "weight"]), f"{case}: {name} was not trained"
                if case[1] == "fp32":
                    torch.testing.assert_close(here, weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            else:  # to the last bit, in the format that computes
                assert torch.equal(here, weight.to(torch.bfloat16).float() if case[1] == "bf16" else weight), name


def save_and_go_on(mesh, folder):
    """(losses, state) of ZeRO 3 that goes on, and what each stage makes of its checkpoint; see go_on."""
    engine = engine_of(mesh, *SAVED)
    run_steps(engine, range(STEPS))
    state = whole_state(engine)
    save(folder, engine, STEPS)
    losses = run_steps(engine, range(STEPS, 2 * STEPS))
    after = whole_state(engine)
    engine.close()
    return state, losses, after, {stage: go_on(mesh, folder, stage) for stage in (0, 2, 3)}


def go_on(mesh, folder, stage):
    reader = CheckpointReader(folder / folder_name(STEPS))
    engine = engine_of(mesh, stage, *SAVED[1:])
    engine.load_state(reader, reader.manifest.adam_steps)
    loaded = whole_state(engine)
    losses, after = run_steps(engine, range(STEPS, 2 * STEPS)), whole_state(engine)
    engine.close()
    return loaded, losses, after


@pytest.mark.slow
@pytest.mark.long
def test_a_checkpoint_holds_frozen_weights_as_they_compute_and_is_read_at_any_topology(tmp_path):
    state, losses, after, resumed = run_ranks(2, save_and_go_on, tmp_path)[0]
    reader = CheckpointReader(tmp_path / folder_name(STEPS))
    counts = {name: torch.Size(shape).numel() for name, shape in reader.manifest.shapes.items()}
    payload = sum(n * (12 if is_adapter(name) else 2) for name, n in counts.items())
    assert payload < sum(entry["bytes"] for entry in reader.manifest.files.values()) < payload + 40_000  # headers
    frozen = next(name for name in counts if not is_adapter(name))
    assert [reader.has(frozen, kind) for kind in KINDS] == [True, False, False]
    resumed["one more rank"] = run_ranks(3, go_on, tmp_path, 1)[0]
    for loaded, again, _ in resumed.values():
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        torch.testing.assert_close(torch.tensor(again)[:, 0], torch.tensor(losses)[:, 0], rtol=2e-3, atol=0)
    _, again, final = resumed[3]
    assert again == losses
    assert all(torch.equal(final[key], after[key]) for key in after)


# -- other models -----------------------------------------------------------------------------------------------------------


def tagger(cfg):
    """A BERT that gives each token one of five labels: adapters, and a head that is trained in full."""
    model = HfClassifier(cfg, 5, per_token=True)
    heads = tuple(name for name, _ in model.named_parameters() if model.is_head(name))
    return add_adapters(model, LoraConfig(rank=3, alpha=12.0), heads)


def pair_model(cfg):
    return add_adapters(Preference(cfg, 0.5), LORA, ())


OTHERS = {"tagger": (BERT, tagger), "pairs": (SMALL, pair_model)}


def batch_for(kind, mesh, step, accum=ACCUM):
    batch = batch_of(mesh, step, accum)
    if kind == "tagger":
        targets = torch.where(batch.targets >= 0, batch.targets % 5, batch.targets)
        return replace(batch, targets=targets, documents=documents_of(batch))
    halves = (torch.arange(SMALL.seq_len) >= SMALL.seq_len // 2).int().expand_as(batch.tokens).contiguous()
    reference = torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(step))[torch.from_numpy(batch.samples)]
    return replace(batch, documents=halves, reference=reference, n_targets=BATCH)


def train_others(mesh):
    """kind -> (losses and gradient norms, state)"""
    results = {}
    for kind, (cfg, build_model) in OTHERS.items():
        engine = build(mesh, config_of(2, "fp32", "none"), cfg, build_model=build_model)
        losses = []
        for step in range(STEPS):
            batch = batch_for(kind, mesh, step)
            stats = train_step(engine, batch, batch.n_targets, OPTIM.lr)
            losses.append((stats.loss, stats.update.grad_norm))
        results[kind] = losses, whole_state(engine)
        engine.close()
    return results


def plain_other(kind):
    cfg, build_model = OTHERS[kind]
    model, losses = build_model(cfg), []
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_values(plain_name(name), p.shape, cfg, 5).view(p.shape))
    optimizer = build_adamw(model.named_parameters(), OPTIM, checked=False)
    for step in range(STEPS):
        batch = batch_for(kind, One, step, accum=1)
        every = (batch.tokens, batch.targets, batch.documents, batch.reference)
        loss = model(*(part[0] for part in every if part is not None)) / batch.n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return losses, model


@pytest.mark.slow
def test_a_bert_with_a_head_and_pairs_of_answers_train_as_in_a_plain_process():
    trained = run_ranks(2, train_others)[0]
    for kind in OTHERS:
        (losses, state), (plain_losses, model) = trained[kind], plain_other(kind)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain_losses), rtol=1e-5, atol=1e-5)
        parameters = dict(model.named_parameters())
        for name, p in parameters.items():
            expected = p.detach().flatten()
            torch.testing.assert_close(state[name, "weight"], expected, rtol=1e-5, atol=1e-5, msg=f"{kind}: {name}")
        updated = {name for name, of in state if of != "weight"}
        assert updated == {name for name, p in parameters.items() if p.requires_grad}
        assert any(map(is_adapter, updated))
        assert any(not is_adapter(name) for name in updated) == (kind == "tagger")
