"""The state that a checkpoint holds, in the terms of engine and checkpoint alike. Costs torch, not DeepSpeed."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

WEIGHT, EXP_AVG, EXP_AVG_SQ = KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's state that this rank holds: `tensor` is a 1-D view of the live memory.

    That is the device's, or the host's where `parallel.offload_optimizer` has put it. What is trained is fp32; a frozen
    parameter has no moments and no master, and its weight is in the format that the model computes in.
    """

    name: str  # the parameter's name
    kind: str  # one of KINDS: the weight, of what is trained the fp32 master, and AdamW's two moments
    start: int  # place of the first element in the flattened parameter
    tensor: Tensor


class StateSource(Protocol):
    """Where `Engine.load_state` gets values from."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D, fp32."""
