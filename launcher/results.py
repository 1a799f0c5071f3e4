"""Results of launcher/evaluate.py that stay with the run.

RUN/evaluations/NAME/step-00001000.json    what it found of that checkpoint
RUN/tensorboard/evaluations/NAME/          the same as curves over the steps
"""

import fcntl
import json
import re
from pathlib import Path
from typing import Any

from launcher.metrics import new_board
from parallel.checkpoint import folder_name, write_synced

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Raises ValueError for what is no name of a folder."""
    if not NAME.fullmatch(name):
        raise ValueError(f"--save {name!r}; expected a name of letters, digits, dots and dashes, such as wiki")
    return name


def folder_of(run_dir: Path, name: str) -> Path:
    return run_dir / "evaluations" / check_name(name)


def result_path(run_dir: Path, name: str, step: int) -> Path:
    return folder_of(run_dir, name) / f"{folder_name(step)}.json"


def refuse_other_data(run_dir: Path, name: str, data: list[str]) -> None:
    """Raise ValueError where the results of that name are of other texts: they would be one curve."""
    for path in sorted(folder_of(run_dir, name).glob("step-*.json"))[:1]:
        before = json.loads(path.read_text(encoding="utf-8")).get("data", data)
        if before != data:
            shown = [" ".join(given) or "what the run holds out" for given in (before, data)]
            raise ValueError(f"--save {name}: its results are of {shown[0]}, not of {shown[1]}; choose another name")


def keep(run_dir: Path, name: str, found: dict[str, Any]) -> Path:
    """Put one result there, whole or not at all, and draw all of that name. Several processes may at a time.

    found: what evaluate gives, a number that JSON does not know as text.
    """
    path = result_path(run_dir, name, found["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_synced(path, json.dumps(found, ensure_ascii=False) + "\n")
        _draw(run_dir / "tensorboard/evaluations" / name, sorted(path.parent.glob("step-*.json")))
    return path


def _draw(board_dir: Path, results: list[Path]) -> None:
    """All points again in the order of their steps: TensorBoard takes them as they come, and drops what went before."""
    points = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    points.sort(key=lambda point: point["step"])
    board = new_board(board_dir, purge_step=points[0]["step"])
    for point in points:
        for tag, value in _scalars(point).items():
            board.add_scalar(tag, value, point["step"])
    board.close()


def _scalars(found: dict[str, Any]) -> dict[str, float]:
    sources = found.get("sources", {})  # of text
    several = sources if len(sources) > 1 else {}
    values = {f"evaluate/{key}": value for key, value in found["overall"].items()}
    values |= {f"evaluate/loss_{source}": of_source["loss"] for source, of_source in several.items()}
    return {tag: value for tag, value in values.items() if not isinstance(value, str)}
