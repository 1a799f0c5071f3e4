"""The run's numbers: one line in the log, one JSON object in metrics.jsonl, one point a curve in TensorBoard."""

import json
import logging
import math
import os
import re
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch.utils.tensorboard import SummaryWriter

from launcher.goodput import Goodput

log = logging.getLogger(__name__)

_EVENTS = re.compile(r"(events\.out\.tfevents\.)\d{10}(\..*)")
RETRY_S = 60.0  # between tries to draw again, after TensorBoard's folder could not be written


@dataclass
class Clock:
    """Where the time of some steps went, seconds; evaluation and checkpoints are not in it."""

    steps: int = 0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    tokens: int = 0  # read, those without a target too
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=1000))  # each step's

    def add(self, step_s: float, tokens: int) -> None:
        self.steps += 1
        self.step_s += step_s
        self.tokens += tokens
        self.recent_s.append(step_s)

    @property
    def usual_step_s(self) -> float:
        """The median of the last ones; the first step of a start takes many times as long."""
        return median(self.recent_s)


class MetricsLog:
    """Writes what rank 0 measures. After a resume, points behind the resumed step leave the curve but not the disk.

    No run ends for its numbers: once they cannot be written that is told, and tried again. Lines of metrics.jsonl are
    kept until they can be; what TensorBoard was not given then is missing from its curves.
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        """resumed_step: optimizer steps that the loaded checkpoint has taken, 0 on a fresh run. Raises OSError."""
        self.path = run_dir / "metrics.jsonl"
        _set_aside_after(self.path, resumed_step)
        self._pending = b""
        self._folder = run_dir / "tensorboard"
        self._board: SummaryWriter | None = new_board(self._folder, purge_step=resumed_step + 1)
        self._next_try = 0.0
        self._told: set[str] = set()
        self.goodput: Goodput | None = None  # written with each line of steps once it is there

    def write(self, step: int, values: dict[str, float]) -> None:
        """Put named scalars at `step`. Names are `group/name`; TensorBoard shows a group together."""
        if self.goodput is not None:
            values = {**values, **self.goodput.add({"step": step, **values})}
        finite = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._pending += json.dumps({"step": step, **finite}).encode() + b"\n"
        self._write_lines()

        def draw(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._draw(draw)

    def write_text(self, name: str, text: str, step: int) -> None:
        self._draw(lambda board: board.add_text(name, text, step))

    def close(self) -> None:
        self._write_lines()
        self._draw(lambda board: board.close())

    def _write_lines(self) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:  # by its name each time: it may have been removed
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            self._tell(f"{self.path} cannot be written ({error}); its lines are kept until it can be")

    def _draw(self, draw: Callable[[SummaryWriter], None]) -> None:
        """Give TensorBoard something. Its thread breaks at the first error, which the calls after that raise."""
        try:
            if self._board is None and time.monotonic() >= self._next_try:
                self._board = new_board(self._folder)
            if self._board is not None:
                draw(self._board)
        except Exception as error:  # of any kind: of the disk, of what it makes of a value
            self._board, self._next_try = None, time.monotonic() + RETRY_S
            self._tell(f"TensorBoard in {self._folder} fails ({error}); what it misses is in {self.path}")

    def _tell(self, text: str) -> None:
        if (kind := text.partition(" (")[0]) not in self._told:
            self._told.add(kind)
            log.warning("%s", text)


def new_board(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """A writer whose file TensorBoard reads after those that are there.

    It reads them by name, and a name begins with the time. What is not older by the clock, which may have been set back
    or be another machine's, would end the curve: it is given a number instead.
    """
    files = sorted(path for path in folder.glob("events.out.tfevents.*") if _EVENTS.fullmatch(path.name))
    if any(int(path.name.split(".")[3]) >= int(time.time()) for path in files):
        for number, path in enumerate(files):
            path.rename(path.with_name(_EVENTS.sub(rf"\g<1>{number:010d}\2", path.name)))
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)


def _set_aside_after(path: Path, step: int) -> None:
    """Move the lines of metrics.jsonl that the resumed run will write again to metrics.superseded.jsonl."""
    if not path.exists():
        return
    keep: list[str] = []
    aside: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                keep.append(line)
            else:
                aside.append(json.dumps({**values, "resumed_step": step}))
        except (ValueError, KeyError, TypeError):  # cut by a crash, or no line of ours
            aside.append(line)
    if not aside:
        return
    with open(path.with_name("metrics.superseded.jsonl"), "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in aside)
    staging = path.with_name("metrics.jsonl.tmp")
    staging.write_text("".join(f"{line}\n" for line in keep), encoding="utf-8")
    os.replace(staging, path)


# Dense bf16 or fp16 matrix products a second of one device, from the makers' data sheets.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by its name; None where it is not known or the format is fp32."""
    if precision == "fp32":
        return None
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def peak_host_mem_gib() -> float:
    """The largest resident size this process has had, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(values: dict[str, float], names: list[str]) -> str:
    """One line of `label value` in the order of `names`, absent ones left out. The label of loss/... is loss."""
    return "  ".join(f"{_LABELS.get(n, n.split('/')[-1])} {_short(values[n])}" for n in names if n in values)


_LABELS = {
    "loss/train": "loss",
    "loss/valid": "loss",
    "loss/valid_perplexity": "perplexity",
    "loss/valid_bits_per_byte": "bits_per_byte",
}


def _short(value: float) -> str:
    if not math.isfinite(value) or abs(value) >= 1e9:
        return f"{value:.4g}"
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
