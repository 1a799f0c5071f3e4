"""Writing checkpoints beside the training: the step waits for a copy in host memory, a thread does the rest.

The thread of every rank writes that rank's file; the threads agree among themselves, over a process group of their own,
and rank 0's commits what all of them have written (the format: parallel/checkpoint.py). Nothing that goes wrong with a
disk ends the training: the staging folder is removed, every rank learns of it alike, and the run tries again later.

A staging folder carries a key of its writer's: a job that was stopped for a while, lost the run to another and wakes in
the middle of a save touches no folder but its own.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from parallel.checkpoint import (
    Manifest,
    committed_steps,
    folder_name,
    free_name,
    manifest_text,
    shard_name,
    sync,
    write_synced,
)
from parallel.config import CheckpointConfig
from parallel.retention import retire
from parallel.state import Fragment

if TYPE_CHECKING:
    from parallel.engine import Engine  # which costs DeepSpeed; writing weights alone does not need it
    from parallel.mesh import Mesh

log = logging.getLogger(__name__)

SPARE_BYTES = 64 * 2**20  # beyond a checkpoint's own size, for manifest, logs and metrics


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every rank."""

    step: int
    path: Path
    n_bytes: int  # of all ranks together
    write_s: float  # of the thread, from the copy to the commit
    error: str | None = None  # None: committed
    not_finite: bool = False  # the weights or moments are broken, not the disk


class SaveFailed(Exception):
    """A save that some rank could not do its part of; the text is the same on every rank."""

    def __init__(self, text: str, not_finite: bool = False) -> None:
        super().__init__(text)
        self.not_finite = not_finite


class CheckpointWriter:
    """Writes one checkpoint at a time under `folder`. All ranks make the same calls.

    on_done: called in the thread, on every rank, when a save has ended.    before_commit: called in it on every rank,
    before it writes and again before the commit; raises OSError where this job must not write, or cannot.
    best_step: of the best checkpoint so far, which always stays; a later one is known by `best_step` of its own totals.
    """

    def __init__(
        self,
        folder: Path,
        mesh: "Mesh",
        cfg: CheckpointConfig,
        on_done: Callable[[Outcome], None] = lambda outcome: None,
        before_commit: Callable[[], None] = lambda: None,
        best_step: int = 0,
    ) -> None:
        self.folder, self.cfg = folder, cfg
        self.failures = 0  # saves that have failed so far, as far as this rank knows
        self._mesh, self._on_done, self._before_commit = mesh.in_background(), on_done, before_commit
        self._key, self.committed_step = mesh.broadcast((secrets.token_hex(4), max(committed_steps(folder), default=0)))
        self._best_step = best_step
        self._verified = self.committed_step  # the resume has compared it with its hashes, as nobody has the later ones
        self._copy: dict[str, torch.Tensor] = {}  # kept between saves: new memory costs more than the copy
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    def save(self, engine: "Engine", manifest: Manifest) -> float:
        """Begin to write `manifest.step`, after the last save has ended. Returns the seconds that training waited."""
        began = time.perf_counter()
        self.wait()
        copied = self._snapshot(engine.owned_fragments())
        self._thread = threading.Thread(
            target=self._run, args=(manifest, copied), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        return time.perf_counter() - began

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Wait until the save under way has ended, if there is one. Returns the outcome of the last save."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._outcome

    def _snapshot(self, fragments: list[Fragment]) -> dict[str, torch.Tensor]:
        """Copies on the host, by name in the file; (n,) each."""
        pinned, copied = torch.accelerator.is_available(), {}
        for f in fragments:
            name = f"{f.kind}:{f.name}:{f.start}"
            room = self._copy.get(name)
            if room is None or room.shape != f.tensor.shape:
                room = torch.empty(f.tensor.shape, dtype=f.tensor.dtype, pin_memory=pinned)
            copied[name] = room.copy_(f.tensor.detach(), non_blocking=True)
        if pinned:
            torch.accelerator.synchronize()
        self._copy = copied
        return copied

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, manifest: Manifest, copied: dict[str, torch.Tensor]) -> None:
        began = time.perf_counter()
        path, n_bytes, error, not_finite = self.folder / folder_name(manifest.step), 0, None, False
        try:
            n_bytes = self._write(manifest, copied, path)
        except SaveFailed as failed:
            error, not_finite = str(failed), failed.not_finite
        except Exception as broken:  # a peer that is gone, above all: the training will meet it, too
            error = f"{type(broken).__name__}: {broken}"
            log.exception("the thread that writes checkpoints broke")
        self._outcome = Outcome(manifest.step, path, n_bytes, time.perf_counter() - began, error, not_finite)
        if error is None:
            self.committed_step = manifest.step
        else:
            self.failures += 1
        self._on_done(self._outcome)

    def _write(self, manifest: Manifest, copied: dict[str, torch.Tensor], final: Path) -> int:
        first = self._mesh.rank == 0
        staging = final.with_name(f"{final.name}.{self._key}.staging")
        n_bytes = sum(self._together("looking at", lambda: _finite_bytes(copied)))
        try:
            self._together("preparing", lambda: self._prepare(staging, n_bytes))
            entries = self._together("writing", lambda: self._write_shard(staging, copied))
            whole = Manifest(**{**asdict(manifest), "files": dict(entries)})
            self._together("committing", lambda: self._commit(staging, final, whole) if first else None)
        except SaveFailed:
            if first:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if manifest.totals.get("best_step") == manifest.step:
            self._best_step = manifest.step
        if first:
            try:
                retire(self.folder, self.cfg, stay=frozenset([self._verified, self._best_step]))
            except OSError as error:  # on this rank alone: the save has not failed for it
                log.warning("old checkpoints in %s are not removed for now: %s", self.folder, error)
        return n_bytes

    def _together(self, doing: str, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on this rank and gather what every rank got; a failure of one is a SaveFailed on all."""
        try:
            outcome: tuple[Any, str | None, bool] = (work(), None, False)
        except NotFinite as error:
            outcome = (None, str(error), True)
        except Exception as error:  # of any kind: a rank that left here would leave the others waiting for it
            outcome = (None, f"{type(error).__name__}: {error}", False)
        outcomes = self._mesh.gather(outcome)
        failed = [(rank, text) for rank, (_, text, _) in enumerate(outcomes) if text is not None]
        if failed:
            raise SaveFailed(
                f"{doing} the checkpoint failed on {len(failed)} of {self._mesh.world_size} ranks; rank {failed[0][0]}: "
                f"{failed[0][1]}",
                not_finite=any(broken for *_, broken in outcomes),
            )
        return [value for value, *_ in outcomes]

    def _prepare(self, staging: Path, n_bytes: int) -> None:
        leftovers = list(self.folder.glob("step-*.staging")) if self._mesh.rank == 0 else []
        self._before_commit()  # so what was listed before it is of saves that were killed, and of no successor's
        if self._mesh.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in leftovers:
            try:
                shutil.rmtree(leftover)
            except OSError as error:  # NFS keeps what a process has open; no save may fail for that
                log.warning("cannot remove %s, left by a save that was killed: %s", leftover, error)
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes + SPARE_BYTES:
            raise OSError(
                errno.ENOSPC,
                f"{self.folder} has {free / 1e9:.3f} GB free, the checkpoint takes {n_bytes / 1e9:.3f} GB and "
                f"{SPARE_BYTES / 1e9:.3f} GB are kept free; make room, or keep fewer with checkpoint.keep",
            )
        staging.mkdir()

    def _write_shard(self, staging: Path, copied: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
        written = _write_shard(staging, self._mesh.rank, copied)
        self._before_commit()
        return written

    def _commit(self, staging: Path, final: Path, manifest: Manifest) -> None:
        write_synced(staging / "manifest.json", manifest_text(manifest))
        sync(staging)
        self._before_commit()  # again: a slow disk may have taken its time for these
        replaced = None
        if final.exists():  # the same step, from before the run went back behind it
            replaced = free_name(final.with_name(final.name + ".replaced"))
            os.rename(final, replaced)
        os.rename(staging, final)
        sync(final.parent)
        try:
            if replaced is not None:
                shutil.rmtree(replaced)
            write_synced(final.parent / "latest", final.name + "\n")
        except OSError as error:  # the checkpoint is there, and found without it
            log.warning("%s is saved, but what comes after it failed: %s", final, error)


class NotFinite(Exception):
    """State that holds NaN or infinity."""


def _finite_bytes(copied: dict[str, torch.Tensor]) -> int:
    """Bytes of a rank's state. Raises NotFinite, naming what is broken."""
    for name, tensor in copied.items():
        with np.errstate(all="ignore"):
            total = tensor.numpy().sum() if tensor.dtype == torch.float32 else tensor.sum(dtype=torch.float32).item()
            finite = bool(np.isfinite(total))  # NaN and infinity always show in a sum
        if not finite and not bool(torch.isfinite(tensor).all()):  # or it was too large a sum
            kind, parameter, start = name.split(":", 1)[0], *name.split(":", 1)[1].rsplit(":", 1)
            at = int(start) + int((~torch.isfinite(tensor)).nonzero()[0])
            raise NotFinite(f"the {kind} of {parameter} is not finite at element {at}")
    return sum(tensor.nbytes for tensor in copied.values())


def _write_shard(staging: Path, rank: int, copied: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    path = staging / shard_name(rank)
    digest = write_safetensors(path, copied)
    sync(path)
    return path.name, {"bytes": path.stat().st_size, "xxh3": digest}


_FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write contiguous host tensors, and return the xxh3-128 of the file's bytes as they left the memory.

    safetensors' own writer copies every tensor once more on the way, which the training beside it feels.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [
        len(text).to_bytes(8, "little"),
        text,
        *(tensor.view(torch.uint8).numpy().data.cast("B") for tensor in tensors.values()),
    ]
    digest = xxhash.xxh3_128()
    with open(path, "wb", buffering=1 << 20) as file:
        for part in parts:
            digest.update(part)
            file.write(part)
    return digest.hexdigest()
