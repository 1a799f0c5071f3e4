"""Real DeepSpeed ranks for tests: processes that meet through a file, so no port is guessed."""

import faulthandler
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

from data.loader import StepBatch
from launcher.pretrain import leave, train_step
from model.config import ModelConfig
from model.init import initial_values
from model.lora import plain_name
from model.transformer import Transformer
from parallel.checkpoint import Manifest, ZeroMoments
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig, OptimConfig, ParallelConfig
from parallel.deepspeed_config import deepspeed_config
from parallel.engine import Engine, parallelize
from parallel.mesh import Mesh, Place, build_mesh, close_mesh
from parallel.state import KINDS, Fragment

# Small, but with what could go wrong: tied weights, grouped heads, vectors that do not divide, parameters both under and
# over ZeRO 3's threshold for keeping them whole (100,000 elements), biases, which ZeRO 3 adds in place.
MODEL = ModelConfig(
    vocab_size=997,
    seq_len=16,
    d_model=108,
    n_layers=3,
    n_heads=6,
    n_kv_heads=3,
    d_ff=150,
    tie_embeddings=True,
    qk_norm=True,
    attention_bias=True,
    mlp_bias=True,
)
BATCH, ACCUM = 12, 2
# eps of 1e-5: with the usual 1e-8 AdamW turns rounding noise in near-zero gradients into steps of the size of lr.
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant", grad_clip=0.5, eps=1e-5)


def run_ranks(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(mesh, *args) in n processes; what each returned, by rank. A failure in any rank fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (n, folder, fn, args), nprocs=n)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(n)]


def _enter(rank: int, n: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    faulthandler.enable()  # native code that aborts says nothing else
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    mesh = build_mesh(Place(rank, n, rank, n, f"file://{folder}/store", "a test"), timeout_s=100)
    torch.save(fn(mesh, *args), Path(folder) / f"{rank}.pt")
    close_mesh()
    leave(0)


def config_of(stage: int, precision: str, offload: str) -> ParallelConfig:
    """offload: what is in host memory, none, optimizer, param or both."""
    return ParallelConfig(
        zero_stage=stage,
        precision=precision,
        offload_optimizer="cpu" if offload in ("optimizer", "both") else "none",
        offload_param="cpu" if offload in ("param", "both") else "none",
    )


def build(
    mesh: Mesh,
    cfg: ParallelConfig,
    model: ModelConfig = MODEL,
    accum: int = ACCUM,
    optim: OptimConfig = OPTIM,
    build_model: Callable[[ModelConfig], nn.Module] = Transformer,
) -> Engine:
    micro = BATCH // accum // mesh.dp_size
    ds = deepspeed_config(
        cfg, micro_batch_size=micro, grad_accum_steps=accum, dp_size=mesh.dp_size, grad_clip=optim.grad_clip
    )
    engine = parallelize(lambda: build_model(model), cfg, optim, ds, mesh)
    shapes = engine.shapes
    source = ZeroMoments(lambda name, a, b: initial_values(plain_name(name), shapes[name], model, 5, a, b))
    engine.load_state(source, adam_steps=0)
    return engine


def batch_of(mesh: Mesh, step: int, accum: int = ACCUM, vocab_size: int = MODEL.vocab_size) -> StepBatch:
    """This rank's part of a step's batch; the step's samples do not depend on the number of ranks."""
    g = torch.Generator().manual_seed(step)
    windows = torch.randint(0, vocab_size, (BATCH, MODEL.seq_len + 1), generator=g)
    windows = windows.view(accum, mesh.dp_size, -1, MODEL.seq_len + 1)[:, mesh.dp_rank]
    samples = np.arange(BATCH).reshape(accum, mesh.dp_size, -1)[:, mesh.dp_rank]
    targets = windows[..., 1:].clone()
    targets[samples % 5 == 0, : MODEL.seq_len // 2] = -100  # ranks with different numbers of targets
    counted = BATCH * MODEL.seq_len - len(range(0, BATCH, 5)) * (MODEL.seq_len // 2)
    tokens = windows[..., :-1].contiguous()
    return StepBatch(tokens, targets.contiguous(), None, samples, (0, BATCH), counted, digest=0)


def run_steps(
    engine: Engine, steps: range, accum: int = ACCUM, vocab_size: int = MODEL.vocab_size, judge: Any = None
) -> list[tuple[float, float, bool]]:
    """(loss, gradient norm, skipped) of each step."""
    results = []
    for step in steps:
        torch.manual_seed(step * 10 + engine.mesh.dp_rank)
        batch = batch_of(engine.mesh, step, accum, vocab_size)
        stats = train_step(engine, batch, batch.n_targets, OPTIM.lr, judge)
        results.append((stats.loss, stats.update.grad_norm, not stats.update.made))
    return results


def whole_state(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> whole flattened fp32 values, put together from what every rank owns."""
    mine = [(f.name, f.kind, f.start, f.tensor.clone()) for f in engine.owned_fragments()]
    whole = {}
    for part in engine.mesh.gather(mine):
        for name, kind, start, values in part:
            size = torch.Size(engine.shapes[name]).numel()
            tensor = whole.setdefault((name, kind), torch.full((size,), torch.nan))
            assert tensor[start : start + len(values)].isnan().all(), f"two ranks own a part of {name}"
            tensor[start : start + len(values)] = values
    assert not any(tensor.isnan().any() for tensor in whole.values()), "no rank owns some part"
    return whole


def manifest_of(engine: Engine, step: int, **more: Any) -> Manifest:
    shapes = {name: list(shape) for name, shape in engine.shapes.items()}
    return Manifest(step, engine.adam_steps, engine.mesh.world_size, engine.zero_stage, shapes, {}, {}, {}, **more)


def save(folder: Path, engine: Engine, step: int) -> None:
    """Write a checkpoint and wait for it; none is retired."""
    writer = CheckpointWriter(folder, engine.mesh, CheckpointConfig(keep=0))
    writer.save(engine, manifest_of(engine, step, loss_scaler=engine.loss_scaler_state()))
    outcome = writer.wait()
    assert outcome is not None
    assert outcome.error is None, outcome.error


class Alone:
    """What checkpoints need of a mesh, in one process without a process group."""

    rank, world_size = 0, 1

    def in_background(self) -> "Alone":
        return self

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


class LoneEngine:
    """What a save needs of an engine: one parameter of four elements."""

    mesh = Alone()
    shapes = {"w": (4,)}
    zero_stage, adam_steps = 1, 1

    def __init__(self) -> None:
        self.state = {kind: torch.arange(4.0) for kind in KINDS}

    def loss_scaler_state(self) -> None:
        return None

    def owned_fragments(self) -> list[Fragment]:
        return [Fragment("w", kind, 0, tensor) for kind, tensor in self.state.items()]
