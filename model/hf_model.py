"""A language model as transformers builds it, with the forward contract of model/transformer.py's Transformer.

Its parameters have transformers' own names, so that an export of its state is the state itself. As there, constructing it
leaves parameters unset.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

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
        self._adopt(cfg, build_unset(cfg))
        self.token_head.__class__ = LossHead
        self.token_head.targets = None

    def _adopt(self, cfg: HfModelConfig, theirs: nn.Module) -> None:
        self.cfg = cfg
        self.__dict__["theirs"] = theirs  # no child, as its name would stand before those of all parameters
        for name, child in theirs.named_children():
            self.add_module(name, child)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens: (B, T) int64 with T <= cfg.seq_len; targets: (B, T) int64, -100 where a token does not count: of a masked
        model the token that was hidden at this place, of a causal one the next token.

        documents: (B, T) int, as Transformer.forward takes them; padding behind a text is a document of its own, so that
        nothing attends to it. Returns logits (B, T, V); with targets, the sum of the cross-entropies in nats, fp32.
        Raises ValueError as Transformer.forward does.
        """
        self.token_head.targets = targets
        try:
            return self._logits(tokens, documents)
        finally:
            self.token_head.targets = None

    def _logits(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """What transformers' model gives."""
        check_length(tokens.shape[1], self.cfg.seq_len)
        places: dict[str, Any] = {}
        if documents is not None:
            check_documents(documents, tokens)
            places["position_ids"] = positions_in_documents(documents)
            places["attention_mask"] = self._mask(documents)
        out: Tensor = self.theirs(input_ids=tokens, **places).logits
        return out

    def _mask(self, documents: Tensor) -> Tensor | dict[str, Tensor]:
        """What a position may attend to: (B, 1, T, T), True where it may; of a ModernBERT for both kinds of its layers."""
        same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, T, T)
        mask = (same if self.cfg.objective == "masked" else same.tril_()).unsqueeze(1)
        if self.cfg.model_type != "modernbert":
            return mask
        at = torch.arange(documents.shape[1], device=documents.device)
        near = (at.unsqueeze(1) - at).abs() <= self.theirs.config.sliding_window
        return {"full_attention": mask, "sliding_attention": mask & near}

    @property
    def token_head(self) -> LossHead:
        """From hidden states to tokens; "head" is what transformers calls another part of some models."""
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

    def is_head(self, name: str) -> bool:
        """Whether a weight of a model of this architecture, with whatever head, is of its head."""
        body = f"{self.theirs.base_model_prefix}."
        return not name.startswith(body) or name.startswith(f"{body}pooler.")

    def init_weights(self, seed: int) -> "HfModel":
        """As Transformer.init_weights."""
        fill(self, self.cfg, seed)
        return self

    def train(self, mode: bool = True) -> "HfModel":
        self.theirs.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HfModel":
        # to_empty() and moves between device types make a new Parameter for each name that holds one: tie them again.
        tied = self.token_head.weight is self.embed.weight
        super()._apply(fn, recurse)
        if tied and self.token_head.weight is not self.embed.weight:
            self.theirs.tie_weights()
        self._restore_frequencies()
        return self

    def _restore_frequencies(self) -> None:
        """Of rotary positions: a cast to bf16 rounds them, and to_empty() leaves them unset; no checkpoint has them."""
        for module in self.modules():
            if isinstance(module, ModernBertRotaryEmbedding):
                for kind in module.layer_types:
                    for name in (f"{kind}_inv_freq", f"{kind}_original_inv_freq"):
                        device = getattr(module, name).device
                        fresh, _ = module.compute_default_rope_parameters(module.config, device, layer_type=kind)
                        setattr(module, name, nn.Buffer(fresh, persistent=False))


class HfClassifier(HfModel):
    """The same with transformers' head for labels in place of the one for tokens, named as they name it.

    A label of a text is read where the text begins, at [CLS], and is the same wherever it is asked for in the row.
    """

    def __init__(self, cfg: HfModelConfig, n_labels: int, per_token: bool) -> None:
        nn.Module.__init__(self)
        self.per_token = per_token
        self._adopt(cfg, build_unset(cfg, n_labels, per_token))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens, documents: as HfModel.forward takes them, one text to a row. targets: (B, T), numbers of labels.

        Returns logits (B, T, L); with targets, the sum of the cross-entropies in nats, fp32.
        """
        logits = self._logits(tokens, documents)
        if not self.per_token:
            logits = logits.unsqueeze(1).expand(-1, tokens.shape[1], -1)  # (B, L) -> (B, T, L)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HfClassifier":
        nn.Module._apply(self, fn, recurse)  # nothing is tied
        self._restore_frequencies()
        return self
