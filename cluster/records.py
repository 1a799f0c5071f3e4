"""What a run's folder tells: ledger.jsonl, which the ranks write, and jobs.jsonl, which submit.py and job.py write."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from launcher.lines import read_events as read_events
from launcher.lines import read_lines as read_lines

MARGIN_S = 60  # SLURM's clock for warnings has this grain
SAVES = 3  # times as long as the slowest of the last saves


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """One line more in jobs.jsonl. A disk that does not take it is told and is no reason to end."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
    try:
        with open(run_dir / "jobs.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"{run_dir / 'jobs.jsonl'} cannot be written ({error.strerror}); its line was {line}", flush=True)


def heartbeat(run_dir: Path) -> str:
    """A text that changes every few seconds while somebody writes to the run's folder (launcher/lease.py)."""
    with contextlib.suppress(OSError, UnicodeDecodeError, IndexError):
        return sorted((run_dir / "lease").glob("*.json"))[-1].read_text(encoding="utf-8")
    return ""


def saved_step(ledger: list[dict[str, Any]]) -> int:
    """Of the newest checkpoint that the ledger tells of, 0 where there is none."""
    return next((int(event["step"]) for event in reversed(ledger) if event["event"] == "checkpoint"), 0)


def lead_for(ledger: list[dict[str, Any]], least_s: int, limit_s: int | None = None) -> int:
    """Seconds before the time limit at which a run must be asked to stop, by how long its last saves took.

    least_s: what was asked for.    limit_s: of a start, of which half is left to training however long one save took.
    """
    took = [float(event.get("write_s", 0)) for event in ledger if event["event"] == "checkpoint"][-10:]
    wanted_s = MARGIN_S + round(SAVES * max(took)) if took else 0
    return max(least_s, wanted_s if limit_s is None else min(wanted_s, limit_s // 2))
