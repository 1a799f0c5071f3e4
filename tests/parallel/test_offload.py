"""State in host memory: the same numbers as on the device, and checkpoints that go both ways."""

from pathlib import Path

import pytest
import torch

from parallel.checkpoint import newest_good
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig
from parallel.deepspeed_config import deepspeed_config
from parallel.engine import _create_moments
from ranks import OPTIM, build, config_of, run_ranks, run_steps, save, whole_state

CASES = [
    (stage, precision, offload)
    for precision in ("fp32", "bf16")
    for stage, offload in [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "param"), (3, "both")]
]
UNCLIPPED = OPTIM.model_copy(update={"grad_clip": 0.0})
# On the host the gradient norm is added up in another order, so what clipping leaves of a gradient differs in its last
# bits: weights by 1.2e-7 after one update. In bf16 that rounds some of them (30 of 361,000) to their other neighbour, and
# from there on every forward pass rounds otherwise: 2e-5 of a loss and 4e-4 of a norm, a tenth of bf16's own rounding.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}


def both_ways(mesh, folder):
    """By case: the device's run of 4 steps and the host's; and each one's checkpoint of step 2 read by the other."""
    results, on_device = {}, {}
    # ZeRO 3 first: for it DeepSpeed replaces torch's linear, for good, by one that rounds otherwise in bf16
    for stage in (3, 2, 1):
        for precision in ("fp32", "bf16"):
            on_device[stage, precision] = go(mesh, (stage, precision, "none"), folder)
    for case in CASES:
        stage, precision, _ = case
        kept = (stage, precision, "none")
        results[case] = {
            "device": on_device[stage, precision],
            "host": go(mesh, case, folder),
            "device to host": read(mesh, kept, case, folder),
            "host to device": read(mesh, case, kept, folder),
        }
    return results


def go(mesh, case, folder):
    """(results of 4 steps, state after 2 of them, losses of 4 steps without clipping)."""
    engine = build(mesh, config_of(*case))
    losses = run_steps(engine, range(2))
    save(folder / "-".join(map(str, case)), engine, 2)
    state = whole_state(engine)
    losses += run_steps(engine, range(2, 4))
    engine.close()
    engine = build(mesh, config_of(*case), optim=UNCLIPPED)
    unclipped = [loss for loss, *_ in run_steps(engine, range(4))]
    engine.close()
    return losses, state, unclipped


def read(mesh, source, target, folder):
    """The state of a fresh engine after the load, Adam's steps, and how the run goes on."""
    engine = build(mesh, config_of(*target))
    reader = newest_good(folder / "-".join(map(str, source)), mesh)
    engine.load_state(reader, reader.manifest.adam_steps)
    result = whole_state(engine), engine.adam_steps, run_steps(engine, range(2, 4))
    engine.close()
    return result


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    return run_ranks(2, both_ways, tmp_path_factory.mktemp("offload"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_trains_as_on_the_device(crossed, case):
    results, near = crossed[case], TOLERANCE[case[1]]
    assert results["host"][2] == results["device"][2]  # to the last bit, where nothing is clipped
    host, device = torch.tensor(results["host"][0]), torch.tensor(results["device"][0])
    torch.testing.assert_close(host, device, rtol=near, atol=near)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["device to host", "host to device"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_checkpoints_are_those_of_the_device(crossed, case, way):
    source = crossed[case][way.split()[0]]
    state, steps, losses = crossed[case][way]
    assert steps == 2
    assert state.keys() == source[1].keys()
    for key, values in source[1].items():
        assert torch.equal(state[key], values), key
    assert losses[0][0] == source[0][2][0]  # the weights that compute were set, too: the same loss to the last bit
    near = TOLERANCE[case[1]]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(source[0][2:]), rtol=near, atol=near)


def test_moments_lie_where_their_masters_do():
    master = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([master])
    _create_moments(optimizer, [master])
    assert {tensor.device for tensor in optimizer.state[master].values()} == {master.device}


@pytest.mark.parametrize("offload", ["none", "optimizer", "param", "both"])
def test_deepspeed_is_told_so(offload):
    """On a CPU the trained numbers would not show whether it was: device and host are one there."""
    ds = deepspeed_config(
        config_of(3, "bf16", offload), micro_batch_size=1, grad_accum_steps=1, dp_size=1, grad_clip=1.0
    )
    zero = ds["zero_optimization"]
    assert zero.get("offload_optimizer", {}).get("device") == ("cpu" if offload in ("optimizer", "both") else None)
    assert zero.get("offload_param", {}).get("device") == ("cpu" if offload in ("param", "both") else None)
    assert ds.get("zero_force_ds_cpu_optimizer") == (False if offload in ("optimizer", "both") else None)


def places(mesh, stage, offload):
    """After a step: devices of masters, moments and Adam's step, of the model's partitions, and of a snapshot."""
    engine = build(mesh, config_of(stage, "bf16", offload))
    run_steps(engine, range(1))
    state = {f.tensor.device.type for f in engine.fragments()}
    state |= {entry["step"].device.type for entry in engine._base_optimizer().state.values()}
    weights = {getattr(p, "ds_tensor", p).device.type for p in engine.parameters.values()}
    copies = CheckpointWriter(Path("unused"), mesh, CheckpointConfig())._snapshot(engine.owned_fragments())
    return state, weights, {tensor.device.type for tensor in copies.values()}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "both")])
def test_on_a_gpu_the_state_is_on_the_host(stage, offload):
    if not torch.accelerator.is_available():
        pytest.skip("needs a device whose memory is not the host's: on a CPU both are one")
    state, weights, copies = run_ranks(1, places, stage, offload)[0]
    assert state == {"cpu"}
    assert weights == ({"cpu"} if offload == "both" else {torch.accelerator.current_accelerator().type})
    assert copies == {"cpu"}
