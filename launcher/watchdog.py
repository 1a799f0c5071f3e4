"""A thread beside the training on every rank, so that a job ends when it can no longer go on: soon, on all ranks, and with
its cause in one line.

The ranks tell each other where they are over the store at which they met (parallel/mesh.py), never over a process group:
a rank that waits in a collective still answers here. Four things end a job:

    a rank fails                       its record is seen by all others within a beat; they leave GRACE_S later
    a rank's process ends by itself    SIGKILL, out of memory: seen by the ranks on the same machine, who record it; by
                                       those on other machines, whose connections break, when its heartbeat stops
    a phase lasts longer than allowed  the late rank is named: one that does not answer, else the one that is behind
    the launcher ends                  as SIGTERM: saved at the next step; after LAUNCHER_GRACE_S without it
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from launcher.launchers import STARTED_BY, process_start_of
from launcher.lease import this_process
from launcher.redaction import hide
from launcher.signals import LAUNCHER_ENDED, StopFlag
from parallel.mesh import Mesh

log = logging.getLogger(__name__)

BEAT_S = 1.0  # between looks, and between heartbeats
GRACE_S = 5.0  # for the main thread to end in its own way, once the job has failed
LAUNCHER_GRACE_S = 30.0  # for the save at the next step, once the launcher is gone
LATE_SHARE = 0.25  # of the limit: from then on a warning names who is behind
ALLOWANCE_S = {"start-up": 1800.0, "save": 3600.0}  # that these phases may last beyond the limit
SILENT_BEATS = 3  # without a heartbeat: the rank does not answer
LOST_STORE = 5  # beats in a row that the store may refuse to answer
ANSWER_S = 3.0  # for an answer of the store; a machine that is stopped gives none
_FAILURE = "watchdog/failure"
_EFFECT = "The cause: "


class _Peer(NamedTuple):
    """A process, named so that another one of the same number is not taken for it."""

    rank: int
    host: str
    machine: str  # boot and PID namespace: hosts may share a name
    pid: int
    start: int


class Watchdog:
    """Watches this rank and its peers. Made on all ranks together; `enter` at each phase of the train loop."""

    def __init__(
        self, mesh: Mesh, limit_s: float, stop: StopFlag, tell: Callable[[str], None] = lambda cause: None
    ) -> None:
        """limit_s: that a phase may last, of time in which this thread ran.    tell: given the cause when the job is ended
        from the thread, because the main thread no longer answers.
        """
        self._mesh, self._limit_s, self._stop, self._tell = mesh, limit_s, stop, tell
        self._store, self._asking = mesh.open_store(), ThreadPoolExecutor(1, thread_name_prefix="watchdog-store")
        self._asked: Future | None = None
        self._one_at_a_time = threading.Lock()  # this thread and the main thread ask
        here = this_process()
        me = _Peer(mesh.rank, here.host, here.machine, here.pid, here.process_start)
        self._peers = [_Peer(*fields) for fields in mesh.gather(tuple(me))]
        self._neighbours = [
            peer for peer in self._peers if (peer.host, peer.machine) == me[1:3] and peer.rank != mesh.rank
        ]
        self._oom_kills = {peer.pid: OomKills(peer.pid) for peer in self._neighbours}
        self._phase, self._step, self._samples, self._entered = "start-up", 0, "", 0
        self._beat, self._lasted_s, self._warned, self._failed_beats = 0, 0.0, False, 0
        self._seen, self._looked = 0, time.monotonic()
        self._launcher_ended: float | None = None
        self._cause: str | None = None  # as this rank knows it: the store may be gone
        self._told: str | None = None
        self._ended = threading.Event()
        self._publish()
        mesh.barrier()  # every state is there from the first look on
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int, samples: Sequence[int] = ()) -> None:
        """The main thread begins a phase of optimizer step `step`; samples: (first, one past the last), of all ranks."""
        self._samples = f", samples {samples[0]} to {samples[1] - 1}" if samples else ""
        self._phase, self._step = phase, step
        self._entered += 1

    def within(self, step: int, samples: Sequence[int] = ()) -> Callable[[str], None]:
        """`enter` for the phases of one step."""
        return lambda phase: self.enter(phase, step, samples)

    def failed(self, error: BaseException) -> str:
        """Call with what ends this rank; returns the cause: of the rank that failed first, which may be another.

        A broken connection is an effect: whose end it was is waited for, some beats at most. The error has the cause as a
        note then (is_effect).
        """
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError):
            before, until = self._states(), time.monotonic() + SILENT_BEATS * BEAT_S
            while self._failure() is None and time.monotonic() < until:
                self._look_for_dead()
                time.sleep(BEAT_S / 10)
            if self._failure() is None:
                self._blame_silent(before, what)
        mine = f"{self._name(self._mesh.rank)} failed first, in {self._where()}: {what}; traceback in {_log_file()}"
        self._record(mine)
        cause = self._failure() or what
        if cause not in (what, hide(mine)[:2000]):
            error.add_note(f"{_EFFECT}{cause}")
        return cause

    @property
    def hosts(self) -> list[str]:
        """Of all ranks, by rank."""
        return [peer.host for peer in self._peers]

    @property
    def starting(self) -> bool:
        """Whether no step has begun."""
        return self._phase == "start-up"

    def close(self) -> None:
        """Stop watching; peers that see this process end know then that it was meant to."""
        self._ended.set()
        self._thread.join()
        self._publish(ended=True)

    # -- in the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._look()
            except Exception:  # one look less; without the thread nobody would look
                log.exception("the watchdog could not look")

    def _look(self) -> None:
        now = time.monotonic()
        if self._entered != self._seen:
            self._seen, self._lasted_s, self._warned = self._entered, 0.0, False
        self._lasted_s += min(now - self._looked, 2 * BEAT_S + ANSWER_S)  # a laptop asleep is no hang
        self._looked = now
        if self._launcher_ended is None and any(launcher.ended() for launcher in STARTED_BY):
            self._launcher_ended = now
            log.warning("the launcher of this rank has ended; stopping as on SIGTERM, saved at the next step")
            self._stop.request(LAUNCHER_ENDED)
        self._publish()
        self._look_for_dead()
        if (cause := self._failure()) is not None:
            self._leave_with_the_others(cause)
        if self._failed_beats > LOST_STORE and self._launcher_ended is None:
            self._end(self._no_store())
        if self._launcher_ended is not None and now - self._launcher_ended > LAUNCHER_GRACE_S and self._phase != "save":
            self._end(f"its launcher ended, and {LAUNCHER_GRACE_S:.0f} s later it still was in {self._where()}")
        if self._lasted_s > self._limit_s + ALLOWANCE_S.get(self._phase, 0.0):
            self._hang()
        elif self._lasted_s > LATE_SHARE * self._limit_s and not self._warned:
            self._warn()

    def _where(self) -> str:
        return f"{self._phase} of step {self._step}{self._samples}"

    def _publish(self, ended: bool = False) -> None:
        self._beat += 1
        state = {
            "beat": self._beat,
            "entered": self._entered,
            "where": self._where(),
            "lasted_s": round(self._lasted_s),
            "ended": ended,
        }
        self._ask(lambda: self._store.set(f"watchdog/{self._mesh.rank}", json.dumps(state)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer; None where it gives none."""
        with self._one_at_a_time:
            if self._asked is not None and not self._asked.done():
                return None
            try:
                self._asked = self._asking.submit(question)
                answer = self._asked.result(ANSWER_S)
            except TimeoutError:  # it may be stopped for a while; the limit of the phase decides
                return None
            except Exception:  # of whatever kind the store's backend raises
                self._failed_beats += 1
                return None
            self._failed_beats = 0
            return answer

    def _states(self) -> list[dict[str, Any]]:
        keys = [f"watchdog/{rank}" for rank in range(self._mesh.world_size)]
        answers = self._ask(lambda: [json.loads(value) for value in self._store.multi_get(keys)])
        return answers or []

    def _failure(self) -> str | None:
        """Why the job fails: what the first rank wrote down, or, where the store does not answer, what this one knows."""
        if self._ask(lambda: self._store.check([_FAILURE])):
            answer = self._ask(lambda: self._store.get(_FAILURE))
            if answer is not None:
                self._cause = answer.decode(errors="replace")
        return self._cause

    def _record(self, cause: str) -> None:
        """Write down why the job fails, if nothing is there yet; the writer says so aloud."""
        cause = hide(cause)[:2000]
        answer = self._ask(lambda: self._store.compare_set(_FAILURE, "", cause))
        self._cause = answer.decode(errors="replace") if answer is not None else self._cause or cause
        if self._cause == cause and self._told is None:
            self._told = cause
            log.error("%s", cause)

    def _look_for_dead(self) -> None:
        for peer in self._neighbours:
            if process_start_of(peer.pid) != peer.start:
                why = "its process was ended from outside, without a word (SIGKILL?)"
                if self._oom_kills[peer.pid].rose():
                    why = "its process was killed, out of memory: the kernel counts an OOM kill in its control group"
                states = self._states()
                if states and states[peer.rank]["ended"]:
                    continue
                self._record(f"{self._name(peer.rank)} failed first, {self._when(states, peer.rank)}: {why}")

    def _blame_silent(self, before: list[dict[str, Any]], what: str) -> None:
        """A connection broke, `what`, and no neighbour has ended: record the rank whose heartbeat has stopped since."""
        now = self._states()
        if not before or not now:
            if self._failed_beats:
                self._record(f"{self._no_store()}; {self._name(self._mesh.rank)} met {what}")
            return
        for rank in _silent(before, now):
            if not now[rank]["ended"]:
                self._record(
                    f"{self._name(rank)} failed first, {self._when(now, rank)}: it does not answer any more; "
                    f"{self._name(self._mesh.rank)} met {what}"
                )

    def _when(self, states: list[dict[str, Any]], rank: int) -> str:
        """Where a rank was, by its own last word, which is up to a beat old, and where this one is."""
        seen = f"last seen in {states[rank]['where']}, " if states else ""
        return f"{seen}while rank {self._mesh.rank} was in {self._where()}"

    def _no_store(self) -> str:
        return f"{self._name(0)}, or the launcher that keeps the ranks' meeting place, does not answer any more"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._peers[rank].host}"

    def _late(self) -> tuple[list[int], list[int], list[dict[str, Any]]]:
        """(ranks that do not answer, ranks that are behind, all states); none are late where all are alike. Takes beats."""
        before = self._states()
        for _ in range(SILENT_BEATS):
            if self._ended.wait(BEAT_S):
                return [], [], []
            self._publish()
        now = self._states()
        if not before or not now:
            return [], [], []
        silent = _silent(before, now)
        progress = [state["entered"] for state in now]
        behind = [rank for rank, entered in enumerate(progress) if entered < max(progress)]
        return silent, behind, now

    def _warn(self) -> None:
        """Of the ranks that wait, the first one says for whom."""
        self._warned = True
        entered = self._entered
        silent, behind, states = self._late()
        late = silent or behind
        waiting = [rank for rank in range(self._mesh.world_size) if rank not in late]
        if late and waiting and waiting[0] == self._mesh.rank and entered == self._entered:
            log.warning(
                "waiting for %.0f s in %s, the limit is parallel.timeout_s=%g: %s",
                self._lasted_s,
                self._where(),
                self._limit_s,
                self._describe(silent, behind, states),
            )

    def _describe(self, silent: list[int], behind: list[int], states: list[dict[str, Any]]) -> str:
        """Who is late: a rank that does not answer, whose last word may be a beat old, else one that is behind."""
        late = silent or behind
        where, others = states[late[0]]["where"], f", nor {len(late) - 1} others" if len(late) > 1 else ""
        if silent:
            return f"{self._name(late[0])} does not answer{others}, last seen in {where}"
        return f"{self._name(late[0])} does not go on{others}, in {where} for {states[late[0]]['lasted_s']} s"

    def _hang(self) -> None:
        entered = self._entered
        silent, behind, states = self._late()
        late = silent or behind
        if entered != self._entered:
            return  # it went on after all
        if self._failure() is None and states:
            limit = f"the limit is parallel.timeout_s={self._limit_s:g}"
            if late and self._mesh.rank not in late:
                who = self._describe(silent, behind, states)
                self._record(f"{who}; others wait in {self._where()}; {limit}. Stacks are in logs/")
            elif not late:
                self._record(
                    f"the job hangs in {self._where()}: no rank is behind and none goes on; {limit}. They wait for "
                    "different collectives, or for storage or a device: the stacks of all ranks are in logs/"
                )
        if not states:
            self._kill_stopped([0])
            self._end(
                f"{self._name(0)} does not answer, and it keeps the ranks' meeting place; this rank waits in "
                f"{self._where()}; the limit is parallel.timeout_s={self._limit_s:g}. Stacks are in logs/"
            )
        cause = self._failure()
        if cause is not None:
            _dump_stacks()
            self._kill_stopped(silent)
            self._leave_with_the_others(cause)

    def _kill_stopped(self, silent: list[int]) -> None:
        """A stopped process does not end by itself: who waits for it on the same machine ends it."""
        for peer in self._neighbours:
            if peer.rank in silent and process_start_of(peer.pid) == peer.start:
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)

    def _leave_with_the_others(self, cause: str) -> None:
        """The main thread may find its own way out; what is still there after GRACE_S is ended."""
        if self._told is None:
            self._told = cause
            log.info("%s", cause)
        if not self._ended.wait(GRACE_S):
            self._end(cause)

    def _end(self, cause: str) -> None:
        """End this process from the thread."""
        if self._told is None:
            self._told = cause
            log.error("%s", cause)
        _dump_stacks()
        with contextlib.suppress(Exception):  # nothing may keep the process now
            self._tell(cause)
        logging.shutdown()
        os._exit(1)


def is_effect(error: BaseException) -> bool:
    """Whether the watchdog has found that another rank's failure is the cause."""
    return any(note.startswith(_EFFECT) for note in getattr(error, "__notes__", ()))


def _log_files() -> list[logging.FileHandler]:
    """This rank's, from when its logging is configured."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]


def _log_file() -> str:
    return next((f"logs/{Path(handler.baseFilename).name}" for handler in _log_files()), "its output")


def _dump_stacks() -> None:
    """The Python stacks of all threads into this rank's log file."""
    for handler in _log_files():
        if handler.stream is not None:
            handler.flush()
            with contextlib.suppress(OSError, ValueError):
                faulthandler.dump_traceback(handler.stream, all_threads=True)


def _silent(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[int]:
    return [rank for rank, state in enumerate(now) if state["beat"] == before[rank]["beat"]]


class OomKills:
    """How often the kernel has killed in the control group of a process for want of memory, as it tells."""

    def __init__(self, pid: int, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        """groups: where the control groups are mounted."""
        self._files: list[Path] = []
        with contextlib.suppress(OSError):
            for line in (proc / str(pid) / "cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if controllers == "":  # version 2
                    top, name = groups, "memory.events"
                elif "memory" in controllers.split(","):
                    top, name = groups / "memory", "memory.oom_control"
                else:
                    continue
                # in a container the path may be the one seen from outside, and the container's own group the top
                self._files += [top / path.strip("/") / name, top / name]
        self._before = self._count()

    def _count(self) -> int:
        for file in self._files:
            with contextlib.suppress(OSError, ValueError):
                rows = file.read_text().splitlines()
                return next((int(row.split()[1]) for row in rows if row.startswith("oom_kill ")), 0)
        return 0

    def rose(self) -> bool:
        """Whether there were more since this was made."""
        return self._count() > self._before
