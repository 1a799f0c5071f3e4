"""One node before training: `srun … python launcher/preflight.py …`, which cluster/job.py starts on every node of a job.

Measures and judges nothing: what there is goes to OUT/NODE.json, whole after each step, so that also a node that hangs tells
at what. cluster/preflight.py compares the nodes. Devices are measured one after the other, and each with the same device
of a neighbour, in pairs, so that a node that is dead or slow costs its neighbours one pair.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from launcher.program import program
from parallel.speed import Meeting, devices, matmul_tflops, memory_gib

WRITE_BYTES = 2**24
# Of the time there is, when each round of pairs must be over: who waits for a dead neighbour is back before the next ends.
ROUNDS_END = (0.6, 0.75, 0.9)
POLL_S, MARGIN_S = 0.2, 2.0


class Report:
    """OUT/NODE.json. `doing` is empty when all is done."""

    def __init__(self, folder: Path, node: str) -> None:
        self.folder, self.node = folder, node
        self.values: dict[str, Any] = {"node": node}

    def tell(self, **values: Any) -> None:
        self.values |= values
        staging = self.folder / f"{self.node}.tmp"
        staging.write_text(json.dumps(self.values), encoding="utf-8")
        os.replace(staging, self.folder / f"{self.node}.json")

    def of(self, node: str) -> dict[str, Any]:
        """What another has told until now; empty where nothing."""
        with suppress(OSError, json.JSONDecodeError):
            found = json.loads((self.folder / f"{node}.json").read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}


def ask_clock(host: str, port: int, timeout_s: float) -> dict[str, Any]:
    """How far the clock there is from this one, s; known to half of delay_s. Raises OSError where it is not reached."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        begin = time.time()
        connection.sendall(b"?")
        with connection.makefile() as answer:
            line = answer.readline()
            if not line:
                raise ConnectionError(f"{host}:{port} does not tell the time")
        end = time.time()
        return {
            "ahead_s": (begin + end) / 2 - float(line),
            "delay_s": end - begin,
            "address": connection.getsockname()[0],
        }


def disk(folder: Path) -> dict[str, Any]:
    """Space, GB, and the speed of a small file with an fsync, MB/s. Raises OSError."""
    path = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    data = random.randbytes(WRITE_BYTES)
    begin = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        write_mb_s = WRITE_BYTES / (time.perf_counter() - begin) / 1e6
        return {"free_gb": shutil.disk_usage(folder).free / 1e9, "write_mb_s": write_mb_s}
    finally:
        path.unlink(missing_ok=True)


def free_port(ports: range) -> int | None:
    for port in random.sample(ports, 100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    return None


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs that meet at the same time: each machine with the next one, and the last with the first.

    In every round each machine is in one pair at most; so each is in two, of two machines in one.
    """
    edges = [(i, i + 1) for i in range(count - 1)] + ([(0, count - 1)] if count > 2 else [])
    colours = [i % 2 for i in range(count - 1)] + ([2 if count % 2 else 1] if count > 2 else [])
    return [
        [edge for edge, own in zip(edges, colours, strict=True) if own == colour] for colour in sorted(set(colours))
    ]


def measure(args: argparse.Namespace, report: Report) -> None:
    begin, meeting = time.monotonic(), Meeting()
    report.tell(
        doing="asking the batch host for the time", program=program(), meets_at=meeting.port,
        port=free_port(range(*map(int, args.ports.split("-")))), interfaces=[name for _, name in socket.if_nameindex()],
    )  # fmt: skip
    host, _, port = args.clock.rpartition(":")
    report.tell(clock=_or_error(lambda: ask_clock(host, int(port), args.within_s / 4)))
    report.tell(doing="writing to a disk", folders={})
    for folder in args.folder:
        told = _or_error(partial(disk, Path(folder)))
        report.tell(folders={**report.values["folders"], folder: told})
    report.tell(devices=[])
    for device in devices():
        report.tell(doing=f"a matrix product on {device}")
        free, whole = memory_gib(device)
        told = {"name": str(device), "free_gib": free, "whole_gib": whole, "tflops": matmul_tflops(device)}
        report.tell(devices=[*report.values["devices"], told])
    report.tell(pairs={})
    nodes, stuck = args.nodes.split(","), ""
    mine = nodes.index(report.node)
    for number, pairs in enumerate(rounds(len(nodes))):
        for pair in pairs:
            if mine in pair:
                other, first = nodes[sum(pair) - mine], mine == pair[0]
                report.tell(doing=f"an all-reduce with {other}")
                until = begin + ROUNDS_END[number] * args.within_s
                told = {"skipped": f"it still waits for {stuck}"}
                if not stuck:
                    told = _answered(partial(all_reduces, report, meeting, other, first, str(number), until), until)
                    stuck = other if told.get("stuck") else ""
                report.tell(pairs={**report.values["pairs"], other: told})
    report.tell(doing="")
    if stuck:
        os._exit(0)  # there is no end to what it waits in


def all_reduces(report: Report, meeting: Meeting, other: str, first: bool, name: str, until: float) -> dict[str, Any]:
    """With each device in turn. Raises OSError or RuntimeError where the other does not answer in time (monotonic)."""
    while "pairs" not in (there := report.of(other)):
        if time.monotonic() >= until:
            raise TimeoutError("it was not ready in time")
        time.sleep(POLL_S)
    address = there["clock"].get("address", other)
    # a name of its own that leads to itself (127.0.1.1 in /etc/hosts) tells the other nothing
    place = other if address.startswith("127.") else address, there["meets_at"]
    found = []
    for device in devices()[: len(there["devices"])]:  # one that lacks a device is told by itself
        left_s = max(1.0, until - time.monotonic())
        found.append(meeting.all_reduce_gb_s(device, place, first, f"{name}-{device}", left_s))
    return {"gb_s": found}


def _or_error(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return do()
    except (OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"}


def _answered(do: Callable[[], dict[str, Any]], until: float) -> dict[str, Any]:
    """What it tells; `stuck` where it does not end, though its own limits are over: gloo meeting a stopped process."""
    box: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: box.append(_or_error(do)), daemon=True)
    thread.start()
    thread.join(max(0.0, until - time.monotonic()) + MARGIN_S)
    return box[0] if box else {"error": "TimeoutError: it stopped answering", "stuck": thread.is_alive()}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launcher/preflight.py", description="Measure one node before training.")
    parser.add_argument("--out", required=True, type=Path, help="folder that all nodes see")
    parser.add_argument("--nodes", required=True, help="all that are measured, n1,n2")
    parser.add_argument("--clock", required=True, help="HOST:PORT that tells the time")
    parser.add_argument("--within-s", required=True, type=int, help="seconds after which this ends, done or not")
    parser.add_argument("--ports", required=True, help="FIRST-END, of which a free one is told")
    parser.add_argument("--folder", action="append", default=[], help="that must be written; may be given again")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if node not in args.nodes.split(","):
        print(f"preflight: this is {node}; expected one of --nodes {args.nodes}", file=sys.stderr)
        return 2
    signal.alarm(args.within_s)  # whatever it waits for then
    report = Report(args.out, node)
    try:
        report.tell(doing="beginning")
        measure(args, report)
    except Exception as error:
        with suppress(OSError):
            report.tell(error=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
