"""A student of a teacher, whatever the stage, the ranks and what is recomputed: as in a plain process."""

from collections import deque

import pytest
import torch

from launcher.teacher import parts_of_loss, teach
from model.distill import Student, Teacher
from model.init import initial_values
from model.transformer import Transformer
from parallel.optim import build_adamw
from ranks import ACCUM, MODEL, OPTIM, batch_of, build, config_of, run_ranks, run_steps, whole_state

SMALL = MODEL.model_copy(update={"n_layers": 2})
SHARE, TEMPERATURE, STEPS = 0.6, 2.0, 2
# (stage, precision, what is in host memory, what is recomputed)
CASES = [
    (0, "fp32", "none", "none"),
    (1, "bf16", "none", "full"),
    (2, "fp32", "none", "none"),
    (3, "fp32", "none", "selective"),
    (3, "bf16", "both", "none"),
]


def teacher_of(precision, accum):
    model = Transformer(MODEL.model_copy(update={"vocab_size": 1024, "d_model": 144, "init_std": 0.1})).init_weights(9)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return Teacher(model.eval().requires_grad_(False), MODEL.vocab_size, SHARE, TEMPERATURE, deque(maxlen=accum))


def train_all(mesh):
    """(results and parts of the last loss, state) of every case; ZeRO 3 last, it replaces F.linear."""
    found = {}
    for stage, precision, offload, recompute in sorted(CASES):
        cfg = config_of(stage, precision, offload).model_copy(update={"activation_checkpointing": recompute})
        engine, teacher = build(mesh, cfg, SMALL, build_model=Student), teacher_of(precision, ACCUM)
        teach(engine, teacher)
        before = [p.clone() for p in teacher.model.parameters()]
        results = run_steps(engine, range(STEPS))
        parts = parts_of_loss(engine, results[-1][0], batch_of(mesh, STEPS - 1).n_targets)
        assert all(torch.equal(p, was) for p, was in zip(teacher.model.parameters(), before, strict=True))
        found[stage, precision, offload, recompute] = results, parts, whole_state(engine)
        engine.close()
    return found


def plain():
    """One process without DeepSpeed: the same loss, torch's AdamW and clipping."""
    model, teacher = Student(SMALL), teacher_of("fp32", 1)
    model.head.teacher = teacher
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_values(name, p.shape, SMALL, 5).view(p.shape))
    optimizer = build_adamw(model.named_parameters(), OPTIM, checked=False)
    results = []
    for step in range(STEPS):
        batch = batch_of(One, step, accum=1)
        loss = model(batch.tokens[0], batch.targets[0]) / batch.n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item(), False))
    kl = teacher.kl[-1].item() / batch.n_targets
    return results, kl, {name: p.detach().flatten() for name, p in model.named_parameters()}


class One:
    dp_rank, dp_size = 0, 1


@pytest.mark.slow
def test_a_student_trains_as_in_a_plain_process():
    (results, kl, weights), trained = plain(), run_ranks(2, train_all)[0]
    for case in CASES:
        found, parts, state = trained[case]
        # 1e-5: sums in another order; 3e-3: bf16 has 8 bits, whose rounding averages out over tokens
        tolerance = 1e-5 if case[1] == "fp32" else 3e-3
        torch.testing.assert_close(torch.tensor(found), torch.tensor(results), rtol=tolerance, atol=tolerance, msg=str)
        assert parts["distill/kl"] == pytest.approx(kl, rel=tolerance * 10), case
        mixed = SHARE * TEMPERATURE**2 * parts["distill/kl"] + (1 - SHARE) * parts["distill/text"]
        assert mixed == pytest.approx(found[-1][0], rel=1e-9)
        assert parts["distill/text"] == pytest.approx(torch.tensor(997.0).log().item(), rel=0.1)
        assert {name for name, _ in state} == set(weights)  # nothing of the teacher is in it
        if case[1] == "fp32":
            for name, weight in weights.items():
                torch.testing.assert_close(state[name, "weight"], weight, rtol=1e-4, atol=1e-5)
