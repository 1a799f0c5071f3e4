"""A run on disk: its folder, the config it keeps, and the ledger of what happened to it."""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from launcher.config import RunConfig, to_yaml

log = logging.getLogger(__name__)

FOLDERS, FILES = ("logs", "reads", "tensorboard"), ("ledger.jsonl", "metrics.jsonl")  # of every run, empty at first


class RunDirError(RuntimeError):
    """The run's folder cannot be used; nothing in it was changed."""


def read_saved_config(run_dir: Path) -> dict[str, Any] | None:
    """The resolved config that a run began with, None for a new run. Raises RunDirError if it is not readable YAML."""
    path = run_dir / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirError(f"{path} cannot be read: {error}; restore it, or use another run.name") from error
    if not isinstance(saved, dict):
        raise RunDirError(f"{path} holds no config; restore it, or use another run.name")
    return saved


def prepare_run_dir(cfg: RunConfig, needed_bytes: int) -> None:
    """Make the run's folder and prove that it can be written and can hold a checkpoint of `needed_bytes`.

    Raises RunDirError: read-only, not a folder, or too little space.
    """
    run_dir = cfg.run_dir
    probe = run_dir / f".probe-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        for folder in FOLDERS:
            (run_dir / folder).mkdir(exist_ok=True)
        for file in FILES:
            open(run_dir / file, "ab").close()
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise RunDirError(
            f"{error.filename or run_dir} cannot be written: {error.strerror or error}; choose another place with run.folder"
        ) from error
    if free < needed_bytes:
        raise RunDirError(
            f"{run_dir} has {free / 1e9:.2f} GB free; one checkpoint of this model takes {needed_bytes / 1e9:.2f} GB and "
            "needs that beside the last one; free some space or choose another place with run.folder"
        )


def remove_unbegun(run_dir: Path) -> None:
    """Remove the folder of a run that was refused before it began: what prepare_run_dir makes, as long as it is empty."""
    with contextlib.suppress(OSError):
        if all((run_dir / file).stat().st_size == 0 for file in FILES):
            (run_dir / "lease/00000001.json").unlink()  # the first's; another job that has come has put its own there
            for folder in ("lease", *FOLDERS):
                (run_dir / folder).rmdir()  # refused where something is in it
            for file in FILES:
                (run_dir / file).unlink()
            run_dir.rmdir()


def save_config(cfg: RunConfig) -> None:
    """Replace config.yaml whole. Each checkpoint's manifest keeps the config of its time."""
    staging = cfg.run_dir / "config.yaml.tmp"
    staging.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(staging, cfg.run_dir / "config.yaml")


class Ledger:
    """ledger.jsonl: one JSON object for each start, resume, checkpoint, stop and end of a run. Rank 0 writes it.

    What a full disk does not take is kept and written with the next event.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ledger.jsonl"
        self._pending = ""
        self._lock = threading.Lock()  # saves tell of their end from a thread

    def add(self, event: str, **fields: Any) -> None:
        with self._lock:
            self._pending += json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self._pending)
                    file.flush()
                    os.fsync(file.fileno())
                self._pending = ""
            except OSError as error:
                if not self._pending.startswith("\n"):
                    self._pending = "\n" + self._pending  # a part of it may be there
                log.warning("%s cannot be written (%s); its lines are kept for the next time", self.path, error)

    def tells_finished(self, step: int) -> bool:
        """Whether the run was evaluated and ended at this step."""
        return any(event["event"] == "finished" and event.get("step") == step for event in self.events())

    def saved_step(self) -> int | None:
        """Of the newest checkpoint that it tells of, None where there is none; 0: of what was imported."""
        saved = ("checkpoint", "imported")
        return next((int(event["step"]) for event in reversed(self.events()) if event["event"] in saved), None)

    def imported(self) -> dict[str, Any] | None:
        """What the run was imported from: "place" and "digest"; None for one that was not."""
        return next((event for event in self.events() if event["event"] == "imported"), None)

    def left_out(self) -> list[tuple[int, int]]:
        """Stretches of samples that rewinds have left out, first and last each, in the order of the rewinds."""
        return [
            (int(event["samples"][0]), int(event["samples"][1]))
            for event in self.events()
            if event["event"] == "rewind"
        ]

    def events(self) -> list[dict[str, Any]]:
        """All whole lines that are events; one that a crash cut, or that something else wrote, is left out.

        Raises RunDirError where they are there and cannot be read.
        """
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RunDirError(
                f"{self.path} cannot be read: {error.strerror}; restore it, or use another run.name"
            ) from None
        events = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
        return events
