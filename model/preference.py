"""The decoder that learns which of two answers is preferred (DPO: Rafailov et al. 2023, arXiv:2305.18290)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.loss import IGNORE_INDEX, chunk_tokens_for
from model.transformer import Head, Transformer

# B rows, each a pair: document 0 is the chosen answer after its prompt, document 1 the rejected one. T, D, V as elsewhere.


class PairHead(Head):
    """From hidden states to logits, to the log-probabilities of both answers, or to the loss."""

    def pairs(self, hidden: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        """Sums of the log-probabilities of the targets of each answer, nats: (B, 2), fp32."""
        log_probs = hidden.new_zeros(targets.shape, dtype=torch.float32)
        counted = targets != IGNORE_INDEX
        at, chosen = hidden[counted], targets[counted]  # (n, D), (n,)
        step = chunk_tokens_for(self.weight.shape[0], hidden.device)
        parts = [
            checkpoint(_log_probs, at[i : i + step], self.weight, chosen[i : i + step], use_reentrant=False)
            for i in range(0, len(chosen), step)
        ]  # computed again in the backward pass, so that no logits are kept
        if parts:
            log_probs = log_probs.masked_scatter(counted, torch.cat(parts))
        return torch.stack([(log_probs * (documents == d)).sum(-1) for d in (0, 1)], dim=-1)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
        reference: Tensor | None = None, beta: float = 0.0,
    ) -> Tensor:  # fmt: skip
        if targets is None:
            return super().forward(hidden)
        assert documents is not None
        pairs = self.pairs(hidden, targets, documents)
        if reference is None:
            return pairs
        return -F.logsigmoid(beta * margins(pairs, reference)).sum()


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # (n, D) -> (n, V)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, targets.unsqueeze(1)).squeeze(1)


def margins(pairs: Tensor, reference: Tensor) -> Tensor:
    """How much more than the reference the model prefers the chosen answer, nats: (B, 2), (B, 2) -> (B,)."""
    more = pairs - reference
    return more[:, 0] - more[:, 1]


class Preference(Transformer):
    """A Transformer that is trained on pairs; its parameters are named alike."""

    head_type = PairHead

    def __init__(self, cfg: ModelConfig, beta: float) -> None:
        super().__init__(cfg)
        self.beta = beta

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens, targets, documents: (B, T), as Transformer.forward takes them; targets count in answers alone.

        reference: (B, 2) fp32, of the model that the training began with. Returns the summed loss
        -log sigmoid(beta * margin), an fp32 scalar; without it the log-probabilities (B, 2), without targets logits.
        """
        return self.head(self.hidden(tokens, documents), targets, documents, reference, self.beta)
