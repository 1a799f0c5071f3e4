"""Cell A: tokens/s of our train step beside a plain torch loop of the same model, interleaved in one process.

    OMP_NUM_THREADS=2 python tests/benchmarks/train_step.py [--pairs 7] [--steps 6] [--zero-stage 1]

Both sides: bf16 weights, fp32 masters, fused AdamW, clipping, the same model, batch and loss. Prints each pair's ratio
and the median, the share of the matrix-product roof, and how far the roof moved from the first to the last measurement.
"""

import argparse
import copy
import os
import resource
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import StepBatch
from launcher.pretrain import train_step
from model.config import ModelConfig
from model.init import initial_values
from model.transformer import Transformer
from parallel.checkpoint import ZeroMoments
from parallel.config import OptimConfig, ParallelConfig
from parallel.deepspeed_config import deepspeed_config
from parallel.engine import parallelize
from parallel.mesh import build_mesh, place_from_environment
from parallel.optim import build_adamw

MODEL = ModelConfig(vocab_size=8192, seq_len=512, d_model=384, n_layers=6, n_heads=6, d_ff=1024)
SEQUENCES = 8
OPTIM = OptimConfig(lr=3e-4, warmup_steps=0, schedule="constant", grad_clip=1.0)


class PlainLoop:
    """What a careful person writes without a library: bf16 model, fp32 masters, foreach copies, fused AdamW."""

    def __init__(self, device: torch.device) -> None:
        self.model = Transformer(MODEL).init_weights(0).to(device, torch.bfloat16)
        self.weights = list(self.model.parameters())
        masters = copy.deepcopy(self.model).float()
        self.masters = list(masters.parameters())
        self.optimizer = build_adamw(masters.named_parameters(), OPTIM, checked=False)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        loss = self.model(tokens, targets) / targets.numel()
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, OPTIM.grad_clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.item()


class Ours:
    def __init__(self, zero_stage: int) -> None:
        cfg = ParallelConfig(zero_stage=zero_stage)
        self.mesh = build_mesh(place_from_environment(os.environ), cfg.timeout_s)
        ds = deepspeed_config(
            cfg, micro_batch_size=SEQUENCES, grad_accum_steps=1, dp_size=self.mesh.dp_size, grad_clip=OPTIM.grad_clip
        )
        self.engine = parallelize(lambda: Transformer(MODEL), cfg, OPTIM, ds, self.mesh)
        shapes = self.engine.shapes
        self.engine.load_state(ZeroMoments(lambda n, a, b: initial_values(n, shapes[n], MODEL, 0, a, b)), adam_steps=0)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        batch = StepBatch(
            tokens=tokens[None],
            targets=targets[None],
            samples=np.zeros((1, SEQUENCES), np.int64),
            documents=None,
            span=(0, SEQUENCES),
            n_targets=targets.numel(),
            digest=0,
        )
        return float(train_step(self.engine, batch, batch.n_targets, OPTIM.lr).losses[0]) / batch.n_targets


def roof(device: torch.device) -> float:
    """FLOP/s of the model's own largest matrix product, bf16, random data; the best of a few."""
    n, d, f = SEQUENCES * MODEL.seq_len, MODEL.d_model, MODEL.d_ff
    a = torch.randn(n, d, device=device).bfloat16()
    b = torch.randn(d, f, device=device).bfloat16()
    times = []
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append((time.perf_counter() - began) / 4)
    return 2 * n * d * f / min(times)


def timed(side: PlainLoop | Ours, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float, list[float]]:
    """Seconds, CPU seconds and losses of one step per batch."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    losses = [side.step(*batch) for batch in batches]
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="steps a side in each pair")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    args = parser.parse_args()
    ours = Ours(args.zero_stage)
    device = ours.mesh.device
    plain = PlainLoop(device)
    generator = torch.Generator().manual_seed(0)

    def batches(count: int) -> list[tuple[Tensor, Tensor]]:
        made = []
        for _ in range(count):
            windows = torch.randint(0, MODEL.vocab_size, (SEQUENCES, MODEL.seq_len + 1), generator=generator).to(device)
            made.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
        return made

    warm = batches(3)
    timed(plain, warm)
    timed(ours, warm)
    first_roof = roof(device)
    ratios, cpu_ratios, speeds = [], [], []
    for pair in range(args.pairs):
        work = batches(args.steps)
        sides = [(plain, ours), (ours, plain)][pair % 2]
        results = {side: timed(side, work) for side in sides}
        (a, a_cpu, a_losses), (b, b_cpu, b_losses) = results[plain], results[ours]
        ratios.append(a / b)
        cpu_ratios.append(b_cpu / a_cpu)
        speeds.append(args.steps * SEQUENCES * MODEL.seq_len / b)
        print(f"pair {pair}: plain {a:.2f} s, ours {b:.2f} s, ours/plain speed {a / b:.3f}; "
              f"last losses {a_losses[-1]:.4f} {b_losses[-1]:.4f}")  # fmt: skip
    last_roof = roof(device)
    tokens_per_s = statistics.median(speeds)
    share = tokens_per_s * MODEL.flops_per_token(MODEL.seq_len) / first_roof
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, ZeRO {args.zero_stage}: median of paired speed "
        f"ratios {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}), CPU seconds ratio "
        f"{statistics.median(cpu_ratios):.3f}; ours {tokens_per_s:,.0f} tokens/s, {share:.0%} of the roof of "
        f"{first_roof / 1e9:.0f} GFLOP/s, which moved {last_roof / first_roof - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
