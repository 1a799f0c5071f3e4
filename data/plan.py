"""What a corpus folder was begun with, and who may work on it: the plan, and the locks of those that share the work.

  .lock       shared by all parts at work; holds their number, so that all cut the work alike
  .lock-I     part I is at work: no one else takes its units
  .lock-step  held for what is done once: the tokenizer, the decision on duplicates, the manifest

Locks are flock's and end with their process, however it ends. On several nodes the folder's file system must carry them
from node to node, as NFS 4, GPFS and Lustre (mounted with -o flock) do.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.manifest import FORMAT_VERSION
from data.units import PrepareError, write_bytes

log = logging.getLogger(__name__)

PLAN = "plan.json"
LOCK = ".lock"
LOCK_WAIT_S = 3.0  # the processes of a preparation just killed may be a moment in ending
STEP_POLL_S = 0.1


class Part(NamedTuple):
    """Which share of the work a process does: the units whose number, over all sources, is `number` modulo `of`."""

    number: int = 0
    of: int = 1


def check_folder(folder: Path) -> None:
    """Refuse a place that is neither new nor a corpus folder, before anything is written to it."""
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"data.corpus={folder} is a file; name a folder, which is made if it does not exist")
    if folder.is_dir() and not (folder / PLAN).is_file():
        strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((LOCK, f"{PLAN}.tmp")))
        # another part may have written the plan since
        if strangers and not (folder / PLAN).is_file():
            raise PrepareError(
                f"{folder} holds other things ({', '.join(strangers[:3])}) and no {PLAN}; set data.corpus to a folder "
                "that is empty or does not exist"
            )


def check_plan(folder: Path, options: dict[str, Any], listing: dict[str, Any] | None) -> None:
    """Compare with the plan that the folder was begun with; in an empty folder, write it.

    listing: what was found of each source; None when the corpus is finished and its text may be gone: not compared then.
    """
    path = folder / PLAN
    if not path.is_file():
        assert listing is not None, "check_folder lets no manifest without a plan through"
        plan = {"format_version": FORMAT_VERSION, "options": options, "listing": listing}
        write_bytes(path, json.dumps(plan, indent=1).encode() + b"\n")
        return
    try:
        plan = json.loads(path.read_bytes())
        before = {"format_version": plan["format_version"], **_flat({"data": plan["options"]})}
        listed = plan["listing"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{path} is damaged ({error!r}); delete {folder} and prepare it again") from None
    now = {"format_version": FORMAT_VERSION, **_flat({"data": json.loads(json.dumps(options))})}
    if listing is not None:
        before, now = before | _flat({"source": listed}), now | _flat({"source": listing})
    differs = [
        f"  {key}: {before.get(key, 'not set')} in the folder, {now.get(key, 'not set')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differs:
        raise PrepareError(
            "\n".join([f"{folder} was begun with other options or other text, and the two are never mixed:", *differs])
            + "\nput these back, set data.corpus to another folder, or delete this one"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# -- locks -------------------------------------------------------------------------------------------------------------


@contextmanager
def working(folder: Path, part: Part) -> Iterator[None]:
    """Work on a folder as one part; raises PrepareError while the same part or another division is at work."""
    give_up = time.monotonic() + LOCK_WAIT_S
    with open(folder / LOCK, "a+") as crew, open(folder / f"{LOCK}-{part.number}", "a") as own:
        while not (_joined(crew, part) and _locked(own, fcntl.LOCK_EX)):
            if time.monotonic() > give_up:
                raise PrepareError(_who_works(folder, crew, part))
            fcntl.flock(crew, fcntl.LOCK_UN)
            time.sleep(0.05)
        yield


def _joined(crew: IO[str], part: Part) -> bool:
    """Share the crew's lock with parts of the same number; the first one says what it is."""
    if _locked(crew, fcntl.LOCK_EX):
        crew.truncate(0)
        crew.write(str(part.of))
        crew.flush()
    if not _locked(crew, fcntl.LOCK_SH):
        return False
    crew.seek(0)
    return crew.read() == str(part.of)


def _who_works(folder: Path, crew: IO[str], part: Part) -> str:
    crew.seek(0)
    count = crew.read()
    if count.isdigit() and int(count) != part.of:
        return (
            f"{folder} is being prepared in {count} parts, not {part.of}; wait for them, or stop them all first and "
            "start all parts with one number"
        )
    who = f"by another process as part {part.number}/{part.of}" if part.of > 1 else "by another process"
    return f"{folder} is being prepared {who}; wait for it, or stop it first"


@contextmanager
def step(folder: Path, waiting_for: str) -> Iterator[None]:
    """What one part does for all, the others waiting; waiting_for: said by those that wait."""
    with open(folder / f"{LOCK}-step", "a") as stream:
        told = False
        began = time.monotonic()
        while not _locked(stream, fcntl.LOCK_EX):
            if not told and time.monotonic() - began > 1:
                log.info("waiting for another part, %s", waiting_for)
                told = True
            time.sleep(STEP_POLL_S)
        yield


def others_at_work(folder: Path, part: Part) -> list[int]:
    """The parts that hold their lock, besides this one."""
    found = []
    for index in range(part.of):
        if index == part.number or not (path := folder / f"{LOCK}-{index}").exists():
            continue
        with open(path, "a") as stream:
            if not _locked(stream, fcntl.LOCK_SH):
                found.append(index)
    return found


def _locked(stream: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
