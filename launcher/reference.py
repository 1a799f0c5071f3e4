"""What the model that a preference tuning began with makes of the pairs: log-probabilities, computed once and kept.

So a run needs its origin no more once it has begun. runs/NAME/reference.safetensors holds them for the pairs trained on and
those held out, (n, 2) fp32 in the order of the rows, by the fingerprint of these; the data's cursor in every checkpoint has
the hash of the file.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data.errors import DataError
from data.row_loader import RowSet, eval_rows
from parallel.checkpoint import file_hash, sync

if TYPE_CHECKING:
    from parallel.engine import Engine  # which costs DeepSpeed; reading does not need it

FILE = "reference.safetensors"


def compute(engine: "Engine", rows: RowSet, batch_size: int, enter: Callable[[], None]) -> Tensor:
    """(n, 2) fp32, the same on every rank, by the engine's model as it is. All ranks call it.

    enter: called before each forward pass.
    """
    mesh, mine = engine.mesh, list[tuple[int, float, float]]()
    with engine.evaluating() as model:
        for numbers, batch in eval_rows(rows, batch_size, mesh.dp_rank, mesh.dp_size):
            enter()
            pairs = model(*(part.to(mesh.device) for part in batch if part is not None)).cpu().tolist()
            mine += [(number, *pair) for number, pair in zip(numbers, pairs, strict=False)]
    found = torch.empty(len(rows.rows), 2)
    for number, chosen, rejected in (each for of_rank in mesh.gather(mine) for each in of_rank):
        found[number] = torch.tensor([chosen, rejected])
    return found


def keep(run_dir: Path, found: dict[str, Tensor]) -> str:
    """Write the file whole or not at all; returns its hash."""
    staging = run_dir / f"{FILE}.tmp"
    staging.write_bytes(save({name: tensor.contiguous() for name, tensor in found.items()}))
    sync(staging)
    os.replace(staging, run_dir / FILE)
    sync(run_dir)
    return file_hash(run_dir / FILE)


def read(run_dir: Path, cursor: dict[str, Any]) -> dict[str, Tensor]:
    """What was kept. cursor: of a checkpoint. Raises DataError where it is gone or another."""
    path = run_dir / FILE
    try:
        if (digest := file_hash(path)) == cursor.get("reference"):
            return load_file(path)
        wrong = f"its xxh3 is {digest}, and the checkpoint says {cursor.get('reference')}"
    except (OSError, safetensors.SafetensorError) as error:
        wrong = str(error)
    raise DataError(
        f"{path}, what the model made of the pairs before its first step, cannot be used: {wrong}. Restore it, or begin a "
        "new run under another run.name"
    )
