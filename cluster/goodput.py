"""Where a run stands and where its time went, from its folder alone: ledger.jsonl, jobs.jsonl, metrics.jsonl and its lines
of lost steps, over all starts. SLURM, where it is there, is asked for the state of the job.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.records import read_events, read_lines, saved_step
from cluster.slurm import JobState, job_state

ALIVE_S = 60.0  # since the last heartbeat of who writes to the run's folder
UNTOLD = "nothing tells its end: SLURM took it off its nodes, or it was killed"
# Where time goes; what is measured nowhere is the rest.
PARTS = {
    "steps": "steps that count",
    "data": "waiting for data in them",
    "checkpoint": "waiting for saves",
    "evaluation": "evaluation",
    "lost": "steps that were done again",
    "start-up": "start-up",
    "queue": "queue",
    "rest": "the rest: ends, sampling, failures until they were noticed",
}
MARKS = ("submitted", "begin", "start", "stopped", "failed", "finished", "end")  # events between which time is divided


@dataclass(frozen=True)
class Start:
    """One start of the run. time: of its begin, seconds since 1970. job: empty outside SLURM."""

    time: float
    job: str
    restart: int
    nodes: str
    from_step: int
    end: str  # how it ended and what was decided; empty while it runs


@dataclass(frozen=True)
class Status:
    """All that is told. Times in seconds; None is unknown. goodput: the share of wall_s in steps that count."""

    run: str
    state: str
    job: str
    step: int
    steps: int | None
    tokens: int
    saved_step: int
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    left_s: float | None
    wall_s: float
    goodput: float | None
    parts_s: dict[str, float]
    starts: list[Start]


def read_status(run_dir: Path, now: float) -> Status:
    """now: seconds since 1970, by the clock that the run's records are compared with."""
    ledger, jobs = read_events(run_dir / "ledger.jsonl"), read_events(run_dir / "jobs.jsonl")
    metrics = [line for line in read_lines(run_dir / "metrics.jsonl") if "step" in line]
    lost = [line for line in read_lines(run_dir / "metrics.superseded.jsonl") if "step" in line]
    job = str(jobs[-1]["job"]) if jobs else ""
    slurm = job_state(job) if job else JobState()
    holder = _holder(run_dir, now)
    finished = bool(ledger) and _last_end(ledger) == "finished"
    lives = not finished and (slurm.lives or (not slurm.state and holder != ""))
    wall_s, parts = where_time_went(ledger, jobs, metrics, lost, now if lives else None, slurm.state == "PENDING")
    last: dict[str, Any] = next((line for line in reversed(metrics) if "loss/train" in line), {})
    steps, step_time_s = _steps(run_dir), _number(last, "speed/step_time_s")
    step = max(int(last.get("step", 0)), saved_step(ledger))
    return Status(
        run=str(run_dir),
        state=_state(ledger, slurm, holder, finished),
        job=job,
        step=step,
        steps=steps,
        tokens=int(last.get("progress/tokens", 0)),
        saved_step=saved_step(ledger),
        loss=_number(last, "loss/train"),
        tokens_per_s=_number(last, "speed/tokens_per_s"),
        mfu=_number(last, "speed/mfu"),
        left_s=None if steps is None or step_time_s is None else max(0, steps - step) * step_time_s,
        wall_s=wall_s,
        goodput=parts["steps"] / wall_s if wall_s > 0 else None,
        parts_s=parts,
        starts=starts_of(ledger, jobs, lives and slurm.state != "PENDING"),
    )


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
    times = [float(event["time"]) for event in (*ledger, *jobs)]
    if not times:
        return 0.0, dict.fromkeys(PARTS, 0.0)
    wall_s = max(times if now is None else [now, *times]) - min(times)
    steps_s, data_s = _step_times(metrics, [])
    saved = sorted({int(event["step"]) for event in ledger if event["event"] == "checkpoint"})
    lost_s = _step_times(lost, saved)
    parts = {
        "steps": steps_s - data_s,
        "data": data_s,
        "checkpoint": _sum(metrics, "speed/checkpoint_stall_s"),
        "evaluation": _sum(metrics, "speed/eval_time_s"),
        "lost": lost_s[0] + _sum(lost, "speed/checkpoint_stall_s") + _sum(lost, "speed/eval_time_s"),
        "start-up": 0.0,
        "queue": 0.0,
    }
    order = sorted((e for e in (*ledger, *jobs) if e["event"] in MARKS), key=lambda event: float(event["time"]))
    if order and now is not None:
        order.append({"time": now, "event": "begin" if waiting else "now", "job": order[-1].get("job")})
    for before, after in zip(order, order[1:], strict=False):
        took = float(after["time"]) - float(before["time"])
        if before["event"] == "begin" and after["event"] not in ("submitted", "begin"):
            parts["start-up"] += took
        elif after["event"] == "begin" and before["event"] in ("submitted", "end") and before["job"] == after["job"]:
            parts["queue"] += took
    return wall_s, {**parts, "rest": max(0.0, wall_s - sum(parts.values()))}


def _step_times(lines: list[dict[str, Any]], saved: list[int]) -> tuple[float, float]:
    """Seconds in steps, and of these waiting for data. A line has the means of the steps since the line before it.

    saved: steps of checkpoints, from the last of which below them steps were done, where the line before is another
    start's.
    """
    step_s = data_s = 0.0
    before = 0
    for line in lines:
        if (mean := _number(line, "speed/step_time_s")) is None:
            continue
        if line["step"] <= before:
            before = 0
        count = line["step"] - max([before, *(step for step in saved if step < line["step"])])
        step_s += count * mean
        data_s += count * (_number(line, "speed/data_wait_s") or 0.0)
        before = line["step"]
    return step_s, data_s


def starts_of(ledger: list[dict[str, Any]], jobs: list[dict[str, Any]], runs: bool) -> list[Start]:
    """Oldest first. runs: the last one has not ended."""
    found = []
    begins = [event for event in jobs if event["event"] == "begin"]
    ends = {(event["job"], event["restart"]): event["verdict"] for event in jobs if event["event"] == "end"}
    for event in begins:
        key = (event["job"], event["restart"])
        running = runs and event is begins[-1]
        found.append(Start(float(event["time"]), *key, event["nodes"], event["saved_step"],
                           ends.get(key, "" if running else UNTOLD)))  # fmt: skip
    if begins:
        return found
    for i, event in enumerate(ledger):
        if event["event"] == "start":
            rest = ledger[i + 1 :]
            own = rest[: next((k for k, e in enumerate(rest) if e["event"] == "start"), len(rest))]
            last = next((e for e in reversed(own) if e["event"] in ("stopped", "failed", "finished")), None)
            running = runs and len(own) == len(rest)
            end = "" if running else UNTOLD if last is None else _told(last)
            found.append(Start(float(event["time"]), "", 0, "", event["step"], end))
    return found


def _told(event: dict[str, Any]) -> str:
    cause = event.get("signal") or event.get("error")
    return event["event"] + (f" ({cause})" if cause else "")


def _last_end(ledger: list[dict[str, Any]]) -> str:
    return next((str(e["event"]) for e in reversed(ledger) if e["event"] in MARKS), "")


def _state(ledger: list[dict[str, Any]], slurm: JobState, holder: str, finished: bool) -> str:
    if finished:
        return "finished"
    if slurm.lives:
        return slurm.state.lower() + (f" ({slurm.reason})" if slurm.reason not in ("", "None") else "")
    if not slurm.state and holder:
        return f"running on {holder}"
    last = _last_end(ledger)
    return {"start": UNTOLD, "": "not started"}.get(last, last) + (f"; its job is {slurm.state}" if slurm.state else "")


def _holder(run_dir: Path, now: float) -> str:
    """The host of the process that writes to the run's folder; empty where its heartbeat has stopped."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        path = sorted((run_dir / "lease").glob("*.json"))[-1]
        holder = json.loads(path.read_text(encoding="utf-8"))
        if not holder["released"] and now - path.stat().st_mtime < ALIVE_S:
            return str(holder["host"])
    return ""


def _steps(run_dir: Path) -> int | None:
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return int(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"])
    return None


def _number(line: dict[str, Any], name: str) -> float | None:
    """None where it is not there, or not finite (then a text)."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None


def _sum(lines: list[dict[str, Any]], name: str) -> float:
    return sum(_number(line, name) or 0.0 for line in lines)


def summary(status: Status) -> str:
    """Step, loss and speed in one line, without what is unknown."""
    shown = [f"step {status.step:,}" + (f" of {status.steps:,}" if status.steps else ""),
             f"saved {status.saved_step:,}", f"tokens {status.tokens:,}"]  # fmt: skip
    if status.loss is not None:
        shown.append(f"loss {status.loss:.4g}")
    if status.tokens_per_s is not None:
        shown.append(f"tokens/s {status.tokens_per_s:,.0f}")
    if status.mfu is not None:
        shown.append(f"MFU {status.mfu:.1%}")
    if status.left_s:
        shown.append(f"steps left {duration(status.left_s)}")
    return "  ".join(shown)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
