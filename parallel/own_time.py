"""How long a rank computes without waiting for another: in synchronous training every step takes all ranks equally long.

What is timed has no collective in it. Under ZeRO 0 to 2 that is the model's forward pass; gradients are reduced during the
backward pass. Under ZeRO 3 weights are gathered between modules, so it is the forward of each module with weights of its
own, from when they are there. A device runs behind the host, so its own events tell the time, and nothing waits for them.
"""

import time
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import nn

AT_MOST = 64  # stretches that are timed in a step, the first ones, the same on all ranks


class _HostEvent:
    """What a device's event does, where the host computes."""

    def record(self) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "_HostEvent") -> float:
        """Milliseconds."""
        return (later._at_s - self._at_s) * 1e3


class OwnTime:
    """Times a model's forward passes while it trains, from when this is made; after DeepSpeed has put on its hooks."""

    def __init__(self, model: nn.Module, zero_stage: int) -> None:
        self._kind = get_accelerator().Event or (lambda **_: _HostEvent())
        self._begun: dict[nn.Module, Any] = {}
        self._spans: list[tuple[Any, Any]] = []
        self._spare: list[Any] = []
        for module in model.modules() if zero_stage == 3 else [model]:
            if zero_stage < 3 or next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def take_s(self) -> float:
        """Seconds since the last call. To be called once a step, when its loss is known."""
        if self._spans:
            self._spans[-1][1].synchronize()  # it is over
        took = sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1e3
        self._spare += [event for span in self._spans for event in span]
        self._spans.clear()
        return took

    def _now(self) -> Any:
        event = self._spare.pop() if self._spare else self._kind(enable_timing=True)
        event.record()
        return event

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module in self._begun:  # recomputation left it in its midst, having all it needs
            self._spare.append(self._begun.pop(module))
        if module.training and len(self._spans) < AT_MOST:
            self._begun[module] = self._now()

    def _end(self, module: nn.Module, *_: Any) -> None:
        if module in self._begun:
            self._spans.append((self._begun.pop(module), self._now()))
