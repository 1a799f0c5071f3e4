"""The tensors of a Hugging Face folder's weight files, and how each is made from parameters of ours.

They are made a block of elements at a time, so that the memory needed does not grow with the model; one that
transformers keeps transposed (GPT-2's Conv1D) is held whole while it is turned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.hf import Rule

BLOCK = 2**20  # elements of a parameter that are converted and written at a time: 4 MiB of fp32
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
}

# Elements [start, stop) of a parameter of ours by its name, flattened, (stop - start,) fp32.
ReadRange = Callable[[str, int, int], Tensor]


class Entry(ABC):
    """A tensor of a file."""

    dtype: torch.dtype

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def shape(self) -> list[int]: ...

    @property
    @abstractmethod
    def n_params(self) -> int:
        """How many of the model's parameters it holds."""

    @abstractmethod
    def blocks(self, read: ReadRange) -> Iterator[Tensor]:
        """Its values in the order of the file, block by block, 1-D of its dtype. Raises ValueError where one overflows."""

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FloatEntry(Entry):
    """Parameters as they are, rounded to a dtype."""

    rule: Rule
    parts: tuple[torch.Size, ...]  # shapes of those in rule.ours
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.rule.hf

    @property
    def shape(self) -> list[int]:
        stacked = [sum(part[0] for part in self.parts), *self.parts[0][1:]]
        return stacked[::-1] if self.rule.conv1d else stacked

    @property
    def n_params(self) -> int:
        return torch.Size(self.shape).numel()

    def blocks(self, read: ReadRange) -> Iterator[Tensor]:
        if not self.rule.conv1d:
            yield from self._stacked(read)
            return
        n_in, n_out = self.shape
        stacked, at = torch.empty(n_out * n_in, dtype=self.dtype), 0  # rule.to_hf, with one copy and not four
        for block in self._stacked(read):
            stacked[at : at + len(block)] = block
            at += len(block)
        rows = max(1, BLOCK // n_out)
        for first in range(0, n_in, rows):
            yield stacked.view(n_out, n_in)[:, first : first + rows].T.contiguous().view(-1)

    def _stacked(self, read: ReadRange) -> Iterator[Tensor]:
        for name, shape in zip(self.rule.ours, self.parts, strict=True):
            for start in range(0, shape.numel(), BLOCK):
                values = read(name, start, min(start + BLOCK, shape.numel()))
                rounded = values.to(self.dtype)
                if not rounded.isfinite().all():
                    raise ValueError(
                        f"{name} holds {values.abs().max().item():.4g}, and {self.dtype} ends at "
                        f"{torch.finfo(self.dtype).max:.4g}; export with a wider --dtype, such as bf16 or fp32"
                    )
                yield rounded
