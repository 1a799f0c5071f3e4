"""How fast this machine's devices compute, and talk to another machine's: measured in seconds, before a run."""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

REPEATS = 10  # timings, of which the best counts: what is slow stays slow, and others on the machine do not


def devices() -> list[torch.device]:
    """All that this process sees; the CPU where there is no accelerator."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return [torch.device("cpu")]
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Free and whole memory of the device, GiB; of a CPU the machine's."""
    if device.type == "cpu":
        pages = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PHYS_PAGES")
        free, whole = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
    else:
        free, whole = torch.get_device_module(device.type).mem_get_info(device)
    return free / 2**30, whole / 2**30


def matmul_tflops(device: torch.device) -> float:
    """Of a square matrix product, TFLOP/s: in bf16, on a CPU in fp32."""
    n, count, dtype = (512, 4, torch.float32) if device.type == "cpu" else (8192, 20, torch.bfloat16)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return count * 2 * n**3 / _seconds(multiply, device) / 1e12


class Meeting:
    """Where this machine meets others, two at a time: at the first one's port.    port: TCP, on all interfaces."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = int(self._store.port)

    def all_reduce_gb_s(
        self, device: torch.device, other: tuple[str, int], first: bool, name: str, timeout_s: float
    ) -> float:
        """Bytes that two machines sum in a second, GB/s, from device to device: NCCL on NVIDIA, gloo on CPUs.

        other: the other's address and port.    first: whether they meet here, not there.    name: of this measurement.
        Raises RuntimeError where the other does not come or answer in timeout_s seconds.
        """
        limit = timedelta(seconds=timeout_s)
        store: Any = self._store if first else dist.TCPStore(*other, is_master=False, timeout=limit)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # or it would abort the process when time is over
        backend = dist.get_default_backend_for_device(device)
        store = dist.PrefixStore(name, store)
        dist.init_process_group(backend, store=store, rank=0 if first else 1, world_size=2, timeout=limit)
        try:
            tensor = torch.ones(2**20 if device.type == "cpu" else 2**26, device=device)
            seconds = _seconds(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX), device)
            dist.barrier()  # or the first to end could take its side away from the other
            return tensor.nbytes / seconds / 1e9
        finally:
            dist.destroy_process_group()


def _seconds(do: Any, device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        begin = time.perf_counter()
        do()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])
