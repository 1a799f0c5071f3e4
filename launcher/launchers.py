"""Who started this rank, and whether it still lives: a rank that nobody waits for any more must not run on.

To be imported before torch, which takes seconds: a launcher that ends in them would not be among the ancestors any more,
and nothing that a rank finds later tells for certain that it ever was. So: the standard library alone.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.5
_NEVER = -2  # no process has it


class Launcher(NamedTuple):
    """A process, named so that another one of the same number is not taken for it."""

    pid: int
    start: int

    def ended(self) -> bool:
        return process_start_of(self.pid) != self.start


def process_start_of(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's, -1 if it has ended and waits for its parent; None if unseen."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return -1 if state in "ZX" else int(rest[18])


def up_s() -> float | None:
    """Seconds since this process began; None where the system does not tell."""
    start = process_start_of(os.getpid())
    return None if start is None else time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")


def launchers_of(pid: int, env: Mapping[str, str], proc: Path = Path("/proc")) -> list[Launcher]:
    """The ancestors of `pid` that are there for its sake: torchrun, or DeepSpeed's launch.py and the runner before it.

    Empty for a process that no launcher started. Between rank and launcher there may be others (numactl, a shell).
    """
    found: list[Launcher] = []
    while "RANK" in env and len(found) < 2:
        try:
            pid = int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):  # beyond the first process, or of a user whose processes are hidden
            break
        if any(_is_launcher(word) for word in words[:4]):
            start = process_start_of(pid)
            found.append(Launcher(pid, _NEVER if start is None else start))  # it has ended just now
        elif found:
            break
    return found


def _is_launcher(word: str) -> bool:
    modules = ("deepspeed.launcher.launch", "torch.distributed.run")
    return word in modules or Path(word).name in ("deepspeed", "ds", "torchrun")


STARTED_BY = launchers_of(os.getpid(), os.environ)


@contextlib.contextmanager
def leaving_with_launcher(launchers: list[Launcher] = STARTED_BY) -> Iterator[None]:
    """End this process with its launcher: for the time in which the ranks meet, when there is nothing to save.

    The main thread waits in a connection then, for half an hour if nobody answers.
    """
    met = threading.Event()

    def look() -> None:
        while not met.wait(POLL_S):
            if any(launcher.ended() for launcher in launchers):
                text = "longhaul: the launcher of this rank ended before the ranks had met; nothing was started\n"
                with contextlib.suppress(OSError):  # of a pipe whose reader has ended, too
                    os.write(2, text.encode())
                os._exit(1)

    thread = threading.Thread(target=look, name="launcher", daemon=True)
    if launchers:
        thread.start()
    try:
        yield
    finally:
        met.set()
