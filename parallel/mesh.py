"""Where this process stands among the others: ranks from any launcher, the process group, the device."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

log = logging.getLogger(__name__)


MANY = 256  # ranks from which on gloo connects those alone that talk to each other, at their first word


class LaunchError(RuntimeError):
    """The environment does not say which rank this is, or names a world that cannot be."""


class RendezvousError(RuntimeError):
    """The ranks did not find each other; another start may, elsewhere."""


@dataclass(frozen=True)
class Place:
    """This process among those of the job, before any of them talks to another."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    rendezvous: str  # where the ranks meet, as torch.distributed takes it: env://, tcp://HOST:PORT, file://PATH
    found_by: str  # which launcher's variables were read


def place_from_environment(env: Mapping[str, str]) -> Place:
    """Read the rank from the variables of `deepspeed` or `torchrun`, else of an `srun` step, else: one process.

    A batch script on its own (SLURM_* without a step) counts as one process: only `srun` starts several.
    Raises LaunchError where variables are missing or contradict each other.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in env]
        if missing:
            raise LaunchError(
                f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}; "
                "start with deepspeed, torchrun or srun, or unset them for a single process"
            )
        world_size = _integer(env, "WORLD_SIZE")
        local_size = _integer(env, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", world_size)
        place = Place(
            _integer(env, "RANK"),
            world_size,
            _integer(env, "LOCAL_RANK"),
            local_size,
            f"tcp://{env['MASTER_ADDR']}:{_integer(env, 'MASTER_PORT')}"
            if "TORCHELASTIC_RUN_ID" not in env
            else "env://",
            "RANK and WORLD_SIZE",
        )
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
        world_size = _integer(env, "SLURM_STEP_NUM_TASKS")
        n_nodes = _integer(env, "SLURM_STEP_NUM_NODES", 1)
        place = Place(
            _integer(env, "SLURM_PROCID"),
            world_size,
            _integer(env, "SLURM_LOCALID"),
            -(-world_size // n_nodes),
            # every task of the step must name the same port without talking: it is taken from the job's id
            f"tcp://{env.get('MASTER_ADDR') or first_host(nodes)}:"
            f"{_integer(env, 'MASTER_PORT', 20_000 + _integer(env, 'SLURM_JOB_ID', 0) * 7 % 10_000)}",
            "SLURM_PROCID",
        )
    else:
        place = Place(0, 1, 0, 1, "", "one process")
    if not 0 <= place.rank < place.world_size:
        raise LaunchError(
            f"rank {place.rank} of a world of {place.world_size} ({place.found_by}): the rank must be below"
        )
    return place


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text if text is not None else "")
    except ValueError:
        raise LaunchError(f"{name}={text!r} in the environment; expected a whole number") from None


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,9],big1` gives `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise LaunchError(f"the node list {nodelist!r} of SLURM cannot be read; set MASTER_ADDR")
    head, number, tail = match.groups()
    return head + (number or "") + (tail or "")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a running job. `control` is a gloo group on host memory: agreeing costs the accelerator nothing.

    `background` is another, for a thread beside the training: collectives of one group must come in one order.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any  # torch.distributed.ProcessGroup
    background: Any

    def in_background(self) -> "Mesh":
        """The same ranks, agreeing over the background group."""
        return replace(self, control=self.background)

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    def agree_max(self, *values: int) -> "Agreement":
        """Start agreeing on the largest of each value over all ranks; `.result()` waits for them."""
        tensor = torch.tensor(values, dtype=torch.int64)
        return Agreement(tensor, dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control, async_op=True))

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_on_device(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place, on the device; nothing waits for it before it is read."""
        dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Values are pickled between our own processes only."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def open_store(self) -> Any:
        """A connection of its own to the store at which the ranks met: for a thread, while others wait in collectives."""
        return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]

    def set_timeout(self, seconds: float) -> None:
        """Of every process group there is, DeepSpeed's own too, which keep their defaults otherwise."""
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@dataclass(frozen=True)
class Agreement:
    tensor: torch.Tensor
    work: Any

    def result(self) -> list[int]:
        self.work.wait()
        return self.tensor.tolist()


def build_mesh(place: Place, timeout_s: int) -> Mesh:
    """Start the process group that the accelerator prefers (NCCL on NVIDIA, gloo on CPU) and a gloo group beside it."""
    accelerator = get_accelerator()
    index = device_index(place)
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed's engine takes it for the device, whatever the launcher
    device = torch.device(accelerator.device_name(index))
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread on every core
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    if device.type == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(index)
    if place.world_size >= MANY:  # else each rank asks the store for the address of every other: cluster/SCALE.md
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    backend, timeout = accelerator.communication_backend_name(), timedelta(seconds=timeout_s)
    if place.rendezvous:
        try:
            dist.init_process_group(
                backend, init_method=place.rendezvous, rank=place.rank, world_size=place.world_size, timeout=timeout
            )
        except RuntimeError as error:  # of the store or of gloo
            raise RendezvousError(
                f"rank {place.rank} of {place.world_size} did not meet the others at {place.rendezvous} "
                f"(MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}): "
                f"{str(error).splitlines()[0]}. Is that host reached from here, its port free, and the network interface "
                "the right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)? A second start on one machine needs a port of "
                "its own: deepspeed --master_port N, torchrun --standalone"
            ) from error
    else:  # alone: no address to meet at, so no port that could be taken
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    # An all-reduce for inference on CPUs, compiled for a minute at first use; nothing here calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout)
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Mesh(place.rank, place.world_size, place.local_rank, device, control, background)


def check_device(precision: str) -> None:
    """Raise LaunchError if this machine's device cannot compute in `precision`."""
    accelerator = get_accelerator()
    possible = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": bool(accelerator.is_fp16_supported()),
    }
    if not possible[precision]:
        usable = ", ".join(name for name, able in possible.items() if able)
        raise LaunchError(
            f"parallel.precision={precision}: the device {accelerator.device_name()} cannot compute in it; use {usable}"
        )


def device_index(place: Place) -> int:
    """Which of the devices that this process sees is its own. Raises LaunchError where there are fewer than ranks.

    SLURM may bind each task to a device (--gpus-per-task): then every task sees one, its own.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return place.local_rank
    seen = int(accelerator.device_count())
    if seen == 1 and place.found_by == "SLURM_PROCID":
        return 0
    if place.local_size > seen:
        raise LaunchError(
            f"{place.local_size} ranks on this machine, where each sees {seen} x {accelerator.device_name()}; start one "
            "rank for each device"
        )
    return place.local_rank


def close_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
