"""What each rank read at each step: a few bytes a step, from which launcher/audit.py proves that nothing was lost.

runs/NAME/reads/start-0001-rank-00000.bin is a row of records of 32 bytes: step, first sample and one past the last of
the step over all ranks, and the xxh3-64 of this rank's sample numbers and tokens (data.loader.digest).
"""

import contextlib
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.loader import StepBatch

RECORD = np.dtype([("step", "<i8"), ("first", "<i8"), ("next", "<i8"), ("digest", "<u8")])


def path_of(run_dir: Path, start: int, rank: int) -> Path:
    """The file of one rank of one start of a run, counted from 1."""
    return run_dir / "reads" / f"start-{start:04d}-rank-{rank:05d}.bin"


class ReadLog:
    """Writes one rank's records; each is with the operating system before its step begins.

    What a full disk does not take is kept and tried again with the next record: a run does not end for its records, and
    a checkpoint waits for them (sync).
    """

    def __init__(self, run_dir: Path, start: int, rank: int) -> None:
        path = path_of(run_dir, start, rank)
        path.parent.mkdir(exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._pending = b""
        self._lock = threading.Lock()  # a save syncs from its thread

    def add(self, step: int, batch: StepBatch) -> None:
        """step: the optimizer step that the batch is for, counted from 1."""
        with self._lock:
            self._pending += np.array([(step, *batch.span, batch.digest)], dtype=RECORD).tobytes()
            with contextlib.suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Have the records on disk; before a checkpoint, from which a run goes on after a power cut. Raises OSError."""
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        self._file.close()


def read_records(run_dir: Path, start: int, rank: int) -> NDArray[np.void]:
    """The records of one rank of one start, (n,) of RECORD; one that a crash cut is left out, none where no file is."""
    path = path_of(run_dir, start, rank)
    if not path.is_file():
        return np.empty(0, dtype=RECORD)
    payload = path.read_bytes()
    return np.frombuffer(payload[: len(payload) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
