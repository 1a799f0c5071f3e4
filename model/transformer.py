"""The network: one pre-norm decoder that, by its config, is a GPT-2, a Llama or a Qwen3.

Constructing a model leaves its parameters unset, on whatever device and in whatever dtype torch.empty gives there (the
meta device, deepspeed.zero.Init): `init_weights` or a checkpoint fills them. There are no buffers, so a cast of the
whole model to bf16 touches parameters only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CausalAttention, Mask, document_mask, flex_serves, positions_in_documents
from model.config import ModelConfig
from model.init import fill
from model.loss import linear_cross_entropy

# B batch, T sequence, D d_model, F d_ff, V vocab, N query heads, K key/value heads, H head_dim
# (N, K and F are local when the projections are split from outside: the code takes them from the tensors it sees)


class Linear(nn.Linear):
    """nn.Linear that does not draw values when it is made."""

    def reset_parameters(self) -> None:
        """Leave the parameters unset: model/init.py fills them."""


class Embedding(nn.Embedding):
    """nn.Embedding that does not draw values when it is made."""

    def reset_parameters(self) -> None:
        """Leave the parameters unset: model/init.py fills them."""


def build_norm(cfg: ModelConfig, width: int) -> nn.Module:
    """A norm over the last dimension; torch computes both kinds in fp32 when the input is narrower."""
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=cfg.norm_eps)
    return nn.LayerNorm(width, eps=cfg.norm_eps)


def rotary_frequencies(cfg: ModelConfig, device: torch.device) -> Tensor:
    """Radians per token of each pair of features: (H/2,), fp32 (RoFormer, arXiv:2104.09864).

    With cfg.rope_scaling, low frequencies are divided by its factor as in Llama 3.1 (arXiv:2407.21783).
    """
    exponents = torch.arange(0, cfg.dim_per_head, 2, dtype=torch.float32, device=device) / cfg.dim_per_head
    frequencies = 1.0 / cfg.rope_theta**exponents
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_seq_len / (2 * math.pi / frequencies)  # full circles within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)  # 1: a short wavelength, unchanged; 0: a long one, stretched in full
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotary_tables(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` (..., T): two tensors (..., T, H/2), fp32 whatever the model's dtype.

    bf16 would hold positions exactly only up to 256.
    """
    angles = positions.float().unsqueeze(-1) * rotary_frequencies(cfg, positions.device)  # (T, 1) * (H/2,) -> (T, H/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + H/2]) by their angles. x: (B, T, N, H); result as x.

    cos, sin: fp32, (T, H/2), or (B, T, H/2) when rows differ in their positions.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, H/2) or (B, T, 1, H/2): the same for every head
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class LayerCache(Protocol):
    """Keys and values of tokens read before, of one block: see model/cache.py."""

    length: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Cache(Protocol):
    """Of all blocks."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...
    @property
    def length(self) -> int: ...


class Attention(nn.Module):
    """Projections, QK-norm and rotary around CausalAttention."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.dim_per_head
        self.wq = Linear(cfg.d_model, cfg.n_heads * self.head_dim, bias=cfg.attention_bias)
        self.wk = Linear(cfg.d_model, cfg.kv_heads * self.head_dim, bias=cfg.attention_bias)
        self.wv = Linear(cfg.d_model, cfg.kv_heads * self.head_dim, bias=cfg.attention_bias)
        self.wo = Linear(cfg.n_heads * self.head_dim, cfg.d_model, bias=cfg.attention_output_bias)
        self.q_norm = build_norm(cfg, self.head_dim) if cfg.qk_norm else None
        self.k_norm = build_norm(cfg, self.head_dim) if cfg.qk_norm else None
        self.core = CausalAttention(cfg)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x: (B, T, D); mask: as CausalAttention takes it; cache: of the tokens before x. Returns (B, T, D)."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, D) -> (B, T, N, H)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, D) -> (B, T, K, H)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, D) -> (B, T, K, H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, T, K, H) -> (B, S, K, H)
        return self.wo(self.core(q, k, v, mask).flatten(2))  # (B, T, N, H) -> (B, T, N * H) -> (B, T, D)


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x) (arXiv:2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w_gate = Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.w_up = Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.w_down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))  # (B, T, D) -> (B, T, F) -> (B, T, D)


class GeluMLP(nn.Module):
    """w_down(gelu(w_up x)), gelu by GPT-2's tanh approximation."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w_up = Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.w_down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.gelu(self.w_up(x), approximate="tanh"))  # (B, T, D) -> (B, T, F) -> (B, T, D)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.attn_norm = build_norm(cfg, cfg.d_model)
        self.attn = Attention(cfg)
        self.mlp_norm = build_norm(cfg, cfg.d_model)
        self.mlp = SwiGLU(cfg) if cfg.mlp == "swiglu" else GeluMLP(cfg)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x: (B, T, D); cos, sin: as rotate takes them, or None with learned positions; mask: as CausalAttention does.

        cache: of the tokens before x. Returns (B, T, D).
        """
        x = x + F.dropout(self.attn(self.attn_norm(x), cos, sin, mask, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class Head(nn.Module):
    """From hidden states to logits or to the loss; nothing else touches its weight, which ZeRO-3 gathers for this."""

    def __init__(self, cfg: ModelConfig, tied_weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight: Tensor = (
            tied_weight if tied_weight is not None else nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))
        )

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden: (B, T, D); targets: (B, T) int64. Returns logits (B, T, V), or with targets the summed loss."""
        if targets is None:
            return F.linear(hidden, self.weight)  # (B, T, D) -> (B, T, V)
        return linear_cross_entropy(hidden, self.weight, targets)


class Transformer(nn.Module):
    """The decoder described by `cfg`; its parameters are unset until init_weights or a checkpoint fills them."""

    head_type: type[Head] = Head

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab_size, cfg.d_model)
        self.pos_embed = Embedding(cfg.seq_len, cfg.d_model) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layers)])
        self.norm = build_norm(cfg, cfg.d_model)
        self.head = self.head_type(cfg, self.embed.weight if cfg.tie_embeddings else None)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens: (B, T) int64 with T <= cfg.seq_len; targets: (B, T) int64, -100 where a token does not count.

        documents: (B, T) int, which document of its row each token belongs to, never decreasing along a row. Attention
        then stays within documents and positions restart with each, so that a document gives the same as in a row of
        its own. None: each row is one document. Targets across documents count unless they are set to -100.
        Returns logits (B, T, V); with targets, the sum of the cross-entropies in nats, a fp32 scalar. The sum and not
        the mean, so that micro-batches and ranks with different numbers of counted tokens can be added up.
        Raises ValueError when T exceeds cfg.seq_len, and for documents of another shape than tokens or no integers.
        """
        return self.head(self.hidden(tokens, documents), targets)

    def hidden(self, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head takes, (B, T, D); tokens and documents as forward takes them.

        cache: of the tokens before these, which are then read as if they stood in one row with those; it takes them up.
        """
        assert documents is None or cache is None, "a cache is of rows that are one document each"
        first, T = 0 if cache is None else cache.length, tokens.shape[1]
        check_length(first + T, self.cfg.seq_len)
        positions = torch.arange(first, first + T, device=tokens.device)
        mask = None
        if documents is not None:
            check_documents(documents, tokens)
            positions = positions_in_documents(documents)  # (T,) -> (B, T)
            mask = document_mask(documents, flex_serves(self.cfg, T, tokens.device, self.training))
        elif first and T > 1:
            mask = torch.ones(T, first + T, dtype=torch.bool, device=tokens.device).tril_(first)
        cos = sin = None
        x = self.embed(tokens)  # (B, T) -> (B, T, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        else:
            cos, sin = rotary_tables(self.cfg, positions)
        x = F.dropout(x, self.cfg.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask) if cache is None else block(x, cos, sin, mask, cache.layers[layer])
        return self.norm(x)

    def init_weights(self, seed: int) -> "Transformer":
        """Fill every parameter with its initial_values for `seed`, in place and in its own dtype; returns self."""
        fill(self, self.cfg, seed)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # to_empty() and moves between device types make a new Parameter for each name that holds one: tie them again.
        super()._apply(fn, recurse)
        if self.cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        return self


def check_length(length: int, longest: int) -> None:
    if length > longest:
        raise ValueError(
            f"got sequences of {length} tokens, but model.seq_len={longest} is the longest; "
            f"cut them, or build the model with seq_len {length} or more"
        )


def check_documents(documents: Tensor, tokens: Tensor) -> None:
    if documents.shape != tokens.shape or documents.is_floating_point() or documents.dtype == torch.bool:
        raise ValueError(
            f"documents are {tuple(documents.shape)} of {documents.dtype}; expected one integer for each of the tokens "
            f"{tuple(tokens.shape)}: the number of its document within the row"
        )
