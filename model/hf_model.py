"""A language model as transformers builds it, with the forward contract of model/transformer.py's Transformer.

Its parameters have transformers' own names, so that an export of its state is the state itself. As there, constructing it
leaves parameters unset.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import positions_in_documents
from model.hf_config import HfModelConfig, build_unset
from model.init import fill
from model.loss import IGNORE_INDEX, linear_cross_entropy
from model.transformer import check_documents, check_length

# B batch, T sequence, D d_model, V vocab, C counted tokens


class LossHead(nn.Linear):
    """The linear layer from hidden states to logits, which gives the loss instead while it has targets.

    Nothing else touches its weight, which ZeRO 3 gathers for this call.
    """

    targets: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, D). Returns logits (B, T, V), or with targets (B, T) the summed loss of those that count."""
        if self.targets is None:
            return F.linear(hidden, self.weight, self.bias)
        counted = self.targets != IGNORE_INDEX  # a seventh of them, where tokens were hidden
        return linear_cross_entropy(hidden[counted], self.weight, self.targets[counted], bias=self.bias)  # (C, D), (C,)


class HfModel(nn.Module):
    """The masked or causal language model that `cfg` describes."""

    theirs: Any  # transformers' model

    def __init__(self, cfg: HfModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.__dict__["theirs"] = build_unset(cfg)  # no child, as its name would stand before those of all parameters
        for name, child in self.theirs.named_children():
            self.add_module(name, child)
        self.head.__class__ = LossHead
        self.head.targets = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens: (B, T) int64 with T <= cfg.seq_len; targets: (B, T) int64, -100 where a token does not count: of a masked
        model the token that was hidden at this place, of a causal one the next token.

        documents: (B, T) int, as Transformer.forward takes them; padding behind a text is a document of its own, so that
        nothing attends to it. Returns logits (B, T, V); with targets, the sum of the cross-entropies in nats, fp32.
        Raises ValueError as Transformer.forward does.
        """
        check_length(tokens.shape[1], self.cfg.seq_len)
        places: dict[str, Tensor] = {}
        if documents is not None:
            check_documents(documents, tokens)
            places["position_ids"] = positions_in_documents(documents)
            places["attention_mask"] = self._mask(documents)
        self.head.targets = targets
        try:
            out: Tensor = self.theirs(input_ids=tokens, **places).logits
        finally:
            self.head.targets = None
        return out

    def _mask(self, documents: Tensor) -> Tensor:
        """What a position may attend to: (B, 1, T, T), True where it may."""
        same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, T, T)
        return (same if self.cfg.objective == "masked" else same.tril_()).unsqueeze(1)

    @property
    def head(self) -> LossHead:
        return self.theirs.get_output_embeddings()

    @property
    def embed(self) -> nn.Embedding:
        """Of tokens."""
        return self.theirs.get_input_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, which activation checkpointing wraps."""
        return next(found for found in self._lists() if len(found) == self.cfg.n_layers)

    def _lists(self) -> Iterator[nn.ModuleList]:
        return (module for module in self.modules() if isinstance(module, nn.ModuleList))

    def init_weights(self, seed: int) -> "HfModel":
        """As Transformer.init_weights."""
        fill(self, self.cfg, seed)
        return self

    def train(self, mode: bool = True) -> "HfModel":
        self.theirs.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HfModel":
        # to_empty() and moves between device types make a new Parameter for each name that holds one: tie them again.
        tied = self.head.weight is self.embed.weight
        super()._apply(fn, recurse)
        if tied and self.head.weight is not self.embed.weight:
            self.theirs.tie_weights()
        return self
