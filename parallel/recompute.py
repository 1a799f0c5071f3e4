"""Activation checkpointing (recomputation): what the backward pass computes again instead of keeping.

It is put on from outside by replacing the `forward` of blocks, so the model keeps its parameter names. A block has no
parameters of its own, only its submodules have: under ZeRO 3 their hooks gather weights again during recomputation.
"""

import functools
from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from parallel.config import ParallelConfig

# What selective keeps: results that are dear to compute again. Everything else of a block (norms, rotations,
# activation functions, products) is cheap and is recomputed. A mask of documents takes attention to one of the same
# kernels, or, where none takes the mask (grouped heads on CUDA), to products, of which the dear ones are here too.
# FlexAttention is recomputed: compiled, it is no single operation that a mode could see.
_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _is_dear(func: Any, args: tuple, kwargs: dict | None) -> bool:
    """Whether selective keeps what this call returns.

    Not when it draws dropout itself, as attention on CUDA does: to skip it would leave the random generator behind, and
    the dropout after it would draw other numbers than in the first forward.
    """
    if func not in _DEAR:
        return False
    names = (argument.name for argument in func._schema.arguments)
    return not {**dict(zip(names, args, strict=False)), **(kwargs or {})}.get("dropout_p")


class _Kept:
    """The results of one dear operation, and whether they still are what it returned."""

    def __init__(self, result: Any) -> None:
        self.result = tree_map_only(Tensor, torch.Tensor.detach, result)
        self.storages = {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor)}
        self.overwritten = False


class _Mode(TorchDispatchMode):
    """What both modes share. Under a mode that did not say so, compiled functions would fall back to running eagerly,
    which for FlexAttention means all scores in memory, and operators of a higher order would be refused.
    """

    supports_higher_order_operators = True

    def __init__(self, kept: dict[Any, deque]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Keep(_Mode):
    """First forward: keep the results of dear operations, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_dear(func, args, kwargs):
            self.kept[func].append(_Kept(out))
        elif not isinstance(func, HigherOrderOperator) and func._schema.is_mutable:
            # Such as ZeRO 3's `output += bias` on the result of a product.
            named = zip(func._schema.arguments, args, strict=False)
            written = [value for spec, value in named if spec.alias_info is not None and spec.alias_info.is_write]
            storages = {t.untyped_storage().data_ptr() for t in tree_leaves(written) if isinstance(t, Tensor)}
            for entry in (entry for entries in self.kept.values() for entry in entries):
                if not storages.isdisjoint(entry.storages):
                    entry.overwritten, entry.result = True, None
        return out


class _Reuse(_Mode):
    """Recomputation: hand out the kept results instead of computing them; what was overwritten since is computed.

    torch's own selective checkpointing counts every operation and gives up under ZeRO 3, whose hooks gather and cut
    weights differently the second time; here only dear ones count, and gathering has none.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _is_dear(func, args, kwargs):
            entry = self.kept[func].popleft()
            if not entry.overwritten:
                return entry.result
        return func(*args, **(kwargs or {}))


def _selective_contexts() -> tuple[_Keep, _Reuse]:
    kept: dict[Any, deque] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


def apply_recompute(blocks: nn.ModuleList, cfg: ParallelConfig) -> int:
    """Wrap the blocks that `cfg.activation_checkpointing` names; returns how many.

    full: all, recomputed whole. every_k: the first and then each k-th, whole. selective: all, but what _DEAR names is
    kept. Dropout draws the same numbers the second time.
    """
    mode = cfg.activation_checkpointing
    if mode == "none":
        return 0
    step = cfg.checkpoint_every_k if mode == "every_k" else 1
    options: dict = {"use_reentrant": False}
    if cfg.zero_stage == 3:
        # Weights saved by the first forward are empty when their partition is released; the check on shapes would
        # take that for a fault. Gradients are compared with those of no recomputation in tests/parallel instead.
        options["determinism_check"] = "none"
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    chosen = list(blocks)[::step]
    for block in chosen:
        block.forward = functools.partial(checkpoint, block.forward, **options)
    return len(chosen)
