"""The decoder with a head for labels instead of one for tokens: a label for a text, or a tag for each word."""

from torch import Tensor

from model.config import ModelConfig
from model.loss import linear_cross_entropy
from model.transformer import Linear, Transformer

# B batch, T sequence, D d_model, L labels


class Score(Linear):
    """From hidden states to logits of labels or to the loss."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden: (B, T, D); targets: (B, T) int64. Returns logits (B, T, L), or with targets the summed loss."""
        if targets is None:
            return super().forward(hidden)  # (B, T, D) -> (B, T, L)
        return linear_cross_entropy(hidden, self.weight, targets)


class Classifier(Transformer):
    """A Transformer with `score` in the place of its `head`; all other parameters are named alike.

    Which tokens count is said by the targets: the last of a text for its label, one of each word for its tag.
    """

    def __init__(self, cfg: ModelConfig, n_labels: int) -> None:
        super().__init__(cfg.model_copy(update={"tie_embeddings": True}))  # so that no head for tokens is made
        self.cfg = cfg.model_copy(update={"tie_embeddings": False})
        del self.head
        self.score = Score(cfg.d_model, n_labels, bias=False)  # as transformers' heads for sequences have none

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens, targets (numbers of labels), documents: (B, T), as Transformer.forward takes them.

        Returns logits (B, T, L); with targets, the sum of the cross-entropies in nats, a fp32 scalar.
        """
        return self.score(self.hidden(tokens, documents), targets)
