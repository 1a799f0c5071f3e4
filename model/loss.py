"""Cross-entropy of a linear head that never holds the logits of all tokens.

With a vocabulary of 128k, the fp32 logits of 8192 tokens are 4 GiB and their gradient as much again, usually more than
the rest of the step needs. Here a chunk of tokens at a time is taken through the head, and its gradients are computed
at once while its probabilities are at hand, so nothing of size tokens x vocabulary is kept or computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# N tokens, D d_model, V vocab, C tokens of one chunk

# A further loss of the same logits: (tokens of the chunk, their logits (C, V), which are ignored (C, 1)) -> (its sum, its
# gradient with respect to the first n logits (C, n)), both in fp32. Rows that are ignored may have any gradient.
Beside = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]

IGNORE_INDEX = -100  # a target that is not counted: torch's and transformers' convention

# Tokens of a chunk: as many as give this many bytes of fp32 logits, but at least so many. Large chunks cost memory,
# small ones time, because every chunk adds into all V x D of the weight's gradient.
# CPU: 256 tokens of an 8192 vocabulary keep the chunk in the caches. Measured on one core, bf16, V 8192, D 384, N 4096,
# forward and backward: 0.48 s, against 0.64 s with 2048 tokens and 0.74 s for F.cross_entropy(F.linear(...).float()).
# Accelerators: estimated, not measured. Adding up moves 12 bytes for every 6 x tokens floating point operations, which
# at 300 operations a byte (H100) is under a third of the head's time from 2048 tokens on.
CPU_CHUNK_BYTES, CPU_CHUNK_MIN_TOKENS = 8 * 2**20, 256
ACCELERATOR_CHUNK_BYTES, ACCELERATOR_CHUNK_MIN_TOKENS = 256 * 2**20, 2048


def chunk_tokens_for(vocab_size: int, device: torch.device) -> int:
    """Tokens that go through the head at a time."""
    if device.type == "cpu":
        return max(CPU_CHUNK_MIN_TOKENS, CPU_CHUNK_BYTES // (4 * vocab_size))
    return max(ACCELERATOR_CHUNK_MIN_TOKENS, ACCELERATOR_CHUNK_BYTES // (4 * vocab_size))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    bias: Tensor | None = None,
    share: float = 1.0,
    beside: Beside | None = None,
) -> Tensor:
    """Sum of the cross-entropies, in nats, of softmax(hidden @ weight.T + bias) against `targets`.

    hidden: (..., D), any float type.   weight: (V, D), the same type.   targets: (...) int64, IGNORE_INDEX not counted.
    bias: (V,), the same type; None: no bias.
    chunk_tokens: tokens at a time; None picks by vocabulary and device. It changes memory and rounding only.
    share, beside: what the cross-entropies are multiplied by, and a loss that is added then.
    Returns a scalar, fp32 (fp64 for fp64 inputs); 0 when every target is ignored. Logits are computed in the inputs'
    type (under autocast: in its type), softmax and sums in fp32. It can be differentiated once.
    """
    assert targets.shape == hidden.shape[:-1], f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}"
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        chunk_tokens or chunk_tokens_for(weight.shape[0], hidden.device),
        torch.is_grad_enabled(),  # inside a Function's forward it is always off
        share,
        beside,
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        grad_enabled: bool,
        share: float,
        beside: Beside | None,
    ) -> Tensor:
        hidden_needs_grad, weight_needs_grad, bias_needs_grad = (grad_enabled and n for n in ctx.needs_input_grad[:3])
        n_tokens = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ignored = (targets == IGNORE_INDEX).unsqueeze(1)  # (N, 1)
        picks = targets.unsqueeze(1).masked_fill(ignored, 0)  # (N, 1), safe to look up
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = hidden.new_empty(hidden.shape) if hidden_needs_grad else None
        grad_weight = None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if bias_needs_grad else None

        for start in range(0, n_tokens, chunk_tokens):
            here = slice(start, min(start + chunk_tokens, n_tokens))
            logits = hidden[here] @ weight.T if bias is None else torch.addmm(bias, hidden[here], weight.T)
            log_probs = torch.log_softmax(logits, dim=-1, dtype=wide)  # (C, V)
            more = None if beside is None else beside(here, logits, ignored[here])
            del logits
            picked = log_probs.gather(1, picks[here])  # (C, 1)
            loss -= picked.masked_fill(ignored[here], 0).sum() * share
            if more is not None:
                loss += more[0]
            if not (hidden_needs_grad or weight_needs_grad or bias_needs_grad):
                continue
            # The gradient with respect to the logits is softmax - one_hot.
            grad_logits = log_probs.exp_().scatter_(1, picks[here], picked.expm1())  # (C, V)
            if more is not None:
                grad_logits.mul_(share)[:, : more[1].shape[1]] += more[1]
            grad_logits = grad_logits.to(weight.dtype)
            del log_probs, more
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[here])
            if grad_bias is not None:
                grad_bias += grad_logits.masked_fill(ignored[here], 0).sum(dim=0, dtype=wide)
            if weight_needs_grad:
                # Ignored rows are dropped on the narrow side: D is smaller than V.
                part = grad_logits.T @ hidden[here].masked_fill(ignored[here], 0)  # (V, D)
                if chunk_tokens >= n_tokens:
                    grad_weight = part
                elif grad_weight is None:
                    grad_weight = part.to(wide)
                else:
                    grad_weight += part

        if grad_hidden is not None:
            grad_hidden.masked_fill_(ignored, 0)
        if weight_needs_grad and grad_weight is None:  # no tokens at all
            grad_weight = torch.zeros_like(weight)
        # Kept as attributes and not by save_for_backward, which is for inputs and outputs.
        ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias, ctx.dtype = grad_hidden, grad_weight, grad_bias, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden * grad_loss
        # The sum over chunks is still wide here: scaled first, then rounded once.
        grad_weight = None
        if ctx.grad_weight is not None:
            grad_weight = torch.empty_like(ctx.grad_weight, dtype=ctx.dtype)
            torch.mul(ctx.grad_weight, grad_loss, out=grad_weight)
        grad_bias = None if ctx.grad_bias is None else (ctx.grad_bias * grad_loss).to(ctx.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 5
