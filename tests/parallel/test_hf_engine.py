"""Models of family hf on real ranks: every ZeRO stage and kind of recomputation against one plain process."""

from dataclasses import replace

import pytest
import torch

from launcher.pretrain import train_step
from model.hf_config import HfModelConfig
from model.hf_model import HfModel
from model.init import initial_values
from parallel.checkpoint import ZeroMoments
from parallel.config import ParallelConfig
from parallel.deepspeed_config import deepspeed_config
from parallel.engine import parallelize
from parallel.optim import build_adamw
from ranks import ACCUM, BATCH, OPTIM, batch_of, run_ranks, whole_state

# Dropout off, as a plain process draws other numbers; over and under ZeRO 3's threshold for keeping parameters whole.
BERT = HfModelConfig(
    family="hf",
    objective="masked",
    vocab_size=997,
    seq_len=16,
    config={"model_type": "bert", "hidden_size": 108, "num_hidden_layers": 3, "num_attention_heads": 6,
            "intermediate_size": 150, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)  # fmt: skip
MODERN = BERT.model_copy(
    update={"config": {"model_type": "modernbert", "hidden_size": 108, "num_hidden_layers": 3, "num_attention_heads": 6,
                       "intermediate_size": 75, "layer_types": ["full_attention", *["sliding_attention"] * 2],
                       "local_attention": 6}}
)  # fmt: skip
STEPS = 2
MODELS = {"bert": BERT, "modernbert": MODERN}
CASES = [
    *(("bert", *case) for case in [(0, "none"), (1, "selective"), (2, "none"), (3, "none"), (3, "full")]),
    *(("modernbert", *case) for case in [(1, "selective"), (3, "full")]),
]


def documents_of(batch):
    samples = torch.from_numpy(batch.samples).unsqueeze(-1)
    return (torch.arange(batch.tokens.shape[-1]) + samples) // (2 + samples % 5)


def steps_of(engine):
    losses = []
    for step in range(STEPS):
        batch = batch_of(engine.mesh, step)
        stats = train_step(engine, replace(batch, documents=documents_of(batch)), batch.n_targets, OPTIM.lr)
        losses.append((stats.loss, stats.update.grad_norm))
    return losses


def train_all(mesh):
    results = {}
    for kind, stage, recompute in CASES:
        model = MODELS[kind]
        cfg = ParallelConfig(zero_stage=stage, precision="fp32", activation_checkpointing=recompute)
        ds = deepspeed_config(
            cfg, micro_batch_size=BATCH // ACCUM // mesh.dp_size, grad_accum_steps=ACCUM, dp_size=mesh.dp_size,
            grad_clip=OPTIM.grad_clip,
        )  # fmt: skip
        engine = parallelize(lambda model=model: HfModel(model), cfg, OPTIM, ds, mesh)
        shapes = engine.shapes
        read = lambda name, a, b, shapes=shapes, model=model: initial_values(name, shapes[name], model, 5, a, b)  # noqa: E731
        engine.load_state(ZeroMoments(read), adam_steps=0)
        results[kind, stage, recompute] = steps_of(engine), whole_state(engine)
        engine.close()
    return results


class Alone:
    dp_rank, dp_size = 0, 1


@pytest.fixture(scope="module")
def plain():
    return {kind: train_plainly(cfg) for kind, cfg in MODELS.items()}


def train_plainly(cfg):
    model = HfModel(cfg).init_weights(5)
    optimizer = build_adamw(model.named_parameters(), OPTIM, checked=False)
    losses = []
    for step in range(STEPS):
        batch = batch_of(Alone, step, accum=1)
        loss = model(batch.tokens[0], batch.targets[0], documents_of(batch)[0]) / batch.n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return losses, {name: p.detach().flatten() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained():
    return run_ranks(2, train_all)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_stage_and_recomputation_equal_a_plain_process(trained, plain, case):
    """1e-5: as tests/parallel/test_engine.py has it; sums are taken in another order."""
    (losses, state), (plain_losses, weights) = trained[case], plain[case[0]]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain_losses), rtol=1e-5, atol=1e-5)
    assert {name for name, kind in state if kind == "weight"} == set(weights)
    for name, expected in weights.items():
        torch.testing.assert_close(
            state[name, "weight"], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
