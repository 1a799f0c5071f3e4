"""Where a run stands and where its time went, from its folder alone, over all starts. SLURM, where it is there, is asked for
the state of the job.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.records import saved_step
from cluster.slurm import JobState, job_state
from launcher.goodput import MARKS, where_time_went
from launcher.lines import number, read_events, read_metrics

ALIVE_S = 60.0  # since the last heartbeat of who writes to the run's folder
UNTOLD = "nothing tells its end: SLURM took it off its nodes, or it was killed"


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
    slow: list[str]  # ranks that the last start has found slower than the others, and since when
    starts: list[Start]


def read_status(run_dir: Path, now: float) -> Status:
    """now: seconds since 1970, by the clock that the run's records are compared with."""
    ledger, jobs = read_events(run_dir / "ledger.jsonl"), read_events(run_dir / "jobs.jsonl")
    metrics, lost = (read_metrics(run_dir / name) for name in ("metrics.jsonl", "metrics.superseded.jsonl"))
    job = str(jobs[-1]["job"]) if jobs else ""
    slurm = job_state(job) if job else JobState()
    holder = _holder(run_dir, now)
    finished = bool(ledger) and _last_end(ledger) == "finished"
    lives = not finished and (slurm.lives or (not slurm.state and holder != ""))
    wall_s, parts = where_time_went(ledger, jobs, metrics, lost, now if lives else None, slurm.state == "PENDING")
    last: dict[str, Any] = next((line for line in reversed(metrics) if "loss/train" in line), {})
    steps, step_time_s = _steps(run_dir), number(last, "speed/median_step_time_s") or number(last, "speed/step_time_s")
    step = max(int(last.get("step", 0)), saved_step(ledger))
    return Status(
        run=str(run_dir),
        state=_state(ledger, slurm, holder, finished),
        job=job,
        step=step,
        steps=steps,
        tokens=int(last.get("progress/tokens", 0)),
        saved_step=saved_step(ledger),
        loss=number(last, "loss/train"),
        tokens_per_s=number(last, "speed/tokens_per_s"),
        mfu=number(last, "speed/mfu"),
        left_s=None if steps is None or step_time_s is None else max(0, steps - step) * step_time_s,
        wall_s=wall_s,
        goodput=parts["steps"] / wall_s if wall_s > 0 else None,
        parts_s=parts,
        slow=[] if finished else slow_ranks(ledger),
        starts=starts_of(ledger, jobs, lives and slurm.state != "PENDING"),
    )


def slow_ranks(ledger: list[dict[str, Any]]) -> list[str]:
    """Of the last start, those that are slow now."""
    slow: dict[tuple[int, ...], str] = {}
    for event in ledger:
        if event["event"] == "start":
            slow = {}
        elif event["event"] in ("straggler", "straggler_ended"):
            ranks = tuple(event["ranks"])
            slow = {key: text for key, text in slow.items() if not set(key) <= set(ranks)}
            if event["event"] == "straggler":
                who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
                slow[ranks] = (
                    f"since step {event['step']}: {who} on {event['host']}, {event['own_s']:.3g} s of a step until it waits "
                    f"for others, the median {event['median_s']:.3g} s"
                )
    return list(slow.values())


def starts_of(ledger: list[dict[str, Any]], jobs: list[dict[str, Any]], runs: bool) -> list[Start]:
    """Oldest first. runs: the last one has not ended."""
    found = []
    begins = [event for event in jobs if event["event"] == "begin"]
    ends = {(event["job"], event["restart"]): event["verdict"] for event in jobs if event["event"] == "end"}
    left_out = {(e["job"], e["restart"]): e["left_out"] for e in jobs if e["event"] == "preflight"}
    for event in begins:
        key = (event["job"], event["restart"])
        running = runs and event is begins[-1]
        without = "; ".join(f"{node}: {why}" for node, why in left_out.get(key, {}).items())
        nodes = event["nodes"] + (f" without {without}" if without else "")
        found.append(Start(float(event["time"]), *key, nodes, event["saved_step"],
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
