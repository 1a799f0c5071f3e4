"""Folders of runs that no training has made, in the formats of real ones; and what changes one number in them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from launcher.read_log import RECORD, path_of
from parallel.checkpoint import Manifest, file_hash, folder_name, manifest_text
from parallel.state import KINDS

SHAPES = {"embed": [4, 3], "norm": [5]}
RANKS, BATCH = 2, 8


def make_run(run_dir: Path, steps: int, starts: tuple[int, ...] = (0,)) -> Path:
    """A run whose n-th start went on from starts[n] and was killed two steps after the next one's beginning."""
    run_dir.mkdir(parents=True)
    ends = [*(min(start + 2, steps) for start in starts[1:]), steps]
    for number, (first, last) in enumerate(zip(starts, ends, strict=True), 1):
        add_event(run_dir, event="start", number=number, step=first, dp_size=RANKS)
        for rank in range(RANKS):
            rows = [(s, BATCH * (s - 1), BATCH * s, 1000 * s + rank) for s in range(first + 1, last + 1)]
            path_of(run_dir, number, rank).parent.mkdir(exist_ok=True)
            path_of(run_dir, number, rank).write_bytes(np.array(rows, dtype=RECORD).tobytes())
    add_event(run_dir, event="stopped", step=steps, signal=None)
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            values = {
                "loss/train": 7 / step,
                "optim/grad_norm": 1 / 3,
                "speed/tokens_per_s": float(np.random.rand()),
                "goodput/goodput": float(np.random.rand()),
            }
            print(json.dumps({"step": step, **values}), file=file)
            print(json.dumps({"step": step, "data/epochs_text": 0.1 * step}), file=file)
        print(json.dumps({"step": steps, "loss/valid": 2.5}), file=file)
    write_checkpoint(run_dir, steps, {(kind, name): made_tensor(kind, name) for kind in KINDS for name in SHAPES})
    return run_dir


def made_tensor(kind: str, name: str) -> torch.Tensor:
    n = torch.Size(SHAPES[name]).numel()
    return torch.arange(n, dtype=torch.float32) / 7 + KINDS.index(kind)


def add_event(run_dir: Path, **event: object) -> None:
    with open(run_dir / "ledger.jsonl", "a") as file:
        print(json.dumps({"time": 0.0, **event}), file=file)


def write_checkpoint(run_dir: Path, step: int, tensors: dict[tuple[str, str], torch.Tensor], **changes: object) -> None:
    """changes: to the manifest."""
    path = run_dir / "checkpoints" / folder_name(step)
    path.mkdir(parents=True, exist_ok=True)
    file = path / "rank-00000.safetensors"
    save_file({f"{kind}:{name}:0": tensor for (kind, name), tensor in tensors.items()}, file)
    fields = {
        "step": step, "adam_steps": step, "world_size": RANKS, "zero_stage": 1, "shapes": SHAPES,
        "files": {file.name: {"bytes": file.stat().st_size, "xxh3": file_hash(file)}},
        "cursor": {"samples": BATCH * step}, "config": {},
        "totals": {"tokens": 100 * step, "losses": [1.5, 3.5], "train_s": np.random.rand()},
    }  # fmt: skip
    (path / "manifest.json").write_text(manifest_text(Manifest(**{**fields, **changes})))


def change_tensor(checkpoint: Path, key: str, element: int, by: float) -> tuple[float, float]:
    """Add to one number of a checkpoint and put the hashes right; (value before, value after). key: as in its file."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            before = tensors[key][element].item()
            tensors[key][element] += by
            save_file(tensors, file)
            put_manifest_right(checkpoint)
            return before, tensors[key][element].item()
    raise KeyError(key)


def put_manifest_right(checkpoint: Path) -> None:
    """Have the manifest vouch for the files as they are."""
    raw = json.loads((checkpoint / "manifest.json").read_text())
    raw.pop("xxh3")
    for name in raw["files"]:
        raw["files"][name] = {"bytes": (checkpoint / name).stat().st_size, "xxh3": file_hash(checkpoint / name)}
    (checkpoint / "manifest.json").write_text(manifest_text(Manifest(**raw)))


def change_metric(run_dir: Path, step: int, name: str, by: float) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [line for line in lines if line["step"] == step and name in line]
    assert len(found) == 1, f"{name} of step {step} is there {len(found)} times"
    found[0][name] += by
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def change_read(run_dir: Path, start: int, rank: int, step: int, name: str) -> None:
    """Change a field of the record of a step by one."""
    path = path_of(run_dir, start, rank)
    rows = np.frombuffer(path.read_bytes(), dtype=RECORD).copy()
    rows[name][rows["step"] == step] += 1
    path.write_bytes(rows.tobytes())
