"""Who may write to a run's folder: one job at a time, on any file system that all its machines see.

    runs/NAME/lease/00000007.json   the holder: host, process, SLURM job, and a count that it raises while it lives

The highest number holds. It is taken by making the file of the next number, which one process alone can do (O_EXCL, on
NFS and Lustre too, where flock may not reach the other nodes); the taker then removes those below. The highest is never
removed, so numbers never go back, and who found one holder dead cannot push out the next. No clock is compared with one
of another machine.
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from launcher.launchers import process_start_of
from launcher.run_dir import RunDirError

log = logging.getLogger(__name__)

WAIT_S = 40.0  # for a holder that is just finishing: a stopped run still saves for a moment
BEAT_S = 5.0  # between heartbeats
STALE_S = 60.0  # without one, of a holder that nothing else is known about
POLL_S = 0.2  # between looks at a holder
LONGEST_LOOK_S = 1.0  # a look that takes longer (a file system that hangs, a laptop asleep) counts as this much
SQUEUE_S = 10.0  # between questions to SLURM, and at most for an answer
RECORD_BYTES = 1024  # of a lease file, whatever it says: it is written over in place
# States of a job whose processes have ended. One that is COMPLETING may still save.
GONE = ("PENDING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
        "DEADLINE", "REVOKED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")  # fmt: skip
_NAME = re.compile(r"(\d{8})\.json")


class LeaseLost(RuntimeError):
    """Another job has taken the run's folder while this one did not answer; nothing more may be written to it."""


class Holder(BaseModel, frozen=True, extra="forbid", strict=True):
    """Who holds, or held, a run's folder."""

    host: str
    machine: str  # boot and PID namespace: where the same pid is the same process
    pid: PositiveInt
    process_start: NonNegativeInt  # clock ticks after the machine's start: a pid may be given to another process
    cluster: str  # of SLURM; empty outside
    job: str
    restarts: NonNegativeInt  # how often SLURM has requeued the job
    since: str  # local time, for people
    key: str  # tells holders apart
    beat: NonNegativeInt = 0
    released: bool = False

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, restart {self.restarts}" if self.job else "no SLURM job"
        return f"host {self.host}, pid {self.pid}, {job}, since {self.since}"


class Lease:
    """This process's right to write to a run's folder, with a thread that keeps it alive. Made by sole_writer."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self._holder = path, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @property
    def key(self) -> str:
        """In the lease's file and in no other."""
        return self._holder.key

    def held(self) -> None:
        """Look whether this process still holds the folder. Raises LeaseLost, naming who took it."""
        if (lost := self.lost()) is not None:
            raise LeaseLost(lost)

    def lost(self) -> str | None:
        """Who took the folder, as the message of an error; None while it is held, or cannot be looked at."""
        try:
            number, payload = _newest(self.path.parent)
        except FileNotFoundError:
            number, payload = 0, b""
        except OSError:
            return None
        taker = _parse(payload)
        if number == _number(self.path.name) and taker is not None and taker.key == self._holder.key:
            return None
        return (
            f"{self.path.parent.parent} is no longer this job's: its lease ({self._holder}) "
            + (f"was taken by another job ({taker or 'unknown'})" if number else "was removed")
            + ", as if this one had died; it stops without saving again, and the other goes on"
        )

    def release(self) -> None:
        """Let others have the folder at once; nothing if it has been lost."""
        self._ended.set()
        self._thread.join(BEAT_S)
        if self.lost() is None:
            try:
                self._write(released=True)
            except OSError as error:
                log.warning("%s cannot be released, so that the next start may wait for it: %s", self.path, error)

    def _keep(self) -> None:
        warned = False
        while not self._ended.wait(BEAT_S):
            if (lost := self.lost()) is not None:
                log.error("%s", lost)
                os.kill(os.getpid(), signal.SIGTERM)  # all ranks leave at the next step; the save there is refused
                return
            try:
                self._write()
                warned = False
            except OSError as error:
                if not warned:
                    log.warning("the heartbeat in %s cannot be written: %s", self.path, error)
                warned = True

    def _write(self, released: bool = False) -> None:
        self._holder = self._holder.model_copy(update={"beat": self._holder.beat + 1, "released": released})
        with open(self.path, "r+b", buffering=0) as file:  # opened anew: NFS then asks the server
            file.write(_record(self._holder))


@contextlib.contextmanager
def sole_writer(run_dir: Path, wait_s: float = WAIT_S) -> Iterator[Lease]:
    """Hold the run's folder against other jobs.

    A holder that has died is replaced: at once where its end is certain, else when its heartbeat stands still for
    STALE_S. Waits up to wait_s for one that lives to finish, then raises RunDirError naming it.
    """
    try:
        lease = _take(run_dir, wait_s)
    except OSError as error:
        raise RunDirError(
            f"{run_dir / 'lease'} cannot be written: {error.strerror or error}; choose another place with run.folder"
        ) from error
    try:
        yield lease
    finally:
        lease.release()


def _take(run_dir: Path, wait_s: float) -> Lease:
    folder, me = run_dir / "lease", this_process()
    folder.mkdir(exist_ok=True)
    began, announced, watch = time.monotonic(), False, None
    while True:
        number, payload = _newest(folder)
        if watch is None or watch.number != number:
            watch = _Watch(number, payload)
        else:
            watch.look(payload)
        holder = _parse(payload)
        if (why := _why_free(holder, me, watch)) is not None:
            if _make(folder / f"{number + 1:08d}.json", me):
                if why:
                    print(f"taking {run_dir} over from another job ({holder or 'unknown'}): {why}", flush=True)
                return Lease(folder / f"{number + 1:08d}.json", me)
            continue  # another was quicker
        waited_s = time.monotonic() - began
        if waited_s >= wait_s and (watch.beats or _same_machine(holder, me)):
            raise RunDirError(
                f"{run_dir} is in use by another job ({holder or 'unknown'}; {watch}); stop that one first, or use "
                "another run.name"
            )
        if not announced:
            print(f"waiting for the job that holds {run_dir}, up to {wait_s:.0f} s if it lives: {holder or 'unknown'}",
                  flush=True)  # fmt: skip
            announced = True
        time.sleep(POLL_S)


def _make(path: Path, me: Holder) -> bool:
    """Make the lease file of the next number and remove those below; False if another process has it."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, _record(me))
        os.fsync(handle)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)
    number, payload = _newest(path.parent)
    taker = _parse(payload)
    if number != _number(path.name) or taker is None or taker.key != me.key:
        with contextlib.suppress(OSError):  # this process slept, others went on, and its number was free again
            path.unlink()
        return False
    for other in path.parent.iterdir():
        if (_number(other.name) or number) < number:
            with contextlib.suppress(OSError):  # who looks goes by the highest
                other.unlink()
    return True


class _Watch:
    """What a holder's file has shown, by this process's own clock; only time in which it was looked at counts."""

    def __init__(self, number: int, payload: bytes) -> None:
        self.number = number
        self.beats = 0  # seen to change
        self.quiet_s = 0.0  # without a change
        self.next_question = 0.0
        self._payload, self._looked = payload, time.monotonic()

    def look(self, payload: bytes) -> None:
        now = time.monotonic()
        if payload != self._payload:
            self._payload, self.quiet_s = payload, 0.0
            self.beats += 1
        else:
            self.quiet_s += min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now

    def __str__(self) -> str:
        return f"{'last heartbeat' if self.beats else 'no heartbeat seen, watched since'} {self.quiet_s:.0f} s ago"


def _why_free(holder: Holder | None, me: Holder, watch: _Watch) -> str | None:
    """Why the folder may be taken: "" where nobody holds it, else how its holder is known to be dead; None if it is not."""
    if watch.number == 0 or (holder is not None and holder.released):
        return ""
    if holder is not None:
        if _same_machine(holder, me):
            return None if _runs(holder.pid, holder.process_start) else "its process has ended"
        if holder.job and (holder.cluster, holder.job) == (me.cluster, me.job) and me.restarts > holder.restarts:
            return f"it is this SLURM job before it was requeued, restart {me.restarts} now"
        if holder.cluster and holder.cluster == me.cluster and time.monotonic() >= watch.next_question:
            state = _slurm_state(holder.job)
            watch.next_question = time.monotonic() + SQUEUE_S
            if state in GONE:
                return f"SLURM says that its job is {state}"
    if watch.quiet_s >= STALE_S:
        return f"its heartbeat stood still for {watch.quiet_s:.0f} s"
    return None


def this_process() -> Holder:
    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(name) if "/ns/" in name else Path(name).read_text().strip()
        return ""

    return Holder(
        host=socket.gethostname(),
        machine=f"{read('/proc/sys/kernel/random/boot_id')} {read('/proc/self/ns/pid')}",
        pid=os.getpid(),
        process_start=process_start_of(os.getpid()) or 0,
        cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        key=secrets.token_hex(8),
    )


def _same_machine(holder: Holder | None, me: Holder) -> bool:
    return holder is not None and (holder.host, holder.machine) == (me.host, me.machine)


def _runs(pid: int, process_start: int) -> bool:
    """Whether a process of this machine lives that began then."""
    found = process_start_of(pid)
    if found is not None:
        return found == process_start
    try:
        os.kill(pid, 0)  # /proc may hide processes of other users
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _slurm_state(job: str) -> str | None:
    """The state of a SLURM job; COMPLETED for one that SLURM has forgotten, None if it does not say."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Invalid job id" in done.stderr:
        return "COMPLETED"
    return done.stdout.strip() or None if done.returncode == 0 else None


def _newest(folder: Path) -> tuple[int, bytes]:
    """The highest number and what its file says; 0 where there is none."""
    while True:
        number = max((_number(name) or 0 for name in os.listdir(folder)), default=0)
        if number == 0:
            return 0, b""
        with contextlib.suppress(FileNotFoundError):  # a taker removed it, so there is a higher one
            return number, (folder / f"{number:08d}.json").read_bytes()
        time.sleep(POLL_S / 10)


def _number(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def _record(holder: Holder) -> bytes:
    return holder.model_dump_json().encode().ljust(RECORD_BYTES - 1) + b"\n"


def _parse(payload: bytes) -> Holder | None:
    """None for what is no record: one that is just being made, or was cut by a crash."""
    try:
        return Holder.model_validate_json(payload)
    except ValidationError:
        return None
