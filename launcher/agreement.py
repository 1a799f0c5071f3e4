"""All ranks must run the same program on the same config in one folder: told at the start, not by a hang or by numbers
that drift.
"""

import json
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from launcher.config import RunConfig, flat
from launcher.lease import Lease
from launcher.program import program
from launcher.redaction import hide
from parallel.checkpoint import SEEN_S
from parallel.mesh import LaunchError, Mesh

log = logging.getLogger(__name__)

SHOWN = 5  # differences in a message


def agree_on_start(mesh: Mesh, cfg: RunConfig, left_out: Sequence[tuple[int, int]]) -> None:
    """Raise LaunchError, on all ranks, naming a rank whose code, libraries, config or ledger is another than rank 0's.

    left_out: what this rank has read of the ledger's rewinds.
    """
    mine = _facts(cfg, left_out)
    digests = mesh.gather(xxhash.xxh3_64_intdigest(json.dumps(mine, sort_keys=True).encode()))
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    told = mesh.gather((socket.gethostname(), mine) if mesh.rank in (0, other) else None)
    (first_host, first), (host, theirs) = told[0], told[other]
    differ = [key for key in sorted(first.keys() | theirs.keys()) if first.get(key) != theirs.get(key)]
    shown = "; ".join(hide(f"{key}: {first.get(key)} on rank 0, {theirs.get(key)} there") for key in differ[:SHOWN])
    raise LaunchError(
        f"{sum(digest != digests[0] for digest in digests)} of {len(digests)} ranks do not run what rank 0 on "
        f"{first_host} runs; rank {other} on {host}: {shown}"
        + (f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else "")
        + ". Give all machines the same checkout, environment and command, on a file system that they share"
    )


def agree_on_folder(mesh: Mesh, cfg: RunConfig, lease: Lease | None) -> None:
    """Raise LaunchError, on all ranks, naming a rank whose run folder is another than rank 0's.

    Waits for up to SEEN_S seconds, as some file systems show late what another machine has made.    lease: of rank 0.
    """
    name, key = mesh.broadcast((lease.path.name, lease.key) if lease is not None else None)
    path, wait_s = cfg.run_dir / "lease" / name, min(SEEN_S, cfg.parallel.timeout_s / 2)  # the others wait in gather
    until, told = time.monotonic() + wait_s, False
    while not (seen := _holds(path, key)) and time.monotonic() < until:
        if not told:
            log.warning("%s, made by rank 0, is not seen on this machine yet; waiting up to %.0f s", path, wait_s)
            told = True
        time.sleep(0.2)
    for rank, host in enumerate(mesh.gather("" if seen else socket.gethostname())):
        if host:
            raise LaunchError(
                f"rank {rank} on {host} does not see {path}, which rank 0 has made. A run's folder must be the same on all "
                "machines: choose one with run.folder on a file system that they share"
            )


def _holds(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False


def _facts(cfg: RunConfig, left_out: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What must be the same everywhere, by a name for people."""
    config = {f"config {key}": value for key, value in flat(cfg.model_dump(mode="json")).items()}
    return {**program(), **config, "rewinds": [list(s) for s in left_out]}
