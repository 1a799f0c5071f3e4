"""The linear layers of a model's blocks as int8 in a Hugging Face folder, in the layout of compressed-tensors.

Weights alone are int8: symmetric, with a scale for each row, which makes one output. What reads such a folder multiplies
them back, q * scale, and computes in floating point. Of that library's layouts it is `pack-quantized`, with 8 bits:
`int-quantized` is for int8 activations as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.hf_tensors import BLOCK, Entry, ReadRange

INSTALL = "pip install -c constraints.txt -e '.[int8]'"
REST = torch.bfloat16  # of the scales, and of what is not int8
LARGEST = 127  # -128 is not used: as far one way as the other
PER_WORD = 4  # int8 in an int32


def require_package() -> None:
    """Raises ValueError where what loads such a folder is not there: it could not be proved."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--dtype int8 needs compressed-tensors ({error}); run: {INSTALL}") from None


# -- numbers ------------------------------------------------------------------------------------------------------------


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: (R, n_in) fp32, rows of a matrix. Returns int8 (R, n_in) and the scales (R, 1), bf16."""
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST).to(REST)
    scale.masked_fill_(scale == 0, 1)  # a row of zeros
    return (weight / scale.float()).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def round_trip(weight: Tensor) -> Tensor:
    """What a reader of the folder takes for weight, (n_out, n_in): fp32, exactly, as both factors have at most 8 digits."""
    q, scale = quantize(weight.float())
    return q.float() * scale.float()


# -- as tensors of a file -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Entry):
    """One of the tensors that a matrix becomes; each reads the matrix by itself, some rows at a time."""

    theirs: str  # the name of the matrix in transformers
    ours: str  # and here
    n_out: int
    n_in: int
    suffix: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.theirs + self.suffix

    @property
    def n_params(self) -> int:
        return 0  # they are counted once, where they are packed

    def _quantized(self, read: ReadRange) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, BLOCK // self.n_in)  # whole ones, as a scale is of one
        for first in range(0, self.n_out, rows):
            last = min(first + rows, self.n_out)
            weight = read(self.ours, first * self.n_in, last * self.n_in).view(last - first, self.n_in)
            q, scale = quantize(weight)
            if not scale.isfinite().all():
                raise ValueError(
                    f"{self.ours} holds {weight.abs().max().item():.4g}, which has no int8; choose another step"
                )
            yield q, scale


@dataclass(frozen=True)
class Packed(Part):
    suffix: str = "_packed"
    dtype: torch.dtype = torch.int32

    @property
    def shape(self) -> list[int]:
        return [self.n_out, -(-self.n_in // PER_WORD)]

    @property
    def n_params(self) -> int:
        return self.n_out * self.n_in

    def blocks(self, read: ReadRange) -> Iterator[Tensor]:
        for q, _ in self._quantized(read):
            bytes_ = q.view(torch.uint8) ^ 128  # q + 128, from 1 to 255
            yield F.pad(bytes_, (0, -self.n_in % PER_WORD)).view(torch.int32).view(-1)  # the first in the lowest byte


@dataclass(frozen=True)
class Scale(Part):
    suffix: str = "_scale"
    dtype: torch.dtype = REST

    @property
    def shape(self) -> list[int]:
        return [self.n_out, 1]

    def blocks(self, read: ReadRange) -> Iterator[Tensor]:
        for _, scale in self._quantized(read):
            yield scale.view(-1)


@dataclass(frozen=True)
class Shape(Part):
    suffix: str = "_shape"
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> list[int]:
        return [2]

    def blocks(self, read: ReadRange) -> Iterator[Tensor]:
        yield torch.tensor([self.n_out, self.n_in])


def int8_entries(theirs: str, ours: str, shape: torch.Size) -> tuple[Entry, ...]:
    """What a matrix becomes. theirs, ours: its name in transformers and here; shape: (n_out, n_in)."""
    n_out, n_in = shape
    return Packed(theirs, ours, n_out, n_in), Scale(theirs, ours, n_out, n_in), Shape(theirs, ours, n_out, n_in)


# -- what config.json says ----------------------------------------------------------------------------------------------


def quantization_config(theirs: nn.Module, matrices: set[str]) -> dict[str, Any]:
    """theirs: transformers' model, without values.    matrices: names there of what is int8."""
    linear = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"blocks": {"targets": ["Linear"], "weights": weights}},
        "ignore": [name for name in linear if f"{name}.weight" not in matrices],
    }
