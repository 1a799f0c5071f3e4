"""Attention over the present and the past, whole rows or document by document, and the masks that say which.

Rows with documents go through FlexAttention where a kernel for it can be made (arXiv:2412.05496), which skips what no
document of a row needs; elsewhere through scaled_dot_product_attention with a mask of all pairs. The results are equal.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.config import ModelConfig

# B batch, T sequence, N query heads, K key/value heads, H head_dim, Q blocks of a row

FLEX_BLOCK = 128  # positions; FlexAttention decides for squares of this size whether they are computed
FLEX_MIN_HEAD_DIM = 16  # narrower heads are refused by its kernels (torch 2.13)

Mask = Tensor | BlockMask


def positions_in_documents(documents: Tensor) -> Tensor:
    """Positions counted from each document's first in its row, from 0; documents and result are (B, T) int."""
    place = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def flex_serves(cfg: ModelConfig, seq_len: int, device: torch.device, training: bool) -> bool:
    """Whether document masks go through FlexAttention: on CUDA and ROCm, where its kernels do the case.

    They have no dropout, so a model that trains with it takes the dense mask, as do heads under FLEX_MIN_HEAD_DIM
    features and rows shorter than a block, for which there is nothing to skip.
    """
    dropping = training and cfg.dropout > 0
    return device.type == "cuda" and not dropping and cfg.dim_per_head >= FLEX_MIN_HEAD_DIM and seq_len >= FLEX_BLOCK


def document_mask(documents: Tensor, flex: bool) -> Mask:
    """What a position may attend to: itself and what lies before it in its own document. The same for all heads.

    documents: (B, T) int, non-decreasing along a row.
    flex: give a BlockMask, made without ever holding T x T pairs. Else a mask (B, 1, T, T), True where it may.
    """
    if flex:
        return _block_mask(documents)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, T, T)
    return same.tril_().unsqueeze(1)


def _block_mask(documents: Tensor) -> BlockMask:
    """What create_block_mask makes of the same rule, from each block's first and last document alone.

    As documents do not decrease along a row, an earlier block of keys is needed when its last document is the queries'
    first, and holds no pair to leave out when its first document is the queries' last: one document is in both then.
    create_block_mask would go through all T x T pairs to find that.
    """
    T = documents.shape[1]
    n_blocks = -(-T // FLEX_BLOCK)
    # Behind the row's end lies a document of its own, so that a block that is not whole is never taken without a look.
    beyond = torch.iinfo(documents.dtype).max
    padded = F.pad(documents, (0, n_blocks * FLEX_BLOCK - T), value=beyond)
    first, last = padded[:, ::FLEX_BLOCK], padded[:, FLEX_BLOCK - 1 :: FLEX_BLOCK]  # (B, Q) each
    number = torch.arange(n_blocks, device=documents.device)
    before = number.unsqueeze(1) > number  # (Q, Q): the keys' block lies wholly before the queries'
    needed = before & (last.unsqueeze(1) == first.unsqueeze(2))  # (B, Q, Q): queries along 1, keys along 2
    needed |= torch.eye(n_blocks, dtype=torch.bool, device=documents.device)
    whole = before & (first.unsqueeze(1) == last.unsqueeze(2))

    def may_attend(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    return BlockMask.from_kv_blocks(
        *_block_lists(needed & ~whole),
        *_block_lists(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=may_attend,
        seq_lengths=(T, T),
    )


def _block_lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, Q) bool -> how many blocks of keys each block of queries has (B, 1, Q), and which, first in the list.

    The list (B, 1, Q, Q) names every block; those behind the count are never read.
    """
    counts = wanted.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(wanted.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts.unsqueeze(1), order.contiguous().unsqueeze(1)


@functools.cache
def _flex_for(device_type: str) -> Any:
    """flex_attention, compiled once for all layers; as it is, it holds all scores, and serves tests on CPU alone."""
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention)


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) v over the present and the past. It has no parameters, so parallel/ can wrap it."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dropout = cfg.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """q: (B, T, N, H); k, v: (B, S, K, H) with N a multiple of K. Returns (B, T, N, H).

        S is T, or more where the queries are the last of S tokens, the others having come before (model/cache.py).
        mask: from document_mask, which keeps to the past itself; None: a row is one document, and T is S or 1.
        """
        assert mask is not None or q.shape[1] in (1, k.shape[1]), "several queries after others need a mask"
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, N, H) -> (B, N, T, H)
        grouped = q.shape[1] != k.shape[1]
        if isinstance(mask, BlockMask):
            assert self.dropout == 0 or not self.training, "FlexAttention has no dropout: flex_serves says no to it"
            out = _flex_for(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None and q.shape[2] == k.shape[2],  # one query after others sees them all
                # On CPU the flash kernel takes grouped heads, 3-7 % quicker than with keys and values repeated.
                enable_gqa=grouped,
            )
        return out.transpose(1, 2)
