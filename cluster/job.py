"""Inside a job: start the ranks, have them stop in time, requeue the job until the run is finished. Called by job.sh.

    job.py --run-dir RUN --lead-s 300 --max-failures 3 … -- srun … launcher/pretrain.py …
    job.py … --preflight '{…}' -- srun … launcher/preflight.py … -- srun … launcher/pretrain.py …

Nodes that fail the pre-flight are left out where enough others remain, and excluded when the job is requeued.

The ranks save and leave on SIGUSR1, which this forwards and repeats. It is sent by SLURM before the time limit or a
preemption, by a person (`scancel --batch --signal=USR1 JOB`), or by this program itself when the time limit is near and
nobody has. What happened, and what was decided, is one line of RUN/jobs.jsonl and of the job's output.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from cluster.config import ClusterError, Preflight
from cluster.nodes import Chosen, Needs, choose, hostnames, on_nodes, requeue, to_exclude, write_hostfile
from cluster.records import heartbeat, lead_for, note, read_events, saved_step
from cluster.slurm import JobState, job_state

ASK_EVERY_S = 2.0  # SIGUSR1 again, as ranks that are just starting ignore it
LISTEN_EVERY_S = 10.0  # whether the ranks still hold the run's folder
# since their last heartbeat, if they told their end, or not: then srun is not waited for
ENDED_S, SILENT_S = 120.0, 900.0
LOOK_EVERY_S = 120.0  # at the time that is left, which may be changed from outside
GRAIN_S = 120  # a warning this much earlier than asked for is still of the time limit
PORTS = range(20_000, 30_000)  # below those that the system gives to outgoing connections
STOPPED, REFUSED = 75, 2  # exit codes of launcher/pretrain.py and finetune.py
TIME_LIMIT = "the time limit is near"
ENDS = ("stopped", "failed", "finished")  # of a start, in the ledger
STOP_AT = "train.stop_at"  # as the ledger has it

Kind = Literal["finished", "stopped", "refused", "failed"]


class Asked:
    """Why the ranks have been asked to stop; empty while they have not."""

    def __init__(self) -> None:
        self.why = ""
        self.signal_number = 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number


@dataclass(frozen=True)
class End:
    """How one start of the ranks ended."""

    kind: Kind
    cause: str  # one line; of a finished run empty, or why it has not all its steps
    saved_step: int  # of the run now
    progress: bool  # it was saved further than before
    blameless: bool = False  # others wanted the place; says nothing about the run


@dataclass(frozen=True)
class Verdict:
    requeue: bool
    code: int  # of the job, where it is not requeued
    text: str


def judge(code: int, asked: str, before: list[dict[str, Any]], after: list[dict[str, Any]], output: str) -> End:
    """How a start ended. before, after: the ledger's events; output: the job's, of this start.

    The ledger counts more than the exit code: `deepspeed` ends with 0 where a rank was killed.
    """
    new = after[len(before) :]
    kinds = [event["event"] for event in new]
    last = next((e["event"] for e in reversed(after) if e["event"] in ("start", *ENDS)), "")
    saved = saved_step(after)
    progress = saved != saved_step(before)
    if code == 0 and last == "finished":
        return End("finished", "", saved, progress)
    if any(event["event"] == "stopped" and event.get("cause") == STOP_AT for event in new):
        return End("finished", STOP_AT, saved, progress)
    if code == STOPPED or "stopped" in kinds:
        return End("stopped", asked or "a signal to the ranks", saved, progress, asked != TIME_LIMIT)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    refused = [line for line in lines if line.startswith(("pretrain: ", "finetune: "))]
    if code == REFUSED or (refused and "start" not in kinds):
        return End("refused", refused[-1] if refused else "see above", saved, progress)
    failed = [str(event.get("error")) for event in new if event["event"] == "failed"]
    if asked and not failed:
        return End("stopped", f"{asked}; it could not save any more", saved, progress, asked != TIME_LIMIT)
    errors = [line for line in lines if re.search(r"\b\w*Error\b|\berror:", line)] or lines
    cause = failed[-1] if failed else errors[-1] if errors else "no output"
    return End("failed", f"exit code {code}: {cause}"[:500], saved, progress)


def decide(end: End, in_a_row: int, max_failures: int, now: JobState) -> Verdict:
    """Whether the job is to be requeued. in_a_row: starts until now, this one included, that brought the run no further."""
    if end.kind == "finished":
        return Verdict(
            False, 0, f"the run is where it was to stop: {end.cause}" if end.cause else "the run is finished"
        )
    if end.kind == "refused":
        return Verdict(False, REFUSED, f"not requeued, as it would be refused again: {end.cause}")
    what = f"{'stopped' if end.kind == 'stopped' else 'failed'} ({end.cause}), saved step {end.saved_step}"
    if now.state not in ("RUNNING", "") and now.reason != "TimeLimit":
        return Verdict(False, STOPPED, f"{what}; SLURM is ending the job itself ({now.state})")
    if in_a_row >= max_failures:
        return Verdict(
            False, 1, f"{what}; not requeued: {in_a_row} starts in a row saved nothing beyond step {end.saved_step}. Mend "
            "the cause and submit again",
        )  # fmt: skip
    return Verdict(True, STOPPED, f"{what}; requeued")


def starts_in_vain(run_dir: Path, job: str) -> int:
    """How many of this job's last starts in a row brought the run no further, those left out that were not to blame."""
    count = 0
    for event in reversed(read_events(run_dir / "jobs.jsonl")):
        if event["event"] == "end" and event.get("job") == job:
            if event.get("progress"):
                break
            count += not event.get("blameless")
    return count


class Silence:
    """How long nobody has written to the run's folder, once the ranks of this start did."""

    def __init__(self, run_dir: Path, now: float) -> None:
        self._run_dir, self._since, self._begun = run_dir, now, False
        self._last = heartbeat(run_dir)

    def too_long(self, now: float) -> bool:
        """Whether srun waits in vain: seen when the network lost what a node was to tell it of its task's end."""
        found = heartbeat(self._run_dir)
        if found != self._last:
            self._last, self._since, self._begun = found, now, True
        quiet_s = now - self._since if self._begun else 0.0
        return quiet_s > SILENT_S or (quiet_s > ENDED_S and _told_end(read_events(self._run_dir / "ledger.jsonl")))


def _told_end(ledger: list[dict[str, Any]]) -> bool:
    return next((e["event"] for e in reversed(ledger) if e["event"] in ("start", *ENDS)), "start") in ENDS


def attend(ranks: subprocess.Popen[bytes], run_dir: Path, job: str, lead_s: int, asked: Asked) -> int:
    """Wait for the ranks to end, asking them to stop when it is time. Returns their exit code."""
    look = ask = listen = 0.0
    deadline: float | None = None
    silence = Silence(run_dir, time.monotonic())
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return ranks.wait(1.0)
        now = time.monotonic()
        if now >= listen:
            listen = now + LISTEN_EVERY_S
            if silence.too_long(now):
                print("job.py: the ranks have left the run's folder, and srun still waits for them: ended", flush=True)
                ranks.kill()
                return ranks.wait()
        if now >= look:
            look, left_s = now + LOOK_EVERY_S, job_state(job).left_s
            deadline = None if left_s is None else now + left_s - lead_s
        if not asked.why:
            near = deadline is not None and now >= deadline - (GRAIN_S if asked.signal_number else 0)
            if asked.signal_number in (signal.SIGTERM, signal.SIGINT):
                asked.why = f"{signal.Signals(asked.signal_number).name} to the job"
            elif near:
                asked.why = TIME_LIMIT
            elif asked.signal_number:
                asked.why = "SIGUSR1 to the job: preemption, or by hand"
            if asked.why:
                print(f"job.py: asking the ranks to save and stop: {asked.why}", flush=True)
        if asked.why and now >= ask:
            ask = now + ASK_EVERY_S
            ranks.send_signal(signal.SIGUSR1)


def meeting_place(interface: str | None) -> tuple[str, int]:
    """Address and port where the ranks meet: this host, the job's first, so that every rank is told the same.

    Raises OSError naming the interfaces there are.
    """
    address = socket.gethostname()
    if interface is not None:
        found = {name: ip for _, name in socket.if_nameindex() if (ip := _address(name)) is not None}
        if interface not in found:
            raise OSError(
                f"the node {address} has no network interface {interface} with an IPv4 address; it has "
                + ", ".join(f"{name} ({ip})" for name, ip in found.items())
            )
        address = found[interface]
    for port in random.sample(PORTS, 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return address, port
    raise OSError(f"of 100 ports tried between {PORTS.start} and {PORTS.stop} on {address} none is free")


def _address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(s.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
    return None


def output_of_this_start() -> tuple[Path | None, int]:
    """The file that this job writes to, and how long it is now."""
    with contextlib.suppress(OSError):
        path = Path(os.readlink("/proc/self/fd/1"))
        if path.is_file():
            return path, path.stat().st_size
    return None, 0


def read_output(path: Path | None, offset: int, at_most: int = 200_000) -> str:
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(offset, path.stat().st_size - at_most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """The options, and the commands: that which starts the ranks is the last, before it may be that which measures nodes."""
    own, *commands = "\0".join(argv).split("\0--\0", 1)
    parser = argparse.ArgumentParser(prog="cluster/job.py", description=__doc__, usage="%(prog)s … -- COMMAND …")
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--lead-s", required=True, type=int, help="seconds before the time limit to save and stop")
    parser.add_argument("--max-failures", required=True, type=int, help="starts in a row that save nothing")
    parser.add_argument("--node-counts", required=True, type=_numbers, help="on how many nodes the run can be, 2,4")
    parser.add_argument("--tasks-per-node", required=True, type=int, help="that srun starts")
    parser.add_argument("--interface", help="network interface over which the ranks meet")
    parser.add_argument("--slots", type=int, help="write RUN/hostfile with as many for each node")
    parser.add_argument(
        "--preflight", type=_limits, help="what each node must show, JSON; a command before that of the ranks"
    )
    parser.add_argument("--devices", type=int, default=0, help="accelerators that each node must have then")
    args = parser.parse_args(own.split("\0"))
    if commands and args.preflight:
        commands = commands[0].split("\0--\0", 1)
    if len(commands) != (2 if args.preflight else 1):
        parser.error(f"expected -- and {'two commands' if args.preflight else 'the command that starts the ranks'}")
    return args, [command.split("\0") for command in commands]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _limits(text: str) -> Preflight:
    return Preflight(**json.loads(text))


def main(argv: list[str]) -> int:
    args, commands = parse_arguments(argv)
    job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if not job:
        print("job.py: no SLURM_JOB_ID; this runs inside a job: sbatch RUN/job.sh", file=sys.stderr)
        return REFUSED
    asked = Asked()
    before = read_events(args.run_dir / "ledger.jsonl")
    try:
        place = meeting_place(args.interface)
    except OSError as error:
        print(f"job.py: {error}", file=sys.stderr)
        return REFUSED
    nodelist = os.environ.get("SLURM_JOB_NODELIST", "")
    note(args.run_dir, "begin", job=job, restart=restart, nodes=nodelist, saved_step=saved_step(before))
    print(f"job.py: job {job}, restart {restart}, on {nodelist}", flush=True)
    try:
        chosen = choose(
            hostnames(nodelist), args.node_counts, commands[0] if args.preflight else None, args.preflight or Preflight(),
            Needs(args.devices, args.interface), run_dir=args.run_dir, job=job, restart=restart, place=place, ports=PORTS,
            stop=lambda: asked.signal_number != 0,
        )  # fmt: skip
    except ClusterError as error:
        chosen = Chosen([], place, {}, str(error))
    if chosen.used:
        code, end, now = start(
            on_nodes(commands[-1], chosen.used, args.tasks_per_node), chosen, args, job, asked, before
        )
    else:
        code, now = 1, job_state(job)
        end = not_started(chosen, asked, saved_step(before), now, args.lead_s)
    in_vain = 0 if end.progress else starts_in_vain(args.run_dir, job) + (not end.blameless)
    verdict = decide(end, in_vain, args.max_failures, now)
    excluded, exclude = (
        to_exclude(args.run_dir, job, chosen.left_out, args.node_counts) if verdict.requeue else ([], None)
    )
    text = verdict.text + (f", without {', '.join(excluded)}" if excluded else "")
    note(
        args.run_dir, "end", job=job, restart=restart, code=code, kind=end.kind, cause=end.cause, saved_step=end.saved_step,
        progress=end.progress, blameless=end.blameless, excluded=excluded, verdict=text,
    )  # fmt: skip
    print(f"job.py: {text}", flush=True)
    if verdict.requeue and (refused := requeue(job, exclude)) is not None:
        print(f"job.py: scontrol requeue {job}: {refused}; submit {args.run_dir / 'job.sh'} again", file=sys.stderr)
    return verdict.code


def not_started(chosen: Chosen, asked: Asked, saved: int, now: JobState, lead_s: int) -> End:
    if asked.signal_number == signal.SIGUSR1 and now.left_s is not None and now.left_s <= lead_s + GRAIN_S:
        return End("stopped", f"{TIME_LIMIT}, and the pre-flight had not ended", saved, False)
    if asked.signal_number:
        name = signal.Signals(asked.signal_number).name
        return End("stopped", f"{name} to the job before its ranks were started", saved, False, True)
    return End("failed", chosen.cause, saved, False)


def start(
    command: list[str], chosen: Chosen, args: argparse.Namespace, job: str, asked: Asked, before: list[dict[str, Any]]
) -> tuple[int, End, JobState]:
    """One start of the ranks, to its end: exit code, how it ended, and what SLURM then says of the job."""
    address, port = chosen.place
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if args.slots:
        write_hostfile(args.run_dir / "hostfile", chosen.used, args.slots)
    print(f"job.py: ranks on {','.join(chosen.used)}; the ranks meet at {address}:{port}", flush=True)
    output = output_of_this_start()
    lead_s = lead_for(before, args.lead_s, job_state(job).left_s)
    code = attend(subprocess.Popen(command), args.run_dir, job, lead_s, asked)
    now = job_state(job)
    why = TIME_LIMIT if now.reason == "TimeLimit" else asked.why  # which SLURM ends with SIGTERM
    end = judge(code, why, before, read_events(args.run_dir / "ledger.jsonl"), read_output(*output))
    return code, end, now


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
