"""The rank from any launcher's variables."""

import os
import socket

import pytest

from parallel import mesh
from parallel.mesh import (
    LaunchError,
    Place,
    RendezvousError,
    build_mesh,
    check_device,
    device_index,
    first_host,
    place_from_environment,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
            "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[003-004]"}  # fmt: skip


def test_nothing_set_is_one_process():
    place = place_from_environment({})
    assert (place.rank, place.world_size, place.local_rank, place.rendezvous) == (0, 1, 0, "")


def test_deepspeed_and_torchrun_variables():
    place = place_from_environment(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (3, 8, 1, 2)
    assert place.rendezvous == "tcp://n1:29500"
    assert place_from_environment({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}).rendezvous == "env://"


def test_slurm_step_variables():
    place = place_from_environment(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    assert place.rendezvous == "tcp://gpu003:20035"
    assert place_from_environment({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "7"}).rendezvous == "tcp://a:7"


def test_a_batch_script_without_srun_is_one_process():
    env = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP")}
    assert place_from_environment(env).world_size == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "has RANK or WORLD_SIZE but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x' in the environment; expected a whole number"),
        ({**TORCHRUN, "RANK": "8"}, r"rank 8 of a world of 8 \(RANK and WORLD_SIZE\): the rank must be below"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[1-2]"}, r"the node list '\[1-2\]' of SLURM cannot be read; set MASTER_ADDR"),
    ],
)
def test_a_bad_environment_is_named(env, message):
    with pytest.raises(LaunchError, match=message):
        place_from_environment(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-3,7]", "n1"), ("gpu[009-012]x,big1", "gpu009x"), ("a-b,c", "a-b"), ("n[7]", "n7")],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    from parallel import mesh

    class OldDevice:
        def is_bf16_supported(self):
            return False

        def is_fp16_supported(self):
            return True

        def device_name(self):
            return "old"

    monkeypatch.setattr(mesh, "get_accelerator", OldDevice)
    with pytest.raises(
        LaunchError, match=r"parallel.precision=bf16: the device old cannot compute in it; use fp32, fp16"
    ):
        check_device("bf16")


class FourGPUs:
    """Of a machine that is not here."""

    def __init__(self, count=4):
        self.device_count = lambda: count

    def device_name(self, index=None):
        return "cuda" if index is None else f"cuda:{index}"


def test_every_rank_has_a_device_of_its_own(monkeypatch):
    from parallel import mesh

    assert device_index(place_from_environment(TORCHRUN)) == 1  # on CPU, of which there is one name
    monkeypatch.setattr(mesh, "get_accelerator", FourGPUs)
    assert device_index(place_from_environment(TORCHRUN)) == 1
    assert device_index(place_from_environment(SRUN)) == 1
    with pytest.raises(LaunchError, match="8 ranks on this machine, where each sees 4 x cuda; start one rank for each"):
        device_index(place_from_environment({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}))


def test_a_task_that_slurm_binds_to_one_device_takes_it(monkeypatch):
    from parallel import mesh

    monkeypatch.setattr(mesh, "get_accelerator", lambda: FourGPUs(1))
    assert device_index(place_from_environment(SRUN)) == 0
    with pytest.raises(LaunchError, match="2 ranks on this machine, where each sees 1 x cuda"):
        device_index(place_from_environment(TORCHRUN))


@pytest.mark.fault(33)
def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = (
            rf"rank 0 of 2 did not meet the others at tcp://127.0.0.1:{port} .*(in use|EADDRINUSE).* its port free"
        )
        with pytest.raises(RendezvousError, match=message):
            build_mesh(Place(0, 2, 0, 1, f"tcp://127.0.0.1:{port}", "a test"), timeout_s=10)


@pytest.mark.fault(34)
@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:29500"])
def test_an_address_that_nobody_answers_at_is_named(address):
    with pytest.raises(RendezvousError, match=f"rank 1 of 2 did not meet the others at tcp://{address} "):
        build_mesh(Place(1, 2, 0, 1, f"tcp://{address}", "a test"), timeout_s=2)


def test_gloo_connects_many_ranks_at_their_first_word(monkeypatch):
    """As each would ask the store for the address of every other, in each group."""
    for ranks, expected in ((mesh.MANY - 1, None), (mesh.MANY, "1")):
        monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")
        monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
        with pytest.raises(RendezvousError):
            build_mesh(Place(1, ranks, 0, 1, "tcp://127.0.0.1:1", "a test"), timeout_s=1)
        assert os.environ.get("TORCH_GLOO_LAZY_INIT") == expected
