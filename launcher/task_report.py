"""The scores of a fine-tuning for people: tables of text, and a page with the curves of all evaluations."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from launcher.scores import Counts, Score

REPORT = "report.html"
MOST = 20  # labels of a confusion matrix that is shown
WIDTH, HEIGHT, LEFT = 640, 180, 60  # of a plot, pixels; LEFT: for the scale


def score_table(name: str, scores: dict[str, Score]) -> str:
    """A line each, with precision, recall, F1 and how many there are."""
    rows = [[name, "precision", "recall", "f1", "count"]]
    rows += [
        [label, f"{score.precision:.4f}", f"{score.recall:.4f}", f"{score.f1:.4f}", f"{score.support:,}"]
        for label, score in scores.items()
    ]
    return _aligned(rows)


def confusion_table(labels: Sequence[str], confusion: Counts) -> str:
    """How often a label (line) was taken for one (column)."""
    if len(labels) > MOST:
        return f"the confusion matrix of {len(labels)} labels is not shown; {MOST} are the most"
    rows = [["true \\ predicted", *labels]]
    rows += [[label, *(f"{n:,}" for n in row)] for label, row in zip(labels, confusion.tolist(), strict=True)]
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def write_report(run_dir: Path, step: int, values: dict[str, float], text: str, metrics: Path) -> None:
    """Write runs/NAME/report.html anew: the last evaluation's numbers, and the curves up to it from metrics.jsonl."""
    lines = _read(metrics)
    names = ["loss/train", *values]
    plots = [plot(name, [(line["step"], line[name]) for line in lines if _is_number(line.get(name))]) for name in names]
    numbers = _aligned([["score", f"step {step}"], *([name, f"{value:.4f}"] for name, value in values.items())])
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run_dir.name)}</title>"
        "<style>body{font:14px sans-serif;margin:2em}svg{display:block;margin:1em 0}</style>"
        f"<h1>{html.escape(str(run_dir.name))}</h1><pre>{html.escape(numbers)}\n\n{html.escape(text)}</pre>{''.join(plots)}\n"
    )
    staging = run_dir / f"{REPORT}.tmp"
    try:
        staging.write_text(page, encoding="utf-8")
        staging.replace(run_dir / REPORT)
    except OSError:  # a full disk ends no run; its numbers are in the log
        staging.unlink(missing_ok=True)


def _read(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError):
        return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def plot(name: str, points: list[tuple[int, float]]) -> str:
    """A curve over steps as SVG; "" of nothing."""
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    low, high, first, last = min(values), max(values), steps[0], steps[-1]
    across, up = max(1, last - first), (high - low) or 1.0
    at = [
        f"{LEFT + (step - first) / across * (WIDTH - LEFT - 10):.1f},{HEIGHT - 20 - (value - low) / up * (HEIGHT - 45):.1f}"
        for step, value in points
    ]
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2"/>' for x, y in (p.split(",") for p in at)) if len(at) < 200 else ""
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="12"><text x="{LEFT}" y="14">{html.escape(name)}</text>'
        f'<text x="0" y="30">{high:.4g}</text><text x="0" y="{HEIGHT - 20}">{low:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 2}">step {first}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 2}" text-anchor="end">{last}</text>'
        f'<polyline points="{" ".join(at)}" fill="none" stroke="#2563eb" stroke-width="1.5"/>{dots}</svg>'
    )
