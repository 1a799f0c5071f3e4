"""Files of one JSON object a line, as a crash may have left them."""

import contextlib
import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines that are JSON objects; what a crash cut is left out. Empty where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines that are events."""
    return [line for line in read_lines(path) if "event" in line]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are of a step."""
    return [line for line in read_lines(path) if "step" in line]


def number(line: dict[str, Any], name: str) -> float | None:
    """None where it is not there, or not finite (then a text)."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None
