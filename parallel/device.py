"""The device this rank computes on, by whatever name the accelerator gives it."""

import platform

import torch
from deepspeed.accelerator import get_accelerator


def name() -> str:
    """The maker's name of the device, such as `NVIDIA H200`; the machine type for a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return f"CPU ({platform.machine()})"
    return str(torch.get_device_module(accelerator.device_name()).get_device_name())


def peak_mem_gib() -> float | None:
    """The most device memory that tensors have taken in this process, GiB; None on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return None
    return accelerator.max_memory_allocated() / 2**30
