"""A flipped bit on one rank is found, and the rank is named."""

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.replicas import ReplicaError, check_replicas
from ranks import build, run_ranks, run_steps

CASES = [(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16")]


def flip(mesh, where, cases):
    """What is said on this rank, for each (stage, precision), before and after a bit of rank `where` is flipped."""
    said = {}
    for stage, precision in cases:
        engine = build(mesh, ParallelConfig(zero_stage=stage, precision=precision), accum=1)
        run_steps(engine, range(2), accum=1)
        check_replicas(engine)
        name, p = list(engine.parameters.items())[3]
        if mesh.rank == where:
            bits = p.detach().view(-1)[:1].view(torch.int16 if precision == "bf16" else torch.int32)
            bits.bitwise_xor_(1)
        try:
            check_replicas(engine)
        except ReplicaError as error:
            said[stage, precision] = name, str(error)
        engine.close()
    return said


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.fault(38)
def test_one_of_three_is_named(case, three):
    for rank in three:
        name, message = rank[case]
        more = int(case == (0, "fp32"))  # there the weights are their own masters
        assert message.startswith(
            f"ranks that should hold the same differ in the weights of {name} (and {more} more of "
        )
        assert "it is another than on most ranks on rank 1 on " in message
        assert "take the machine out before the run goes on" in message


@pytest.fixture(scope="module")
def three():
    return run_ranks(3, flip, 1, CASES)


@pytest.mark.fault(38)
def test_of_two_both_are_named():
    for rank in run_ranks(2, flip, 0, [(1, "bf16")]):
        _, message = rank[1, "bf16"]
        assert "no value has a majority among rank 0 on " in message
        assert ", rank 1 on " in message
