"""Peak memory and loss for each ZeRO stage, number of ranks and kind of activation checkpointing.

    python tests/benchmarks/memory.py [--stages 0 1 2 3] [--ranks 1 2] [--modes none full every_k selective]

Each row is a job of its own: a Llama-style d256 L8 T512 model, 8 sequences a step, one micro-batch, bf16. Memory is
the largest resident size of any rank over what it had before the engine was built; on accelerators, allocated tensors.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, SEQUENCES = 3, 8


def worker(stage: int, mode: str) -> None:
    import resource

    import torch

    from data.loader import StepBatch
    from launcher.pretrain import train_step
    from model.config import ModelConfig
    from model.init import initial_values
    from model.transformer import Transformer
    from parallel import device
    from parallel.checkpoint import ZeroMoments
    from parallel.config import OptimConfig, ParallelConfig
    from parallel.deepspeed_config import deepspeed_config
    from parallel.engine import parallelize
    from parallel.mesh import build_mesh, close_mesh, place_from_environment

    model = ModelConfig(vocab_size=2048, seq_len=512, d_model=256, n_layers=8, n_heads=4, d_ff=704)
    cfg = ParallelConfig(zero_stage=stage, activation_checkpointing=mode)
    optim = OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant")
    mesh = build_mesh(place_from_environment(os.environ), 300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    micro = SEQUENCES // mesh.dp_size
    ds = deepspeed_config(cfg, micro_batch_size=micro, grad_accum_steps=1, dp_size=mesh.dp_size, grad_clip=1.0)
    engine = parallelize(lambda: Transformer(model), cfg, optim, ds, mesh)
    shapes = engine.shapes
    engine.load_state(ZeroMoments(lambda n, a, b: initial_values(n, shapes[n], model, 0, a, b)), adam_steps=0)
    for step in range(STEPS):
        windows = torch.randint(0, 2048, (SEQUENCES, 513), generator=torch.Generator().manual_seed(step))
        mine = windows.view(mesh.dp_size, 1, micro, 513)[mesh.dp_rank]
        tokens, targets = mine[..., :-1].contiguous(), mine[..., 1:].contiguous()
        batch = StepBatch(tokens, targets, None, None, (0, SEQUENCES), SEQUENCES * 512, digest=0)
        stats = train_step(engine, batch, batch.n_targets, optim.lr)
        loss = mesh.sum([sum(x.item() for x in stats.losses)])[0] / batch.n_targets
    used = device.peak_mem_gib()
    mib = used * 1024 if used is not None else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    peaks = mesh.gather(mib)
    if mesh.rank == 0:
        print("RESULT", json.dumps({"loss": loss, "peak_mib": max(peaks)}), flush=True)
    close_mesh()  # or the group's threads may abort the process as it ends


def measure(stage: int, ranks: int, mode: str) -> dict[str, float]:
    """{"loss": after STEPS steps, "peak_mib": largest of the ranks}."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
               "--worker", str(stage), mode]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    modes = ["none", "full", "every_k", "selective"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(int(args.worker[0]), args.worker[1])
        return
    print("| ZeRO | ranks | activation checkpointing | loss after 3 steps | peak MiB a rank |\n|---|---|---|---|---|")
    for stage in args.stages:
        for ranks in args.ranks:
            for mode in args.modes:
                row = measure(stage, ranks, mode)
                print(f"| {stage} | {ranks} | {mode} | {row['loss']:.5f} | {row['peak_mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
