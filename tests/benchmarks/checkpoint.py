"""Cell G: what a save every 10 of 60 steps adds to the wall time, ours beside torch's asynchronous checkpoint (DCP).

    OMP_NUM_THREADS=2 python tests/benchmarks/checkpoint.py [--pairs 5] [--folder FOLDER]

Some 300 MB of state (25M parameters, fp32 weights and two moments), one rank. Ours: the engine with ZeRO 1 and
CheckpointWriter. DCP: a plain torch loop of the same model and torch.distributed.checkpoint.async_save of masters and
optimizer, which also waits for its last save. Every run is a fresh process, with saves and without, in turns; the added
wall time of a save is the difference over six saves, the last of which is waited for. Also the seconds to read one back.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 10
SIDES = ("ours", "dcp")


def setup(side: str, folder: Path) -> tuple[Any, Callable[[int], float], Callable[[], None], Callable[[], None]]:
    """(the side, save(step) -> seconds that it waited, wait(), load())."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import train_step

    train_step.MODEL = train_step.ModelConfig(
        vocab_size=8192, seq_len=64, d_model=512, n_layers=5, n_heads=8, d_ff=1536
    )
    train_step.SEQUENCES = 4
    if side == "ours":
        from parallel.checkpoint import CheckpointReader, Manifest, faults, folder_name
        from parallel.checkpoint_writer import CheckpointWriter
        from parallel.config import CheckpointConfig

        ours = train_step.Ours(zero_stage=1)
        writer = CheckpointWriter(folder, ours.mesh, CheckpointConfig(keep=1))
        shapes = {name: list(shape) for name, shape in ours.engine.shapes.items()}

        def save(step: int) -> float:
            return writer.save(ours.engine, Manifest(step, step, 1, 1, shapes, {}, {}, {}))

        def wait() -> None:
            outcome = writer.wait()
            assert outcome is None or outcome.error is None, outcome

        def load() -> None:
            path = folder / folder_name(writer.committed_step)
            assert faults(path) == []
            reader = CheckpointReader(path)
            ours.engine.load_state(reader, reader.manifest.adam_steps)

        return ours, save, wait, load

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plain = train_step.PlainLoop(torch.device("cpu"))
    running: list[Any] = []

    def state() -> dict[str, Any]:
        return {"weights": plain.masters, "optimizer": plain.optimizer.state_dict()}

    def save_dcp(step: int) -> float:
        began = time.perf_counter()
        wait_dcp()
        if step > EVERY:
            shutil.rmtree(folder / str(step - 2 * EVERY), ignore_errors=True)
        running.append(dcp.async_save(state(), checkpoint_id=folder / str(step)))
        return time.perf_counter() - began

    def wait_dcp() -> None:
        while running:
            running.pop().result()

    def load_dcp() -> None:
        dcp.load(state(), checkpoint_id=max(folder.iterdir(), key=lambda path: int(path.name)))

    return plain, save_dcp, wait_dcp, load_dcp


def job(name: str, saves: bool, folder: Path) -> dict[str, float]:
    import torch

    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    side, save, wait, load = setup(name, folder)
    import train_step

    generator = torch.Generator().manual_seed(0)
    shape = (train_step.SEQUENCES, train_step.MODEL.seq_len)
    tokens = torch.randint(0, train_step.MODEL.vocab_size, shape, generator=generator)
    for _ in range(5):
        side.step(tokens, tokens)
    began, stalls = time.perf_counter(), []
    for step in range(1, STEPS + 1):
        side.step(tokens, tokens)
        if saves and step % EVERY == 0:
            stalls.append(save(step))
    wait()
    wall, result = time.perf_counter() - began, {}
    if saves:
        newest = max((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        n_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        began = time.perf_counter()
        load()
        result = {"stall_s": statistics.median(stalls), "bytes": n_bytes, "load_s": time.perf_counter() - began}
    return {"wall_s": wall, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints are written")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(job(args.job[0], args.job[1] == "saves", Path(args.job[2]))), flush=True)
        os._exit(0)
    added: dict[str, list[float]] = {side: [] for side in SIDES}
    others: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for pair in range(args.pairs):
        for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
            walls = {}
            for saves in ("none", "saves") if pair % 2 == 0 else ("saves", "none"):
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    done = subprocess.run(
                        [sys.executable, __file__, "--job", side, saves, folder],
                        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
                    )  # fmt: skip
                if done.returncode:
                    raise RuntimeError(f"{side} {saves} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
                result = json.loads(done.stdout.splitlines()[-1])
                walls[saves] = result["wall_s"]
                if saves == "saves":
                    others[side].append(result)
            added[side].append((walls["saves"] - walls["none"]) / (STEPS // EVERY))
            print(f"pair {pair}: {side} {walls} {others[side][-1]}", file=sys.stderr, flush=True)
    for side in SIDES:
        middle = {key: statistics.median(r[key] for r in others[side]) for key in ("stall_s", "bytes", "load_s")}
        print(
            f"{side}: a save adds {statistics.median(added[side]):.3f} s of wall time ({min(added[side]):.3f} to "
            f"{max(added[side]):.3f}), training waits {middle['stall_s']:.3f} s; {middle['bytes'] / 1e6:.0f} MB on disk; "
            f"read back in {middle['load_s']:.2f} s"
        )
    ratios = [a / b for a, b in zip(added["ours"], added["dcp"], strict=True)]
    print(f"ours / dcp, added wall time: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
