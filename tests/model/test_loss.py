"""The chunked loss against F.cross_entropy, and that it never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.loss import IGNORE_INDEX, chunk_tokens_for, linear_cross_entropy


def problem(n_tokens, d_model, vocab_size, ignored=0.0, dtype=torch.float32, seed=0):
    """hidden (N, D), weight (V, D), targets (N,): logits with a spread of about 3 nats."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, d_model, generator=g).to(dtype)
    weight = (torch.randn(vocab_size, d_model, generator=g) * 3 / d_model**0.5).to(dtype)
    targets = torch.randint(0, vocab_size, (n_tokens,), generator=g)
    targets[torch.rand(n_tokens, generator=g) < ignored] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden, weight, targets):
    """Loss and both gradients by torch, in fp64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor made, in elements."""

    def __init__(self):
        super().__init__()
        self.products, self.largest, self.largest_fp32 = 0, 0, 0
        self.product_dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::matmul"):
            self.products += 1
            self.product_dtypes.add(out.dtype)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.largest_fp32 = max(self.largest_fp32, tensor.numel())
        return out


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize(("n_tokens", "chunk_tokens"), [(64, 16), (67, 16), (5, 16), (16, 16), (1, 1), (67, None)])
def test_fp32_equals_torch(n_tokens, chunk_tokens, ignored):
    hidden, weight, targets = problem(n_tokens, 24, 101, ignored)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    loss.backward()
    expected, expected_hidden, expected_weight = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    # fp32 keeps 1.2e-7; sums of some hundred terms lose a digit of it.
    assert relative_error(loss.detach(), expected) < 2e-6
    assert relative_error(hidden.grad, expected_hidden) < 2e-6
    assert relative_error(weight.grad, expected_weight) < 2e-6


def test_batched_hidden_keeps_its_shape():
    hidden, weight, targets = problem(24, 8, 11, ignored=0.2)
    batched = hidden.detach().view(2, 12, 8).requires_grad_()
    linear_cross_entropy(batched, weight, targets.view(2, 12), 5).backward()
    _, expected, _ = reference(hidden, weight, targets)
    assert batched.grad.shape == (2, 12, 8)
    assert relative_error(batched.grad.view(24, 8), expected) < 2e-6


def test_hidden_need_not_be_contiguous():
    hidden, weight, targets = problem(24, 8, 11)
    across = hidden.detach().view(2, 12, 8).transpose(0, 1).requires_grad_()  # (12, 2, 8)
    linear_cross_entropy(across, weight, targets.view(2, 12).T, 5).backward()
    _, expected, expected_weight = reference(hidden, weight, targets)
    assert relative_error(across.grad.transpose(0, 1).reshape(24, 8), expected) < 2e-6
    assert relative_error(weight.grad, expected_weight) < 2e-6


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_gradcheck_fp64(chunk_tokens):
    hidden, weight, targets = problem(7, 4, 9, ignored=0.3, dtype=torch.float64)
    assert (targets == IGNORE_INDEX).any()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens), (hidden, weight))


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2000.0
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_all_ignored(chunk_tokens):
    hidden, weight, targets = problem(10, 8, 11, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_tokens():
    hidden, weight, targets = problem(0, 8, 11)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


def test_bf16_is_as_close_as_its_digits():
    hidden, weight, targets = problem(96, 32, 211, ignored=0.1, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, 20)
    loss.backward()
    expected, expected_hidden, expected_weight = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # bf16 keeps 4e-3; logits, their gradient and the result are each rounded to it. The loss averages the roundings.
    assert relative_error(loss.detach(), expected) < 1e-3
    assert relative_error(hidden.grad, expected_hidden) < 1.2e-2
    assert relative_error(weight.grad, expected_weight) < 1.2e-2


def test_weight_gradient_is_summed_wide_over_chunks():
    # Every token adds the same amount to the weight's gradient. In bf16 such a sum stops at 256 times the amount.
    n_tokens = 2048
    hidden = torch.ones(n_tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(n_tokens, dtype=torch.int64), 2).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-n_tokens / 2], [n_tokens / 2]], dtype=torch.bfloat16))


def test_backward_scales_by_what_comes_in_and_can_run_again():
    hidden, weight, targets = problem(20, 8, 11)
    loss = linear_cross_entropy(hidden, weight, targets, 6) / 20
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    _, *expected = reference(hidden, weight, targets)
    for a, b, full in zip(first, second, expected, strict=True):
        assert relative_error(a, full / 20) < 2e-6
        assert torch.equal(a, b)


@pytest.mark.parametrize(("hidden_grad", "weight_grad", "per_chunk"), [(1, 1, 3), (1, 0, 2), (0, 1, 2), (0, 0, 1)])
def test_only_needed_gradients_are_computed(hidden_grad, weight_grad, per_chunk):
    hidden, weight, targets = problem(20, 8, 11)
    hidden.requires_grad_(bool(hidden_grad))
    weight.requires_grad_(bool(weight_grad))
    with Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, targets, 5)
    assert watch.products == 4 * per_chunk
    _, expected_hidden, expected_weight = reference(hidden, weight, targets)
    if loss.requires_grad:
        loss.backward()
    for tensor, needed, expected in ((hidden, hidden_grad, expected_hidden), (weight, weight_grad, expected_weight)):
        assert (tensor.grad is not None) == bool(needed)
        if needed:
            assert relative_error(tensor.grad, expected) < 2e-6


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_when_gradients_are_off(off):
    hidden, weight, targets = problem(20, 8, 11)
    with off(), Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, targets, 5)
    assert watch.products == 4
    assert not loss.requires_grad
    assert relative_error(loss, reference(hidden, weight, targets)[0]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_exists(dtype):
    n_tokens, d_model, vocab_size, chunk_tokens = 512, 16, 300, 64
    hidden, weight, targets = problem(n_tokens, d_model, vocab_size, dtype=dtype)
    with Watch() as torchs:
        F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum").backward()
    assert torchs.largest_fp32 == n_tokens * vocab_size  # the watch sees what it should
    with Watch() as ours:
        linear_cross_entropy(hidden, weight, targets, chunk_tokens).backward()
    assert ours.largest == chunk_tokens * vocab_size


def test_autocast_computes_in_its_dtype():
    hidden, weight, targets = problem(96, 32, 211)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, targets, 32)
    loss.backward()
    expected, expected_hidden, expected_weight = reference(hidden, weight, targets)
    assert watch.products == 9
    assert watch.product_dtypes == {torch.bfloat16}
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert 1e-6 < relative_error(weight.grad, expected_weight) < 1.5e-2  # bf16 it was, and no worse
    assert relative_error(hidden.grad, expected_hidden) < 1.5e-2
    assert relative_error(loss.detach(), expected) < 1e-3


def test_second_derivative_is_refused_not_wrong():
    hidden, weight, targets = problem(6, 4, 5)
    loss = linear_cross_entropy(hidden, weight, targets).square()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_target_outside_the_vocabulary_is_refused():
    hidden, weight, _ = problem(2, 4, 5)
    for wrong in (5, -1):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, torch.tensor([0, wrong]))


def test_chunks_follow_the_vocabulary_and_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_tokens_for(8192, cpu) == 256
    assert chunk_tokens_for(512, cpu) == 4096  # 8 MiB
    assert chunk_tokens_for(128_256, cpu) == 256
    assert chunk_tokens_for(8192, cuda) == 8192  # 256 MiB
    assert chunk_tokens_for(128_256, cuda) == 2048
