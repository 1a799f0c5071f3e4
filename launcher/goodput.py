"""Where the wall time of a run went, over all its starts: from ledger.jsonl, jobs.jsonl, metrics.jsonl and its lines of
lost steps.
"""

import time
from pathlib import Path
from typing import Any

from launcher.lines import number, read_events, read_metrics

# Where time goes; what is measured nowhere is the rest.
PARTS = {
    "steps": "steps that count",
    "data": "waiting for data in them",
    "checkpoint": "waiting for saves",
    "evaluation": "evaluation and samples",
    "lost": "steps that were done again",
    "start-up": "start-up",
    "queue": "queue",
    "rest": "the rest: ends, failures until they were noticed",
}
MARKS = ("submitted", "begin", "start", "stopped", "failed", "finished", "end")  # events between which time is divided
_STEP = "speed/step_time_s"


def where_time_went(
    ledger: list[dict[str, Any]],
    jobs: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    lost: list[dict[str, Any]],
    now: float | None,
    waiting: bool,
) -> tuple[float, dict[str, float]]:
    """Seconds from the first record to now, or to the last record where now is None, and how they divide (keys of PARTS).

    lost: lines of metrics for steps that were done again.    waiting: the job waits in the queue now.
    """
    events = (*ledger, *jobs)
    if not events:
        return 0.0, dict.fromkeys(PARTS, 0.0)
    ends = [float(event["time"]) for event in events] + ([] if now is None else [now])
    wall_s = max(ends) - min(float(event["time"]) - _up_s(event) for event in events)
    parts, again = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    _add_lines(parts, metrics, [])
    _add_lines(again, lost, sorted({int(event["step"]) for event in ledger if event["event"] == "checkpoint"}))
    parts["lost"] = sum(again.values())
    order = sorted((e for e in events if e["event"] in (*MARKS, "rewind")), key=lambda event: float(event["time"]))
    if order and now is not None:
        order.append({"time": now, "event": "begin" if waiting else "now", "job": order[-1].get("job")})
    for before, after in zip([None, *order], order, strict=False):
        took = _up_s(after) if before is None else float(after["time"]) - float(before["time"])
        if before is not None and before["event"] == "begin" and after["event"] not in ("submitted", "begin"):
            parts["start-up"] += took
        elif after["event"] == "start":
            parts["start-up"] += min(took, _up_s(after))
        elif after["event"] == "begin" and before is not None and before["event"] in ("submitted", "end"):
            parts["queue"] += took if before["job"] == after["job"] else 0.0
    return wall_s, _with_rest(wall_s, parts)


def _up_s(event: dict[str, Any]) -> float:
    """How long the process had been up that tells of its start, seconds."""
    return number(event, "up_s") or 0.0 if event["event"] == "start" else 0.0


def _with_rest(wall_s: float, parts: dict[str, float]) -> dict[str, float]:
    return {**parts, "rest": max(0.0, wall_s - sum(parts[key] for key in PARTS if key != "rest"))}


def _add_lines(parts: dict[str, float], lines: list[dict[str, Any]], saved: list[int]) -> int:
    """As _add_line, from the beginning of the run.

    saved: steps of checkpoints, for lines that were set aside without the step from which their steps were done again
    (resumed_step): those were done since the last of these, where the line before is another start's.
    """
    before, resumed = 0, None
    for line in lines:
        if number(line, _STEP) is not None:
            again = line.get("resumed_step")
            if isinstance(again, int):
                before = before if again == resumed and before < line["step"] else again
            else:
                before = max([before if before < line["step"] else 0, *(step for step in saved if step < line["step"])])
            resumed = again
        before = _add_line(parts, line, before)
    return before


def _add_line(parts: dict[str, float], line: dict[str, Any], before: int) -> int:
    """Add the seconds of one line of metrics; returns the last step whose time is added. before: that step until now.

    A line has the means of the steps since the line before it.
    """
    parts["checkpoint"] += number(line, "speed/checkpoint_stall_s") or 0.0
    parts["evaluation"] += (number(line, "speed/eval_time_s") or 0.0) + (number(line, "speed/sample_time_s") or 0.0)
    if (mean := number(line, _STEP)) is None:
        return before
    data_s = number(line, "speed/data_wait_s") or 0.0
    parts["steps"] += (line["step"] - before) * (mean - data_s)
    parts["data"] += (line["step"] - before) * data_s
    return int(line["step"])


class Goodput:
    """The same for the run itself while it goes: its records are read once."""

    def __init__(self, run_dir: Path, now: float) -> None:
        """now: seconds since 1970, after the start is in the ledger and metrics.jsonl has only steps that count."""
        metrics = read_metrics(run_dir / "metrics.jsonl")
        self._wall_s, self._parts = where_time_went(
            read_events(run_dir / "ledger.jsonl"),
            read_events(run_dir / "jobs.jsonl"),
            metrics,
            read_metrics(run_dir / "metrics.superseded.jsonl"),
            now,
            waiting=False,
        )
        self._step = _add_lines(dict.fromkeys(PARTS, 0.0), metrics, [])
        self._since = time.monotonic()

    def add(self, line: dict[str, Any]) -> dict[str, float]:
        """Take in a new line of metrics. Returns the shares of the wall time until now where it is one of steps, else {}:
        goodput/goodput is that of steps that count, and goodput/badput_… say where the rest is.
        """
        self._step = _add_line(self._parts, line, self._step)
        wall_s = self._wall_s + time.monotonic() - self._since
        if number(line, _STEP) is None or wall_s <= 0:
            return {}
        parts = _with_rest(wall_s, self._parts)
        shares = {f"goodput/badput_{key}": seconds / wall_s for key, seconds in parts.items() if key != "steps"}
        return {"goodput/goodput": parts["steps"] / wall_s, **shares}
