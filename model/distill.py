"""The decoder that learns from a larger one beside its text: distillation (Hinton et al. 2015, arXiv:1503.02531).

The loss of a target is (1 - share) times its cross-entropy, plus share times temperature^2 times the divergence of the
student from its teacher, KL(teacher || student), of both distributions over all tokens at this temperature.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import linear_cross_entropy
from model.transformer import Head, Transformer

# B batch, T sequence, D d_model, E d_model of the teacher, V vocab, C tokens of one chunk, n ids of the tokenizer


@dataclass(frozen=True)
class Teacher:
    """A trained decoder, and how much it counts. It is no part of the student: nothing of it is trained or saved."""

    model: Transformer  # in eval mode, its parameters without gradients
    n_ids: int  # of the tokenizer of both; rows of a head beyond them are padding, and not compared
    share: float
    temperature: float
    kl: deque[Tensor] = field(default_factory=lambda: deque(maxlen=1))  # sums over targets, nats, of the last losses


def linear_distillation(
    hidden: Tensor, weight: Tensor, targets: Tensor, theirs: Tensor, teacher: Teacher, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """(summed loss, that can be differentiated; summed KL(teacher || student) in nats), fp32 scalars.

    hidden (..., D), weight (V, D), targets (...), chunk_tokens: as linear_cross_entropy takes them.    theirs: (..., E),
    what the teacher's head takes. Neither model's logits are ever held for more than a chunk.
    """
    rows, head = theirs.reshape(-1, theirs.shape[-1]), teacher.model.head.weight[: teacher.n_ids]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kl = hidden.new_zeros((), dtype=wide)

    def beside(here: slice, logits: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
        ours, target = (
            torch.log_softmax(each.to(wide, copy=True).div_(teacher.temperature), dim=-1)
            for each in (logits[:, : teacher.n_ids], F.linear(rows[here], head))
        )  # (C, n) each
        probs = target.exp()
        of_chunk = target.sub_(ours).mul_(probs).masked_fill_(ignored, 0).sum()
        kl.add_(of_chunk)
        # The gradient with respect to logits / temperature is softmax - probs, and the loss has temperature^2.
        grad_logits = ours.exp_().sub_(probs).mul_(teacher.share * teacher.temperature)
        return of_chunk * (teacher.share * teacher.temperature**2), grad_logits

    return linear_cross_entropy(hidden, weight, targets, chunk_tokens, share=1 - teacher.share, beside=beside), kl


class StudentHead(Head):
    """From hidden states to logits, to the loss of the text alone, or with what the teacher's head takes to that of both."""

    teacher: Teacher | None = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, theirs: Tensor | None = None) -> Tensor:
        if targets is None or theirs is None:
            return super().forward(hidden, targets)
        assert self.teacher is not None
        loss, kl = linear_distillation(hidden, self.weight, targets, theirs, self.teacher)
        self.teacher.kl.append(kl)
        return loss


class Student(Transformer):
    """A Transformer with a teacher while it trains; its parameters are named alike. Else its loss is the text's alone."""

    head_type = StudentHead
    head: StudentHead

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """As Transformer.forward; in training mode the loss needs head.teacher, which reads the same rows."""
        if targets is None or not self.training:
            return super().forward(tokens, targets, documents)
        assert self.head.teacher is not None
        with torch.no_grad():
            theirs = self.head.teacher.model.hidden(tokens, documents)  # (B, T) -> (B, T, E)
        return self.head(self.hidden(tokens, documents), targets, theirs)
