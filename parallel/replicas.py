"""What every rank holds alike must be alike: a bit that a memory or a processor has flipped is found before it is saved.

Under ZeRO 0 that is the whole state; under ZeRO 1 and 2 the weights that the model computes with, gathered anew after each
update, so that only what broke since the last one is seen; under ZeRO 3 nothing is held twice, and nothing is seen.
"""

import socket
from collections import Counter

import torch
from torch import Tensor

from parallel.engine import Engine

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


class ReplicaError(RuntimeError):
    """Ranks that should hold the same state do not."""


def check_replicas(engine: Engine) -> None:
    """Raise ReplicaError, on all ranks, naming the tensor, and the ranks that differ from most, with their machines."""
    if engine.mesh.dp_size == 1 or engine.zero_stage == 3:
        return
    tensors = {f"the weights of {name}": p.detach() for name, p in engine.parameters.items()}
    if engine.zero_stage == 0:
        tensors |= {f"the {f.kind} of {f.name}": f.tensor for f in engine.fragments()}
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).tolist()
    n, extremes = len(sums), engine.mesh.agree_max(*sums, *(-value for value in sums)).result()
    different = [i for i in range(n) if extremes[i] != -extremes[n + i]]
    if not different:
        return
    votes = engine.mesh.gather((socket.gethostname(), [sums[i] for i in different]))
    common = [Counter(values[k] for _, values in votes).most_common(1)[0] for k in range(len(different))]
    worst = next((k for k, (_, count) in enumerate(common) if count > len(votes) / 2), 0)
    value, count = common[worst]
    name = list(tensors)[different[worst]]
    if count <= len(votes) / 2:
        who = "no value has a majority among " + ", ".join(
            f"rank {rank} on {host}" for rank, (host, _) in enumerate(votes)
        )
    else:
        who = "it is another than on most ranks on " + ", ".join(
            f"rank {rank} on {host}" for rank, (host, values) in enumerate(votes) if values[worst] != value
        )
    raise ReplicaError(
        f"ranks that should hold the same differ in {name} (and {len(different) - 1} more of {n} tensors): {who}. A "
        "memory or a processor has failed there; take the machine out before the run goes on"
    )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements read as integers, (), int64: one flipped bit always changes it."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
