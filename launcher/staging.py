"""A folder that is whole or absent: made beside its place under another name, synced, then renamed.

A process that is killed leaves at most the folder NAME.exporting (or NAME.importing), which the next one empties. A lock of
flock's, which ends with its process, tells whether another still writes there.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.checkpoint import sync

LOCK = ".lock"


class StagingError(RuntimeError):
    """The folder cannot be made; nothing was written."""


@contextmanager
def staging_for(
    output: Path, needed_bytes: int, what: str = "export", choose: str = "another --output"
) -> Iterator[Path]:
    """A folder beside the output, which takes the output's place when the block ends well and is removed when not.

    what: an export or import, and choose: what else its user may name, for messages.
    Raises StagingError where the output is there already, another process writes it, or there is no space.
    """
    check_absent(output, choose)
    staging = output.with_name(f"{output.name}.{what}ing")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = open(staging / LOCK, "w")  # noqa: SIM115  (closed below, and held until then)
    except OSError as error:
        raise StagingError(f"{staging} cannot be made: {error.strerror}; choose {choose}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StagingError(f"{staging} is being written by another {what}; wait for it, or stop it") from None
        _empty(staging)  # of what an export left that was killed
        try:
            free = shutil.disk_usage(staging).free
            if free < needed_bytes:
                raise StagingError(
                    f"{output.parent} has {free / 1e9:.2f} GB free, the {what} takes {needed_bytes / 1e9:.2f} GB; free "
                    f"some, or choose {choose}"
                )
            yield staging
            _commit(staging, output, choose)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def check_absent(output: Path, choose: str = "another --output") -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StagingError(f"{output} exists and is not an empty folder; nothing is overwritten: choose {choose}")


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _commit(staging: Path, output: Path, choose: str) -> None:
    for path in sorted(staging.rglob("*")):
        sync(path)
    (staging / LOCK).unlink()
    sync(staging)
    try:
        os.rename(staging, output)  # takes the place of an empty folder, never of another
    except OSError as error:
        raise StagingError(f"{output} has come to be meanwhile ({error.strerror}); choose {choose}") from None
    sync(output.parent)
