"""A rank's own time tells which one is slow, though every rank's step takes as long as the slowest one's."""

import time

import pytest
import torch
from torch import nn

from parallel import own_time
from parallel.config import ParallelConfig
from parallel.own_time import AT_MOST, OwnTime
from ranks import build, run_ranks, run_steps

SLEEP_S = 0.2
WAYS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (3, "full")]


def time_all(mesh):
    """(own time, wall time) of a step in which rank 1 sleeps in the first block's first weights."""
    found = {}
    for stage, recompute in WAYS:
        gathered = (
            {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}}
            if stage == 3
            else {}
        )
        cfg = ParallelConfig(zero_stage=stage, precision="fp32", activation_checkpointing=recompute, deepspeed=gathered)
        engine = build(mesh, cfg)
        run_steps(engine, range(1))
        if mesh.rank == 1:
            first = engine.module.blocks[0].attn.wq
            first.forward = lambda x, forward=first.forward: (time.sleep(SLEEP_S), forward(x))[1]
        mesh.barrier()
        engine.own_time.take_s()
        began = time.perf_counter()
        run_steps(engine, range(1, 2))
        found[stage, recompute] = engine.own_time.take_s(), time.perf_counter() - began
        with engine.evaluating() as module:
            module(torch.zeros(1, 16, dtype=torch.int64))
        assert engine.own_time.take_s() == 0.0, "evaluation is no step"
        engine.close()
    return found


@pytest.mark.slow
def test_waiting_for_another_rank_is_not_in_it_whatever_the_sharding():
    fast, slow = run_ranks(2, time_all)
    for way in WAYS:
        assert slow[way][0] > 2 * SLEEP_S, way  # in each of two micro-batches
        assert fast[way][1] > 2 * SLEEP_S, way  # so long it waited
        assert fast[way][0] < slow[way][0] / 2, (way, fast[way], slow[way])


class DeviceEvent:
    """Tells the time of its device, which is behind the host."""

    made = 0
    clock_ms = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        DeviceEvent.made += 1
        self.over = False

    def record(self):
        DeviceEvent.clock_ms += 250.0
        self.at_ms, self.over = DeviceEvent.clock_ms, False

    def synchronize(self):
        self.over = True

    def elapsed_time(self, later):
        assert later.at_ms > self.at_ms
        return later.at_ms - self.at_ms


class Accelerator:
    Event = DeviceEvent


def test_a_device_tells_its_time_by_its_own_events(monkeypatch):
    """As CUDA's, whose kernels run after the host has gone on; they are made once and used again."""
    monkeypatch.setattr(own_time, "get_accelerator", Accelerator)
    monkeypatch.setattr(DeviceEvent, "made", 0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    whole, parts = OwnTime(model, 2), OwnTime(model, 3)
    for _ in range(2):
        for _ in range(3):
            model(next(model.parameters()))
        assert whole.take_s() == pytest.approx(3 * 1.25)  # its own end, and those of the two within
        assert parts.take_s() == pytest.approx(6 * 0.25)
        assert DeviceEvent.made == 18
        assert (whole.take_s(), parts.take_s()) == (0.0, 0.0)


def test_only_the_first_stretches_of_a_step_are_timed(monkeypatch):
    monkeypatch.setattr(own_time, "get_accelerator", Accelerator)
    model = nn.Linear(2, 2)
    timer = OwnTime(model, 0)
    for _ in range(AT_MOST + 10):
        model(model.weight)
    assert timer.take_s() == pytest.approx(AT_MOST * 0.25)


def test_a_module_whose_forward_is_broken_off_is_left_out(monkeypatch):
    """Recomputation leaves a module in its midst when it has all it needs; also just before what is timed is full."""
    monkeypatch.setattr(own_time, "get_accelerator", Accelerator)
    model = nn.Linear(2, 2)
    timer, forward = OwnTime(model, 3), model.forward
    for rest in (5, 0):
        for _ in range(AT_MOST - rest):
            model(model.weight)
        model.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(model.weight)
        model.forward = forward
        DeviceEvent.clock_ms += 1e6
        for _ in range(10):
            model(model.weight)
        assert timer.take_s() == pytest.approx(AT_MOST * 0.25)
