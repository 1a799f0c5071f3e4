"""Two runs of one config, compared to the last bit up to a step: data, logged values, weights, moments, counters.

What depends on the machine's speed (times, memory, speeds) is left out. launcher/verify_resume.py is the command.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from launcher import audit
from launcher.config import ConfigError, flat
from launcher.read_log import read_records
from launcher.run_dir import Ledger, RunDirError
from parallel.checkpoint import CheckpointError, CheckpointReader, faults, folder_name
from parallel.state import KINDS, WEIGHT

NAMES = {"weight": "weights", "exp_avg": "first moments", "exp_avg_sq": "second moments"}
OF_SPEED = ("speed/", "system/", "goodput/", "data/cache_")  # metrics that no two runs share
CHUNK = 1 << 24  # elements of a tensor held at a time, of each run


@dataclass(frozen=True)
class Difference:
    """Where two runs part."""

    step: int  # optimizer step, counted from 1
    text: str  # which quantity, and what it is in each run


@dataclass(frozen=True)
class Finding:
    """One kind of quantity, compared."""

    what: str
    compared: str  # how much of it, and how
    difference: Difference | None = None  # the first
    more: int = 0  # differences of this kind besides the first


@dataclass(frozen=True)
class Pair:
    """Two runs' folders, and how they are called in what is told."""

    a: Path
    b: Path

    def differ(self, step: int, quantity: str, a: object, b: object) -> Difference:
        return Difference(step, f"{quantity}: {self.a.name} {a}, {self.b.name} {b}")


def compare(a: Path, b: Path, step: int) -> list[Finding]:
    """Compare two runs that both have steps 1 to `step` behind them, and a checkpoint of it.

    What one of them lacks is a difference: nothing is equal for not being there.
    """
    pair = Pair(a, b)
    return [
        compare_reads(pair, step),
        *compare_metrics(pair, step),
        *compare_checkpoints(pair, step),
    ]


def first_difference(findings: list[Finding]) -> Difference | None:
    """Of the earliest step; of one step, what comes first in it: data, loss, gradient, weights."""
    found = [finding.difference for finding in findings if finding.difference is not None]
    return min(found, key=lambda difference: difference.step, default=None)


def _finding(what: str, compared: str, differences: list[Difference]) -> Finding:
    first = min(differences, key=lambda difference: difference.step, default=None)
    return Finding(what, compared, first, max(len(differences) - 1, 0))


# -- data ---------------------------------------------------------------------------------------------------------------


def compare_reads(pair: Pair, last: int) -> Finding:
    """Which samples each rank read at each step, and the hash of their tokens."""
    a, b = reads_by_step(pair.a), reads_by_step(pair.b)
    differences, ranks = [], 0
    for step in range(1, last + 1):
        ours, theirs = a.get(step), b.get(step)
        if ours is None or theirs is None or len(ours) != len(theirs):
            shown = ("no record" if reads is None else f"{len(reads)} ranks" for reads in (ours, theirs))
            differences.append(pair.differ(step, "data", *shown))
            continue
        ranks = len(ours)
        wrong = [rank for rank in range(ranks) if ours[rank] != theirs[rank]]
        differences += [
            pair.differ(step, f"data of rank {rank}", _describe_read(ours[rank]), _describe_read(theirs[rank]))
            for rank in wrong
        ]
    return _finding("data", f"samples and a hash of their tokens, {last} steps x {ranks} ranks", differences)


def reads_by_step(run_dir: Path) -> dict[int, list[tuple[int, int, int]]]:
    """step -> by rank (first sample, one past the last, hash), of the starts that the run is made of."""
    reads: dict[int, list[tuple[int, int, int]]] = {}
    for event in Ledger(run_dir).events():
        if event["event"] != "start":
            continue
        reads = {step: records for step, records in reads.items() if step <= event["step"]}  # taken again from there
        of_rank = [read_records(run_dir, event["number"], rank) for rank in range(event["dp_size"])]
        for i in range(min(len(records) for records in of_rank)):
            rows = [records[i] for records in of_rank]
            step = event["step"] + 1 + i
            if all(int(row["step"]) == step for row in rows):
                reads[step] = [(int(row["first"]), int(row["next"]), int(row["digest"])) for row in rows]
    return reads


def _describe_read(read: tuple[int, int, int]) -> str:
    return f"samples {read[0]} to {read[1] - 1} with hash {read[2]:016x}"


def audit_run(run_dir: Path, step: int) -> Finding:
    """Read every batch of a run again from its corpus: each sample once, none lost. step: where the run ends."""
    what = f"audit of {run_dir.name}"
    try:
        *_, proved, _ = audit.verify(audit.Run(run_dir, None))
    except (audit.AuditError, RunDirError, ConfigError, DataError) as error:
        return Finding(what, "against the corpus", Difference(step, f"{what}: {error}"))
    return Finding(what, proved.removeprefix("proved: "))


# -- logged values ------------------------------------------------------------------------------------------------------


def compare_metrics(pair: Pair, last: int) -> list[Finding]:
    """Every number in metrics.jsonl that does not tell of speed; evaluation apart from what each step logs."""
    a, b = metrics_by_step(pair.a), metrics_by_step(pair.b)
    seen: dict[bool, set[str]] = {False: set(), True: set()}
    found: dict[bool, list[Difference]] = {False: [], True: []}
    for step in range(1, last + 1):
        ours, theirs = a.get(step, {}), b.get(step, {})
        for name in sorted({"loss/train"} | ours.keys() | theirs.keys(), key=_in_a_step):
            evaluation = name.startswith(("loss/valid", "valid/"))
            seen[evaluation].add(name)
            if name not in ours or ours[name] != theirs.get(name):
                values = (_shown(values.get(name)) for values in (ours, theirs))
                found[evaluation].append(pair.differ(step, name, *values))
    logged = sorted(seen[False], key=_in_a_step)
    findings = [_finding("logged values", f"{', '.join(logged)} of {last} steps, to the last digit", found[False])]
    if seen[True]:
        findings.append(_finding("evaluation", f"{', '.join(sorted(seen[True]))}, to the last digit", found[True]))
    return findings


def metrics_by_step(run_dir: Path) -> dict[int, dict[str, Any]]:
    """step -> name -> what metrics.jsonl says; of a value that is there twice, a list of both."""
    steps: dict[int, dict[str, Any]] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # cut, or no line of ours
            values = json.loads(line)
            of_step = steps.setdefault(values.pop("step"), {})
            for name, value in values.items():
                if not name.startswith(OF_SPEED):
                    of_step[name] = [of_step[name], value] if name in of_step else value
    return steps


def _in_a_step(name: str) -> tuple[int, str]:
    """What is computed first sorts first: where runs part, that is the cause."""
    order = ("loss/train", "optim/grad_norm", "optim/lr")
    return order.index(name) if name in order else len(order), name


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value} (logged twice)" if isinstance(value, list) else repr(value)


# -- checkpoints --------------------------------------------------------------------------------------------------------


def compare_checkpoints(pair: Pair, step: int) -> list[Finding]:
    """Every element of every tensor of the checkpoints of `step`, and what they say beside the tensors."""
    try:
        a, b = (_open(run_dir / "checkpoints" / folder_name(step)) for run_dir in (pair.a, pair.b))
    except CheckpointError as error:
        return [Finding("checkpoint", f"of step {step}", Difference(step, f"checkpoint: {error}"))]
    if a.manifest.shapes != b.manifest.shapes:
        shapes = (reader.manifest.shapes for reader in (a, b))
        return [Finding("checkpoint", f"of step {step}", pair.differ(step, "parameters", *shapes))]
    try:
        tensors = [_compare_tensors(pair, step, kind, a, b) for kind in KINDS]
    except CheckpointError as error:
        return [Finding("checkpoint", f"of step {step}", Difference(step, f"checkpoint: {error}"))]
    return [*tensors, _compare_counters(pair, step, a, b)]


def _open(path: Path) -> CheckpointReader:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there")
    if wrong := faults(path):
        raise CheckpointError(f"{path} is damaged: {wrong[0]}")
    return CheckpointReader(path)


def _compare_tensors(pair: Pair, step: int, kind: str, a: CheckpointReader, b: CheckpointReader) -> Finding:
    differences, total = [], 0
    held = {name for name in a.manifest.shapes if kind == WEIGHT or a.has(name, kind) or b.has(name, kind)}
    shapes = {name: shape for name, shape in a.manifest.shapes.items() if name in held}  # what is frozen has no moments
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        total += n
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            ours, theirs = (reader.read(name, kind, start, stop) for reader in (a, b))
            unequal = (ours.view(torch.int32) != theirs.view(torch.int32)).nonzero()  # bits: a NaN equals itself
            if len(unequal):
                i = int(unequal[0])
                values = (f"{values[i].item()!r}" for values in (ours, theirs))
                differences.append(pair.differ(step, f"{kind} of {name}, element {start + i} of {n}", *values))
                break
    return _finding(NAMES[kind], f"{len(shapes)} tensors, {total:,} numbers, to the last bit", differences)


def _compare_counters(pair: Pair, step: int, a: CheckpointReader, b: CheckpointReader) -> Finding:
    """What a checkpoint says beside its tensors and does not tell of time: where the data stands, AdamW's own step …"""
    ours, theirs = (dict(_counters(reader)) for reader in (a, b))
    differences = [
        pair.differ(step, name, ours.get(name, "nothing"), theirs.get(name, "nothing"))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, "nothing") != theirs.get(name, "nothing")
    ]
    return _finding("counters", "the data's cursor, AdamW's step, tokens, updates left out, loss scale", differences)


def _counters(reader: CheckpointReader) -> Iterator[tuple[str, Any]]:
    manifest = reader.manifest
    totals = {name: value for name, value in manifest.totals.items() if name != "train_s"}
    told = {"adam_steps": manifest.adam_steps, "cursor": manifest.cursor, "loss_scaler": manifest.loss_scaler}
    for name, value in flat({**told, "totals": totals}).items():
        if isinstance(value, list):
            yield f"{name} length", len(value)
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        else:
            yield name, value
