"""LoRA (arXiv:2106.09685): low-rank matrices that are trained beside the frozen matrices of a model.

The layers are peft's. A linear layer `wq` becomes `wq.base_layer`, `wq.lora_A.default` and `wq.lora_B.default`, and gives
W x + alpha / rank * B (A x). What reads a trained model outside of training gets W + alpha / rank * B A in W's place.
"""

from collections import defaultdict
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

INSTALL = "pip install -c constraints.txt -e '.[lora]'"
BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # within the names of parameters


class LoraConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The `lora` section of a fine-tuning recipe: what is trained in the place of all weights."""

    rank: PositiveInt = 8
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)  # B A is multiplied by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)  # on what A takes
    # linear layers of the blocks by the last part of their names, such as wq; None: all of them
    targets: Annotated[list[str], Field(min_length=1)] | None = None

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class LoraError(ValueError):
    """The section does not suit the model, or peft is not there."""


def linear_layers(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers of the model's blocks: last part of the name -> whole names."""
    found: dict[str, list[str]] = defaultdict(list)
    of_blocks = set(model.blocks.modules())  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in of_blocks:
            found[name.rpartition(".")[2]].append(name)
    return found


def targets_of(model: nn.Module, cfg: LoraConfig) -> list[str]:
    """The last parts of the names of what gets adapters. Raises LoraError where a target names nothing."""
    known = sorted(linear_layers(model))
    if not known:  # transformers' GPT-2 has a class of its own for them
        raise LoraError("lora: the model's blocks have no torch.nn.Linear, which alone gets adapters; leave lora out")
    if wrong := [name for name in cfg.targets or () if name not in known]:
        raise LoraError(
            f"lora.targets: {', '.join(wrong)} names no linear layer of the model's blocks; they are {', '.join(known)}"
        )
    return known if cfg.targets is None else sorted(set(cfg.targets))


def add_adapters(model: nn.Module, cfg: LoraConfig, heads: tuple[str, ...]) -> nn.Module:
    """Put adapters on the model, in place, and freeze all else but what begins with `heads`. Values are left unset.

    Raises LoraError.
    """
    peft = import_peft()
    by_name = linear_layers(model)
    layers = [name for target in targets_of(model, cfg) for name in by_name[target]]
    options = {"r": cfg.rank, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout, "init_lora_weights": False}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=layers, **options), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.startswith(heads))
    return model


def import_peft() -> Any:
    """Raises LoraError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise LoraError(f"lora needs peft ({error}); run: {INSTALL}") from None
    return peft


# -- names and values ---------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    return A in name or B in name


def plain_name(name: str) -> str:
    """What the model without adapters calls a parameter that it has, too."""
    return name.replace(BASE, ".")


def within(name: str, part: str) -> str:
    """The name of a part (BASE, A or B) of a layer whose parameter is `name` in the model without adapters."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}{part}{kind}"


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, start: int) -> Tensor:
    """The elements of W + scaling * B A from the flattened `start` on, as many as `weight` has of W.

    weight: (n,); a: (rank, in); b: (out, rank); all fp32. Products are added one rank after the other, and not by a matrix
    product, which rounds differently for other ranges: an element is to have the same bits whoever reads it with what.
    """
    width = a.shape[1]
    first, last = start // width, -(-(start + len(weight)) // width)
    change = torch.zeros(last - first, width)
    for row, column in zip(a, b[first:last].T, strict=True):
        change += column[:, None] * row  # (rows, 1) * (in,) -> (rows, in)
    return weight + (change * scaling).flatten()[start - first * width :][: len(weight)]
