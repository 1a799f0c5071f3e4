"""Which checkpoints stay: the newest few, some for good by step or by hours of training. Never by a clock on the wall."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from parallel.checkpoint import CheckpointError, committed_steps, folder_name, read_manifest
from parallel.config import CheckpointConfig

log = logging.getLogger(__name__)

HOUR_S = 3600.0


def to_retire(steps: list[int], cfg: CheckpointConfig, train_s: Mapping[int, float]) -> list[int]:
    """Of the checkpoints of `steps`, ascending, those that need not stay.

    train_s: by step, seconds that the run had trained for by then; of those of unknown time none is retired for it.
    """
    if not cfg.keep:
        return []
    stay = set(steps[-cfg.keep :])
    if cfg.keep_every is not None:
        stay |= {step for step in steps if step % cfg.keep_every == 0}
    if cfg.keep_every_hours is not None:
        first_of: dict[int, int] = {}
        for step in steps:
            if step in train_s:
                first_of.setdefault(int(train_s[step] / HOUR_S / cfg.keep_every_hours), step)
        stay |= {*first_of.values(), *(step for step in steps if step not in train_s)}
    return [step for step in steps if step not in stay]


def retire(folder: Path, cfg: CheckpointConfig, stay: frozenset[int] = frozenset(), dry_run: bool = False) -> list[int]:
    """Remove the checkpoints that need not stay, and are not in `stay`; returns their steps.

    One that cannot be removed is told and left.
    """
    steps, train_s = committed_steps(folder), {}
    if cfg.keep_every_hours is not None:
        for step in steps:
            try:
                train_s[step] = float(read_manifest(folder / folder_name(step)).totals["train_s"])
            except (CheckpointError, KeyError):
                continue  # of unknown time, or damaged: a resume deals with that
    gone = []
    for step in to_retire(steps, cfg, train_s):
        if step in stay:
            continue
        try:
            if not dry_run:
                remove(folder / folder_name(step))
            gone.append(step)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", folder / folder_name(step), error)
    return gone


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, the manifest first: a folder without one is no checkpoint, whatever stops the rest."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
