"""Sharded checkpoints: one format for every topology, whole or absent, verified before use, nothing pickled.

    checkpoints/step-00001000/rank-00000.safetensors   what rank 0 owned: weights and moments, by element range
    checkpoints/step-00001000/manifest.json            files with size and hash, parameter shapes, cursor, config, versions
    checkpoints/latest                                 the name of the newest committed folder; a hint, never trusted alone

A tensor in a file is named `KIND:PARAMETER:START`: elements START.. of the flattened parameter, one-dimensional, fp32. A
frozen parameter has a weight alone, in the format that the run computes in, which a reader is given as fp32.
parallel/checkpoint_writer.py writes a folder as `step-N.KEY.staging`, syncs, hashes and lists it and then renames it: a
folder with its final name is whole. Whoever reads it asks for element ranges, so the world size and ZeRO stage that wrote
it do not matter.
"""

import bisect
import json
import logging
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import xxhash
from torch import Tensor

from parallel.state import KINDS

if TYPE_CHECKING:
    from parallel.mesh import Mesh  # which costs DeepSpeed; reading a checkpoint does not need it

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
SEEN_S = 60.0  # until a machine must see what another has written: NFS remembers a folder's content for as long
STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and what is wrong with it."""


class UnreadableError(CheckpointError):
    """It could not be looked at here and now; nothing is known to be wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    step: int  # optimizer steps taken, skipped updates included
    adam_steps: int  # updates that AdamW made
    world_size: int
    zero_stage: int
    shapes: dict[str, list[int]]  # of every parameter, whole
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "xxh3"}
    cursor: dict[str, Any]  # where the data stands
    config: dict[str, Any]  # the resolved config of the run
    loss_scaler: dict[str, Any] | None = None
    totals: dict[str, Any] = field(default_factory=dict)  # counters that a resumed run goes on from
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


# -- files -------------------------------------------------------------------------------------------------------------


def write_synced(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a crash at any moment leaves the old content or the new."""
    staging = path.with_name(path.name + ".tmp")
    with open(staging, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def manifest_text(manifest: Manifest) -> str:
    """What manifest.json says, with its own hash."""
    body = asdict(manifest)
    return json.dumps({**body, "xxh3": body_hash(body)}, indent=1) + "\n"


def body_hash(body: dict[str, Any]) -> str:
    """xxh3-128 of what a manifest says, whatever its layout as text."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# -- reading ------------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Reads element ranges of a committed checkpoint without an engine, a file's pages at a time.

    A `StateSource` for `Engine.load_state`; fine-tuning and export read whole parameters through `tensor`.
    """

    def __init__(self, path: Path, own: str | None = None) -> None:
        """own: a file that may hold all that is asked for; the others are opened once it does not. None: open all."""
        self.path = path
        self.manifest = read_manifest(path)
        self._files: dict[str, Any] = {}
        self._spans: dict[tuple[str, str], list[tuple[int, int, str, str]]] = defaultdict(list)
        self._open([own] if own in self.manifest.files else self.manifest.files)

    def _open(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                opened = safetensors.safe_open(self.path / name, framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{self.path / name}: {error}") from error
            self._files[name] = opened
            for key in opened.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                kind, rest = key.split(":", 1)
                parameter, start = rest.rsplit(":", 1)
                length = opened.get_slice(key).get_shape()[0]
                self._spans[parameter, kind].append((int(start), int(start) + length, name, key))
        for spans in self._spans.values():
            spans.sort()

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D fp32. Raises CheckpointError where some are missing."""
        out = torch.empty(stop - start, dtype=torch.float32)
        at = self._copy(name, kind, start, out)
        if at < stop and (closed := self.manifest.files.keys() - self._files.keys()):
            self._open(sorted(closed))
            at = self._copy(name, kind, start, out)
        if at < stop:
            raise CheckpointError(
                f"{self.path} lacks elements {at} to {stop} of the {kind} of {name}; it has "
                + (", ".join(f"{a} to {b}" for a, b, *_ in self._spans.get((name, kind), [])) or "none")
            )
        return out

    def _copy(self, name: str, kind: str, start: int, out: Tensor) -> int:
        """Fill `out` with the elements from `start` on, as far as the open files go; returns up to where."""
        spans, at, stop = self._spans.get((name, kind), []), start, start + len(out)
        for first, last, file, key in spans[max(0, bisect.bisect_right(spans, (start, 1 << 62)) - 1) :]:
            if at >= stop or first > at:
                break
            end = min(last, stop)
            if end > at:
                out[at - start : end - start] = self._files[file].get_slice(key)[at - first : end - first]
                at = end
        return at

    def has(self, name: str, kind: str) -> bool:
        """Whether an open file has a part of it; a parameter that was frozen has no moments."""
        return (name, kind) in self._spans

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter in its shape, fp32."""
        shape = self.manifest.shapes[name]
        return self.read(name, kind, 0, torch.Size(shape).numel()).view(shape)

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the checkpoint has exactly these parameters."""
        have = {name: tuple(shape) for name, shape in self.manifest.shapes.items()}
        if have == shapes:
            return
        missing, extra = sorted(shapes.keys() - have.keys()), sorted(have.keys() - shapes.keys())
        other = sorted(name for name in shapes.keys() & have.keys() if shapes[name] != have[name])
        detail = [f"lacks {missing[:3]}"] * bool(missing) + [f"has {extra[:3]} besides"] * bool(extra)
        detail += [f"has {name} as {have[name]}, the model as {shapes[name]}" for name in other[:3]]
        raise CheckpointError(f"{self.path} is of another model: it {'; '.join(detail)}")


def read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version, as_written = raw.get("format_version"), raw.pop("xxh3", None) == body_hash(raw)
        if as_written and version > FORMAT_VERSION:
            raise UnreadableError(
                f"{file}: format version {version}, this program reads {FORMAT_VERSION}; use the Longhaul that wrote it, or "
                "a later one"
            )
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{file}: format version {version!r}, this program reads {FORMAT_VERSION}")
        if not as_written:
            raise CheckpointError(f"{file} does not say what was written: its own xxh3 differs")
        manifest = Manifest(**raw)
        if path.name.split(".")[0] != folder_name(manifest.step):
            raise CheckpointError(f"{file} is of step {manifest.step}, its folder is {path.name}")
    except OSError as error:
        raise _not_read(file, error) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: {type(error).__name__}: {error}") from error
    for name in manifest.files:
        if Path(name).name != name:
            raise CheckpointError(f"{file} names {name!r}, which is not a file beside it")
    return manifest


def _not_read(file: Path, error: OSError) -> CheckpointError:
    """A file that is gone is damage; a mount that is stale, a right or a handle that is missing says nothing about it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{file}: {error.strerror}")
    return UnreadableError(
        f"{file} cannot be read on {socket.gethostname()}: {error.strerror or error}. Nothing is known to be wrong with it: "
        "mend that and start again; if the file is lost for good, move its folder away"
    )


def faults(path: Path, part: int = 0, parts: int = 1, hashed: bool = True) -> list[str]:
    """What is wrong with a committed checkpoint, checking every `parts`-th file by size and hash; empty when nothing.

    hashed: False leaves the hash out.

    Raises UnreadableError where that cannot be told.
    """
    try:
        manifest = read_manifest(path)
    except UnreadableError:
        raise
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for name, entry in list(manifest.files.items())[part::parts]:
        file = path / name
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                wrong.append(f"{file}: {size} bytes, the manifest says {entry['bytes']}")
            elif hashed and (found := file_hash(file)) != entry["xxh3"]:
                wrong.append(f"{file}: xxh3 {found}, the manifest says {entry['xxh3']}")
        except OSError as error:
            if isinstance(gone := _not_read(file, error), UnreadableError):
                raise gone from error
            wrong.append(str(gone))
    return wrong


def committed_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have their final name and a manifest, ascending."""
    if not folder.is_dir():
        return []
    found = [(STEP_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted(int(match[1]) for match, entry in found if match and (entry / "manifest.json").is_file())


def newest_good(folder: Path, mesh: "Mesh") -> CheckpointReader | None:
    """The newest checkpoint whose every file has its size and hash, verified by all ranks together; None if there is none.

    A damaged one is named, set aside as `step-N.damaged`, and the one before it is tried. Raises CheckpointError, on all
    ranks, when there are checkpoints and none is good: starting again from step 0 is never this program's decision; and
    where one cannot be looked at, by any rank: then none is touched.
    """
    if mesh.rank == 0:
        _put_back(folder)
    steps = mesh.broadcast(committed_steps(folder) if mesh.rank == 0 else None)
    if mesh.rank == 0:
        _warn_if_latest_differs(folder, steps)
    damaged = mesh.broadcast(_damaged(folder) if mesh.rank == 0 else None)
    for step in reversed(steps):
        path = folder / folder_name(step)
        _wait_until_seen(path, mesh)
        if not (wrong := faults_together(path, mesh)):
            reader = _open_together(path, mesh)
            if mesh.rank == 0 and (
                more := sorted({p.name for p in path.iterdir()} - {"manifest.json", *reader.manifest.files})
            ):
                log.warning("%s holds what its manifest does not name, and is not read: %s", path, ", ".join(more[:5]))
            return reader
        damaged.append(path.name)
        if mesh.rank == 0:
            log.warning("checkpoint %s is damaged and set aside: %s", path, wrong[0])
            os.rename(path, free_name(path.with_name(path.name + ".damaged")))
        mesh.barrier()
    if damaged:
        raise CheckpointError(
            f"{folder} has checkpoints but none that is whole (damaged: {', '.join(sorted(set(damaged)))}); "
            "restore one from a copy, or start a new run under another run.name"
        )
    return None


def faults_together(path: Path, mesh: "Mesh") -> list[str]:
    """What all ranks together find wrong, each with its part of the files; the same, or the same error, on every rank."""
    wrong, unreadable = [], ""
    try:
        wrong = faults(path, mesh.rank, mesh.world_size)
    except UnreadableError as error:
        unreadable = f"rank {mesh.rank}: {error}"
    found = mesh.gather((wrong, unreadable))
    if told := next((text for _, text in found if text), None):
        raise UnreadableError(told)
    return [text for texts, _ in found for text in texts]


def _open_together(path: Path, mesh: "Mesh") -> CheckpointReader:
    reader, wrong = None, ""
    try:
        reader = CheckpointReader(path, own=shard_name(mesh.rank))
    except CheckpointError as error:
        wrong = f"rank {mesh.rank} on {socket.gethostname()}: {error}"
    if told := next(filter(None, mesh.gather(wrong)), None):
        raise UnreadableError(told)
    assert reader is not None
    return reader


def _put_back(folder: Path) -> None:
    """A save that takes the place of one of the same step moves that aside first; if it was killed then, move it back."""
    for aside in sorted(folder.glob("step-*.replaced*")):
        final = aside.with_name(aside.name.split(".")[0])
        if not final.exists() and (aside / "manifest.json").is_file():
            log.warning("%s had been moved aside by a save that was killed; it is %s again", aside, final.name)
            os.rename(aside, final)


def _wait_until_seen(path: Path, mesh: "Mesh") -> None:
    """Wait for the files that rank 0 sees in a checkpoint: its file system may show them late on other machines.

    Raises CheckpointError, on all ranks, where a rank does not come to see them; nothing is wrong with the checkpoint then.
    """
    names = mesh.broadcast(_names(path) if mesh.rank == 0 else None)
    until, told = time.monotonic() + SEEN_S, False
    while (missing := sorted(names - _names(path))) and time.monotonic() < until:
        if not told:
            log.warning("%s is not seen whole on this machine yet; waiting for it up to %.0f s", path, SEEN_S)
            told = True
        time.sleep(0.2)
    for rank, (host, unseen) in enumerate(mesh.gather((socket.gethostname(), missing))):
        if unseen:
            raise CheckpointError(
                f"rank {rank} on {host} does not see {path / unseen[0]}, which rank 0 sees; is {path.parent} on a file "
                "system that all machines share?"
            )


def _names(checkpoint: Path) -> set[str]:
    """Of the files that matter, as this machine sees them."""
    try:
        found = os.listdir(checkpoint)  # which has a server asked anew
    except OSError:
        return set()
    return {name for name in found if name == "manifest.json" or name.endswith(".safetensors")}


def _damaged(folder: Path) -> list[str]:
    """Folders that were checkpoints: set aside, being replaced, or without a manifest (its removal begins a deletion)."""
    if not folder.is_dir():
        return []
    return [
        entry.name
        for entry in folder.iterdir()
        if ".damaged" in entry.name
        or ".replaced" in entry.name
        or (STEP_NAME.fullmatch(entry.name) and not (entry / "manifest.json").is_file())
    ]


def free_name(path: Path) -> Path:
    return next(p for p in [path, *(Path(f"{path}.{i}") for i in range(1, 1000))] if not p.exists())


def _warn_if_latest_differs(folder: Path, steps: list[int]) -> None:
    """`latest` is for people and other tools; what counts is found by looking at the folders."""
    newest = folder_name(steps[-1]) if steps else None
    try:
        named = _said_by(folder / "latest") if steps else None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); going by the folders instead: %s", folder / "latest", error, newest)
        return
    if named != newest:
        log.warning(
            "%s says %.80r, the newest committed checkpoint is %s; using that", folder / "latest", named, newest
        )


def _said_by(latest: Path) -> str:
    """Its content, were it a run's: a short text, not what a link leads to, nor a pipe to wait for. Raises OSError."""
    handle = os.open(latest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(handle, 200).decode().strip()
    finally:
        os.close(handle)


class ZeroMoments:
    """State of a run that starts: weights from `weights(name, start, stop)`, moments zero."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        assert kind in KINDS, kind
        return self._weights(name, start, stop) if kind == "weight" else torch.zeros(stop - start)
