"""Every node of a job measured before its ranks start, and judged against fixed needs and against the others."""

import contextlib
import json
import signal
import socketserver
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.config import Preflight

GRACE_S = 20.0  # for srun to tell of tasks that ended by themselves
SHOWN = 3  # differences in a message
Reports = dict[str, dict[str, Any]]  # what each node told; empty for one that did not


class PreflightError(RuntimeError):
    """No node could be measured; says nothing about any of them."""


def measure(
    command: list[str], *, nodes: list[str], run_dir: Path, name: str, place: tuple[str, int], ports: range,
    limits: Preflight, stop: Callable[[], bool],
) -> Reports:  # fmt: skip
    """Run launcher/preflight.py on all nodes.

    command: srun and what it starts.    name: of this start.    place: address and port that all must reach.
    stop: no longer wanted.    Raises PreflightError.
    """
    folder = run_dir / "preflight" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()
    except OSError as error:
        raise PreflightError(f"{folder} cannot be written: {error.strerror}") from None
    words = [*command, f"--out={folder}", f"--nodes={','.join(nodes)}", f"--clock={place[0]}:{place[1]}",
             f"--ports={ports.start}-{ports.stop}", f"--within-s={limits.within_s}"]  # fmt: skip
    with telling_the_time(place[1]):
        code = _run(words, limits.within_s + GRACE_S, stop)
    found = {node: _read(folder / f"{node}.json") for node in nodes}
    if not any(found.values()) and not stop():
        raise PreflightError(f"no node told anything (exit code {code}); see the lines above. The command was {words}")
    return found


def _run(words: list[str], limit_s: float, stop: Callable[[], bool]) -> int | None:
    """Exit code; None where it had to be ended."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not stop():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break
    return None


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


class _Clock(socketserver.StreamRequestHandler):
    timeout = 60

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            if self.rfile.read(1):
                self.wfile.write(f"{time.time()}\n".encode())
                self.rfile.read(1)  # the other ends the connection, so that this port is free at once


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024


@contextlib.contextmanager
def telling_the_time(port: int) -> Iterator[None]:
    """At this port of this machine, in the block."""
    try:
        server = _Server(("", port), _Clock)
    except OSError as error:
        raise PreflightError(f"port {port} is no longer free here: {error.strerror}") from None
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def judge(
    reports: Reports, batch_host: str, limits: Preflight, devices: int, interface: str | None = None
) -> dict[str, str]:
    """Nodes that are not good, each with what is wrong. Raises PreflightError where it is no node's fault.

    devices, interface: what each node must have.
    """
    wrong: dict[str, list[str]] = {node: [] for node in reports}
    heard = {node: report for node, report in reports.items() if not _silent(report)}
    for node, report in reports.items():
        wrong[node] += [_silent(report)] if node not in heard else _needs(report, limits, devices, interface)
    for judges in (_programs, _clocks, _reach, _speeds):
        for node, what in judges(heard, batch_host, limits).items():
            wrong[node].append(what)
    return {node: "; ".join(lines) for node, lines in wrong.items() if lines}


def _silent(report: dict[str, Any]) -> str:
    if not report:
        return "it did not answer: it hangs, or does not see the run's folder"
    if report.get("error"):
        return f"the pre-flight failed at {report.get('doing')}: {report['error']}"
    return f"it did not come to an end: {report['doing']}" if report.get("doing") else ""


def _needs(report: dict[str, Any], limits: Preflight, devices: int, interface: str | None) -> list[str]:
    wrong = []
    if interface and interface not in report["interfaces"]:
        wrong.append(f"it has no network interface {interface}; it has {', '.join(report['interfaces'])}")
    for folder, told in report["folders"].items():
        if "error" in told:
            wrong.append(f"{folder} cannot be written: {told['error']}")
        elif told["free_gb"] < limits.free_disk_gb:
            wrong.append(f"{folder} has {told['free_gb']:.2f} GB free; expected {limits.free_disk_gb:g}")
    accelerators = [device for device in report["devices"] if device["name"] != "cpu"]
    if len(accelerators) < devices:
        wrong.append(f"it has {len(accelerators)} devices; expected {devices}")
    for device in accelerators:
        if device["free_gib"] < limits.free_device_memory * device["whole_gib"]:
            wrong.append(
                f"{device['name']} has {device['free_gib']:.1f} of {device['whole_gib']:.1f} GiB free; expected "
                f"{limits.free_device_memory:g} of it: another process may be left there"
            )
    return wrong


def _programs(heard: Reports, batch_host: str, limits: Preflight) -> dict[str, str]:
    """Code and libraries must be what most nodes have; where as many have another, what the batch host has."""
    count = Counter(json.dumps(report["program"], sort_keys=True) for report in heard.values())
    own = json.dumps(heard.get(batch_host, {}).get("program"), sort_keys=True)
    best = max(count, key=lambda text: (count[text], text == own), default="{}")
    right = json.loads(best)
    wrong = {}
    for node, report in heard.items():
        theirs = report["program"]
        differ = [key for key in sorted(right.keys() | theirs.keys()) if right.get(key) != theirs.get(key)]
        if differ:
            shown = "; ".join(f"{key}: {theirs.get(key)}, {right.get(key)} on most" for key in differ[:SHOWN])
            wrong[node] = f"another program: {shown}" + (f"; and {len(differ) - SHOWN} more" if differ[SHOWN:] else "")
    return wrong


def _clocks(heard: Reports, batch_host: str, limits: Preflight) -> dict[str, str]:
    """A clock must go with most: its distance from the median, as far as it is known for certain."""
    ahead = {node: report["clock"] for node, report in heard.items() if "ahead_s" in report["clock"]}
    middle = statistics.median_low([clock["ahead_s"] for clock in ahead.values()]) if len(ahead) > 2 else 0.0
    return {
        node: f"its clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}; expected {limits.clock_s:g} s at most"
        for node, clock in ahead.items()
        if abs(off := clock["ahead_s"] - middle) - clock["delay_s"] / 2 > limits.clock_s
    }


def _reach(heard: Reports, batch_host: str, limits: Preflight) -> dict[str, str]:
    """All must reach the batch host, and one neighbour. Where most do not reach the batch host, it is the one."""
    failed = {node: report["clock"]["error"] for node, report in heard.items() if "error" in report["clock"]}
    wrong = {node: f"it does not reach {batch_host}: {error}" for node, error in failed.items()}
    if len(failed) > 1 and 2 * len(failed) > len(heard) - 1:
        wrong = {
            batch_host: f"{len(failed)} of {len(heard) - 1} other nodes do not reach it: {next(iter(failed.values()))}"
        }
    alone = {}
    for node, report in heard.items():
        pairs = {other: told for other, told in report["pairs"].items() if other in heard and "error" in told}
        if pairs and len(pairs) == len([other for other in report["pairs"] if other in heard]):
            alone[node] = "no all-reduce with " + " or ".join(
                f"{other} ({told['error']})" for other, told in pairs.items()
            )
    if len(alone) == len(heard) > 2:
        raise PreflightError(
            f"none of {len(heard)} nodes could sum with its neighbours, which is no fault of one; is network_interface the "
            f"right one? {next(iter(alone))}: {next(iter(alone.values()))}"
        )
    if len(alone) == len(heard):  # nothing tells which: the job's script runs on this one
        alone.pop(batch_host, None)
    return {**alone, **wrong}


def _speeds(heard: Reports, batch_host: str, limits: Preflight) -> dict[str, str]:
    """Of a node its slowest device counts, and of a device its faster neighbour: the other may be the slow one."""
    matmul = {node: min(device["tflops"] for device in report["devices"]) for node, report in heard.items()}
    all_reduce = {}
    for node, report in heard.items():
        pairs = [told["gb_s"] for told in report["pairs"].values() if "gb_s" in told]
        if pairs:
            all_reduce[node] = min(max(speeds) for speeds in zip(*pairs, strict=False))
    wrong: dict[str, str] = {}
    for values, least, what, unit in (
        (matmul, limits.matmul_tflops, "a matrix product", "TFLOP/s"),
        (all_reduce, limits.all_reduce_gb_s, "an all-reduce", "GB/s"),
    ):
        # of two, half a median tells nothing of one
        share = limits.speed * statistics.median(values.values()) if len(values) > 2 else 0.0
        for node, value in values.items():
            if value < max(share, least):
                expected = f"{least:g}" if least >= share else f"{limits.speed:g} of the nodes' median, {share:.3g}"
                wrong[node] = (f"{wrong[node]}; " if node in wrong else "") + (
                    f"{what} makes {value:.3g} {unit}; expected {expected}"
                )
    return wrong
