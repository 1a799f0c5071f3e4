"""The loss of a student and its gradients against transformers' models and the formula, with all logits at hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_loss import Watch
from transformers import LlamaForCausalLM

from model import loss as loss_module
from model.config import ModelConfig
from model.distill import Student, Teacher, linear_distillation
from model.hf import to_hf_config, to_hf_state
from model.loss import linear_cross_entropy
from model.transformer import Transformer

N_IDS = 97  # the tokenizer's; the two models have other numbers of rows for padding
SMALL = ModelConfig(vocab_size=104, seq_len=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)
LARGE = SMALL.model_copy(update={"vocab_size": 128, "d_model": 48, "n_layers": 3, "d_ff": 96, "dropout": 0.5})


def teacher_of(cfg=LARGE, share=0.3, temperature=2.0):
    return Teacher(Transformer(cfg).init_weights(7).eval().requires_grad_(False), N_IDS, share, temperature)


def student_of(teacher, cfg=SMALL):
    student = Student(cfg).init_weights(1)
    student.head.teacher = teacher
    return student


def rows(seed=0):
    """Two rows of two documents each, of which some targets do not count: tokens, targets, documents (2, 20)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, N_IDS, (2, 21), generator=g)
    documents = (torch.arange(20) >= torch.tensor([[7], [12]])).int()
    targets = torch.where(torch.rand(2, 20, generator=g) < 0.2, -100, ids[:, 1:])
    return ids[:, :-1].contiguous(), targets, documents


def their_logits(cfg, ours):
    """transformers' model of the same weights, and its logits for each document by itself, (targets that count, V)."""
    cfg = cfg.model_copy(update={"dropout": 0.0})
    theirs = LlamaForCausalLM(to_hf_config(cfg)).eval()
    theirs.load_state_dict(to_hf_state(cfg, dict(ours.named_parameters())), strict=not cfg.tie_embeddings)
    tokens, targets, documents = rows()
    found = []
    for row, row_targets, row_documents in zip(tokens, targets, documents, strict=True):
        for document in (0, 1):
            here = row_documents == document
            logits = theirs(row[here].unsqueeze(0)).logits[0]
            found.append(logits[row_targets[here] != -100])
    return theirs, torch.cat(found)


@pytest.mark.parametrize(
    ("share", "temperature", "tied", "chunk"),
    [(0.3, 2.0, False, 3), (0.3, 2.0, True, 1000), (1.0, 1.0, False, 7), (0.5, 0.5, True, 7)],
)
def test_loss_and_gradients_are_those_of_the_formula(share, temperature, tied, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_tokens_for", lambda vocab_size, device: chunk)
    cfg = SMALL.model_copy(update={"tie_embeddings": tied})
    teacher = teacher_of(share=share, temperature=temperature)
    student = student_of(teacher, cfg)
    theirs, logits = their_logits(cfg, student)
    with torch.no_grad():
        _, soft = their_logits(LARGE, teacher.model)
    tokens, targets, documents = rows()
    ours, wanted = (F.log_softmax(each[:, :N_IDS] / temperature, dim=-1) for each in (logits, soft))
    kl = F.kl_div(ours, wanted, reduction="sum", log_target=True)
    text = F.cross_entropy(logits, targets[targets != -100], reduction="sum")
    expected = (1 - share) * text + share * temperature**2 * kl
    expected.backward()

    loss = student(tokens, targets, documents)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.kl[-1], kl.detach(), rtol=1e-5, atol=1e-5)
    gradients = to_hf_state(cfg, {name: p.grad for name, p in student.named_parameters()})
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_teacher_without_a_share_changes_no_bit():
    batch = rows()
    student, plain = student_of(teacher_of(share=0.0)), Transformer(SMALL).init_weights(1)
    losses = student(*batch), plain(*batch)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for ours, expected in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_the_teacher_is_no_part_of_the_student_and_stays_as_it_is():
    teacher = teacher_of()
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    student, plain = student_of(teacher), Transformer(SMALL).init_weights(1)
    assert student.state_dict().keys() == plain.state_dict().keys()
    tokens, targets, documents = rows()
    state = torch.get_rng_state()
    student.train()(tokens, targets, documents).backward()
    assert torch.equal(torch.get_rng_state(), state)  # its dropout of 0.5 draws nothing
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in teacher.model.named_parameters())
    with torch.no_grad():  # what is held out is scored, and text continued, without it
        student.eval().head.teacher = None
        assert torch.equal(student(tokens, targets, documents), plain.eval()(tokens, targets, documents))
        assert torch.equal(student(tokens), plain(tokens))


def test_a_student_that_is_its_teacher_learns_nothing_from_it():
    teacher = teacher_of(SMALL, share=1.0, temperature=3.0)
    student = Student(SMALL).init_weights(7)
    student.head.teacher = teacher
    loss = student(*rows())
    loss.backward()
    assert abs(loss.item()) < 1e-4  # a sum of 30 terms
    assert all(p.grad.abs().max() < 1e-4 for p in student.parameters())


def problem(n_tokens, dtype):
    """hidden (N, D), weight (V, D), targets (N,), the teacher's hidden (N, E), and the teacher."""
    g = torch.Generator().manual_seed(3)
    teacher = teacher_of()
    teacher.model.to(dtype)
    hidden, theirs = (torch.randn(n_tokens, d, generator=g, dtype=torch.float64).to(dtype) for d in (16, 48))
    weight = (torch.randn(300, 16, generator=g, dtype=torch.float64) / 2).to(dtype)
    targets = torch.where(
        torch.rand(n_tokens, generator=g) < 0.3, -100, torch.randint(0, N_IDS, (n_tokens,), generator=g)
    )
    return hidden.requires_grad_(), weight.requires_grad_(), targets, theirs, teacher


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_gradcheck_fp64(chunk_tokens):
    hidden, weight, targets, theirs, teacher = problem(5, torch.float64)
    teacher, weight = replace(teacher, n_ids=7), weight.detach()[:9].clone().requires_grad_()
    targets = torch.where(targets > 0, targets % 7, targets)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_distillation(h, w, targets, theirs, teacher, chunk_tokens)[0], (hidden, weight)
    )


def test_bf16_is_as_close_as_its_digits_and_no_tensor_of_all_logits_exists():
    hidden, weight, targets, theirs, teacher = problem(512, torch.bfloat16)
    with Watch() as watch:
        loss, kl = linear_distillation(hidden, weight, targets, theirs, teacher, 128)
        loss.backward()
    assert watch.largest == 128 * 300
    assert (loss.dtype, kl.dtype, weight.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    teacher.model.double()
    expected, expected_kl = linear_distillation(*wide, targets, theirs.double(), teacher)
    expected.backward()
    # bf16 keeps 4e-3; logits, their gradient and the result are each rounded to it. The loss averages the roundings.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-3, atol=0)
    for ours, exact in zip((hidden, weight), wide, strict=True):
        assert (ours.grad.double() - exact.grad).abs().max() < 1.2e-2 * exact.grad.abs().max()


def test_another_loss_beside_is_computed_without_gradients_too():
    hidden, weight, targets, theirs, teacher = problem(20, torch.float32)
    loss, _ = linear_distillation(hidden, weight, targets, theirs, teacher, 6)
    with torch.no_grad(), Watch() as watch:
        quiet, _ = linear_distillation(hidden, weight, targets, theirs, teacher, 6)
    assert watch.products == 2 * 4  # both heads' logits, chunk by chunk
    assert torch.equal(loss, quiet)
    assert not torch.equal(loss, linear_cross_entropy(hidden, weight, targets, 6))
