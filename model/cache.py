"""Keys and values of the tokens that a model has read, so that one more token costs one position and not all of them."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

# B batch, T new tokens, S tokens read with them, K key/value heads, H head_dim, V vocab


class LayerCache:
    """Of one block; it has room from the beginning and never grows."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """shape: (B, room for S, K, H)."""
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take k and v (B, T, K, H) of the next tokens; returns those of all, (B, S, K, H)."""
        first, self.length = self.length, self.length + k.shape[1]
        self.keys[:, first : self.length] = k
        self.values[:, first : self.length] = v
        return self.keys[:, : self.length], self.values[:, : self.length]


class KVCache:
    """Of a whole model, for rows of the same length: what Transformer.forward takes as `cache`."""

    def __init__(self, cfg: ModelConfig, batch: int, room: int, like: Tensor) -> None:
        """room: tokens a row at most, cfg.seq_len or fewer.    like: a weight of the model, for dtype and device."""
        shape = (batch, room, cfg.kv_heads, cfg.dim_per_head)
        self.layers = [LayerCache(shape, like.dtype, like.device) for _ in range(cfg.n_layers)]

    @property
    def length(self) -> int:
        """Tokens of each row that have been read."""
        return self.layers[0].length

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, in this order."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def next_logits(model: Transformer, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
    """Logits (B, V) of the token after the last one. tokens: (B, T), with a cache those that it has not read yet."""
    return model.head(model.hidden(tokens, cache=cache)[:, -1])
