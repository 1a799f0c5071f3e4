"""A checkpoint of step 0, in the format of parallel/checkpoint.py: weights that were made elsewhere.

It holds no moments: AdamW has made no update, so they are zero. The weights are in memory a file at a time.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from parallel.checkpoint import Manifest, folder_name, manifest_text, sync, write_synced
from parallel.checkpoint_writer import write_safetensors
from parallel.state import WEIGHT

FILE_BYTES = 2**30  # of a file, unless one tensor is larger


def write_step_zero(folder: Path, manifest: Manifest, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write the checkpoint into `folder`, which no run uses yet.

    manifest: without its files.    weights: (name, whole tensor on the host, fp32) of each of manifest.shapes.
    Raises ValueError for a weight that is not finite.
    """
    assert manifest.step == 0
    path = folder / folder_name(0)
    path.mkdir(parents=True)
    files: dict[str, dict[str, int | str]] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        file = path / f"weights-{len(files):05d}.safetensors"
        digest = write_safetensors(file, held)
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "xxh3": digest}
        held.clear()

    for name, tensor in weights:
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite; a model with such weights cannot be trained")
        if held and sum(4 * t.numel() for t in held.values()) + 4 * tensor.numel() > FILE_BYTES:
            write()
        held[f"{WEIGHT}:{name}:0"] = tensor.contiguous().view(-1)
    write()
    write_synced(path / "manifest.json", manifest_text(replace(manifest, files=files)))
    write_synced(folder / "latest", path.name + "\n")
