"""Prove, for your own config on your own machines, that a run which is killed and resumed equals one that never stopped.

    python launcher/verify_resume.py --config configs/embedded.yaml
    python launcher/verify_resume.py --config configs/gpt3-1.3b.yaml --steps 40 --launch "srun python" optim.lr=1e-4

The training command is run as you would run it, in a folder of its own beside your runs (RUN.verify-resume); your run is
not touched. Once for --steps steps without a stop; once more, ended by SIGKILL of all its processes on the way and started
again with the same command. Model, data, batch, precision, sharding and the learning rate of each step are your config's;
checkpoints, evaluation and log lines come as often as the proof needs (the report says how). Then everything that must be
the same is compared to the last bit: what each rank read, what each step logged, weights, both moments, counters.

Two starts can only be equal where the machine computes the same twice. Where it does not, the report says that the runs
part before the kill. Exit codes: 0 equal; 1 different, or a run failed; 2 refused, or nothing could be looked at; 130
interrupted.
"""

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import torch

from data.errors import DataError
from launcher.compare import Difference, Finding, audit_run, compare, first_difference
from launcher.config import ConfigError, FinetuneConfig, RunConfig
from launcher.origin_config import load_recipe
from launcher.redaction import hide
from launcher.run_dir import Ledger, RunDirError
from parallel.checkpoint import committed_steps

BIN = Path(sys.executable).parent  # deepspeed, torchrun and python of this environment
MARKER = "verify-resume.json"  # in a folder that this program has made
TOKEN = "LONGHAUL_VERIFY_RESUME"  # environment variable by which the processes of a start are found
LEAST_STEPS = 4  # a checkpoint, a step after it, the kill, and a step left
TRIES = 5  # of killing a run between its first checkpoint and its end
DYING_S = 60.0  # for processes to end after SIGKILL; one that waits for a device or a file system ends later
TELL_S = 20.0  # between lines on how far a start is
SHOWN_LINES = 40  # of the log of a start that failed; torchrun's own report is some 25


class VerifyError(RuntimeError):
    """It could not be looked at; the message says why and what to do."""


class StartFailed(RuntimeError):
    """A start of the run did not come to the step that it was to. code: to exit with, 2 where it came to none."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


# -- one start of the training command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is run, and where."""

    cfg: RunConfig  # the user's
    arguments: list[str]  # --config R and the user's overrides
    launch: Callable[[], list[str]]  # what stands before the script, made anew for each start
    scratch: Path
    steps: int

    @property
    def every(self) -> int:
        """Steps between checkpoints: the second is at half of it, or just before."""
        return max(1, self.steps // 4)

    @property
    def overrides(self) -> dict[str, object]:
        """What both runs are given besides their name: how often to write things down, and where to stop."""
        return {
            "train.stop_at": self.steps,
            "checkpoint.every": self.every,
            "checkpoint.keep": 1,
            "checkpoint.keep_every": "null",
            "checkpoint.keep_every_hours": "null",
            "log.every": 1,
            "eval.every": self.steps,
        }

    def command(self, name: str) -> list[str]:
        ours = {"run.folder": json.dumps(str(self.scratch)), "run.name": name, **self.overrides}
        script = "finetune.py" if isinstance(self.cfg, FinetuneConfig) else "pretrain.py"
        return [
            *self.launch(),
            os.path.relpath(Path(__file__).with_name(script)),
            *self.arguments,
            *(f"{key}={value}" for key, value in ours.items()),
        ]


class Start:
    """One start of the training command: its processes, all that they start, and its log."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log
        self._token = secrets.token_hex(16)
        env = {**os.environ, TOKEN: self._token, "PATH": search_path()}
        with open(log, "wb") as out:
            self._launcher = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> bool:
        return self._launcher.poll() is not None

    def kill(self) -> None:
        """SIGKILL for every process of the start on this machine: launchers put ranks into sessions of their own.

        Raises VerifyError for one that does not end.
        """
        deadline = time.monotonic() + DYING_S
        while pids := self._pids() or self._pids():  # twice: one that is just being replaced (exec) shows nothing
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise VerifyError(
                    f"processes {pids} did not end within {DYING_S:.0f} s of SIGKILL; look at them with ps"
                )
            time.sleep(0.02)
        self._launcher.kill()
        self._launcher.wait()

    def _pids(self) -> list[int]:
        mark, found = f"{TOKEN}={self._token}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def last_lines(self) -> str:
        """Of the log: what the training command refused and after it, else the end."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        refused = next((i for i, line in enumerate(lines) if line.startswith(("pretrain: ", "finetune: "))), len(lines))
        shown = lines[refused : refused + SHOWN_LINES] or lines[-SHOWN_LINES:]
        return "\n".join(f"  | {hide(line)}" for line in shown)


def search_path() -> str:
    """Where programs of a start are looked for: beside the Python that runs this, then as the shell does."""
    return os.pathsep.join([str(BIN), os.environ.get("PATH", "")])


def logged_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    with contextlib.suppress(OSError), open(run_dir / "metrics.jsonl", "rb") as file:
        file.seek(max(0, os.path.getsize(file.name) - 65_536))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return int(json.loads(line)["step"])
    return 0


def saved_step(run_dir: Path) -> int:
    """Of the newest checkpoint, 0 where there is none."""
    return max(committed_steps(run_dir / "checkpoints"), default=0)


# -- the two runs -------------------------------------------------------------------------------------------------------


def run_to_the_end(plan: Plan, name: str, log: Path) -> None:
    """Start the run of that name, or start it again. Raises StartFailed if it does not come to its last step."""
    run_dir = plan.scratch / name
    start = Start(plan.command(name), log)
    try:
        watch(start, run_dir, plan.steps, lambda: False)
    finally:
        start.kill()
    events = Ledger(run_dir).events()
    # the launcher's own exit code can differ from the ranks', so the ledger tells
    if not any(event["event"] in ("stopped", "finished") and event["step"] == plan.steps for event in events):
        raise start_failed(start, run_dir)


def start_failed(start: Start, run_dir: Path) -> StartFailed:
    """What to tell of a start that ended too early."""
    refused = not Ledger(run_dir).events()
    happened = "ended before its first step" if refused else f"failed at step {logged_step(run_dir)}"
    return StartFailed(
        f"the training command {happened}; from {start.log}:\n{start.last_lines()}\n"
        f"It was started as\n  {hide(shlex.join(start.command))}",
        2 if refused else 1,
    )


def run_and_kill(plan: Plan, name: str, log: Path) -> tuple[int, int]:
    """Start the run of that name and kill it on the way; (last step that it logged, step of its newest checkpoint).

    It is killed where it has steps behind its newest checkpoint and others before it: the resumed run must take some again.
    """
    run_dir = plan.scratch / name
    for _ in range(TRIES):
        if run_dir.exists():
            say(f"    it had come to step {logged_step(run_dir)} when it was killed, too late; once more")
            shutil.rmtree(run_dir)
        start = Start(plan.command(name), log)
        try:
            watch(start, run_dir, plan.steps, lambda: 0 < saved_step(run_dir) < logged_step(run_dir) >= plan.steps // 2)
            if start.ended() and logged_step(run_dir) < plan.steps:
                raise start_failed(start, run_dir)
        finally:
            start.kill()
        logged, saved = logged_step(run_dir), saved_step(run_dir)
        if 0 < saved < min(logged, plan.steps):
            return logged, saved
    raise VerifyError(
        f"in {TRIES} tries the run could not be killed between a checkpoint (every {plan.every} steps) and step "
        f"{plan.steps}: its steps are too short for that; give more --steps, such as {10 * plan.steps}"
    )


def watch(start: Start, run_dir: Path, steps: int, enough: Callable[[], bool]) -> None:
    """Until the start has ended or it is enough; says now and then how far it is."""
    next_word = time.monotonic() + TELL_S
    while not start.ended() and not enough():
        time.sleep(0.01)
        if time.monotonic() >= next_word:
            next_word = time.monotonic() + TELL_S
            say(f"    step {logged_step(run_dir)} of {steps}")


def starts_of(run_dir: Path) -> list[int]:
    """The step that each start of a run went on from."""
    return [event["step"] for event in Ledger(run_dir).events() if event["event"] == "start"]


def check_resumed(begun_at: int, saved: int) -> Finding:
    """Whether the resume went on from the checkpoint of step `saved`: from step 0 it would have come to the same end."""
    compared = f"began at step {begun_at}, with the checkpoint of step {saved} as the newest"
    wrong = Difference(saved + 1, "the newest checkpoint was not what the resume went on from")
    return Finding("resume", compared, None if begun_at == saved else wrong)


# -- the folder ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[None]:
    """Hold the folder alone, empty but for a marker. Raises VerifyError where it is not this program's to use."""
    marker = path / MARKER
    try:
        if path.exists() and not marker.is_file() and any(path.iterdir()):
            raise VerifyError(
                f"{path} is there and was not made by this program, so it is not touched; move it away, or give another "
                "place with run.folder=FOLDER"
            )
        path.mkdir(parents=True, exist_ok=True)
        held = open(marker, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the folder is held)
    except OSError as error:
        raise VerifyError(
            f"{error.filename or path} cannot be written: {error.strerror}; give another place with run.folder=FOLDER"
        ) from None
    with held:
        lock(held, path)
        if len(list(path.iterdir())) > 1:
            say(f"removing what an earlier verification left in {path}")
        for entry in path.iterdir():
            if entry != marker:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        held.truncate(0)
        held.write(
            json.dumps({"made by": "launcher/verify_resume.py", "host": socket.gethostname(), "pid": os.getpid()})
        )
        held.flush()
        yield


def lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise VerifyError(f"{path} is in use by another verification of the same run; wait for its end") from None
    except OSError:  # a file system without locks
        pass


# -- the report ---------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def report(findings: list[Finding], cfg: RunConfig, killed_at: int, saved: int) -> Iterator[str]:
    """What was compared, what came of it, and the verdict: lines of text."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        verdict = "equal    " if finding.difference is None else "DIFFERENT"
        more = f"; and {finding.more} more" if finding.more else ""
        yield f"  {finding.what:<{width}}  {verdict}  {finding.compared}"
        if finding.difference is not None:
            yield f"  {'':<{width}}  {'':<9}  first at step {finding.difference.step}: {finding.difference.text}{more}"
    if not any(finding.what == "evaluation" for finding in findings):
        yield f"  {'evaluation':<{width}}  {'':<9}  there is no held-out text, so none was made and none compared"
    if not can_be_audited(cfg) and cfg.data.stream is None:
        yield f"  {'audit':<{width}}  {'':<9}  examples of a task are not audited; the records above tell alone"
    if cfg.data.stream is not None:
        yield f"  {'audit':<{width}}  {'':<9}  raw text (data.stream) cannot be read again; the records above tell alone"
    yield f"  {'random numbers':<{width}}  {'':<9}  {of_random_numbers(cfg)}"
    yield "  not compared: times, speeds, memory; text samples"
    first = first_difference(findings)
    if first is None:
        yield (
            f"EQUAL: killed after step {killed_at} and resumed from step {saved}, the run is the one that never stopped, to "
            "the last bit"
        )
        return
    yield f"DIFFERENT: first at step {first.step}: {first.text}"
    if first.step <= saved:
        yield (
            f"The runs part at or before step {saved}, which no kill had disturbed: this machine does not compute the same "
            "twice with this config, so that nothing is proved of the resume, for or against. Kernels that add up in no "
            "fixed order do so; so does a damaged device"
        )


def can_be_audited(cfg: RunConfig) -> bool:
    """Whether launcher/audit.py can read every batch again."""
    return cfg.data.stream is None and not (isinstance(cfg, FinetuneConfig) and cfg.task.kind != "text")


def of_random_numbers(cfg: RunConfig) -> str:
    """What is proved about them, and by what."""
    seeded = "dropout is drawn from seed, step and rank alone, there is no other generator to keep"
    lora = cfg.lora if isinstance(cfg, FinetuneConfig) else None
    probability = max(cfg.model.dropout, lora.dropout if lora is not None else 0.0)
    if probability == 0:
        return f"{seeded}; here dropout=0.0, so no step draws any and none were compared"
    return f"{seeded}; with dropout={probability} other ones would show in the losses"


# -- the command --------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/verify_resume.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps of each run, by default 20")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--ranks", type=int, metavar="K", help="processes on this machine; by default one for each "
                     "accelerator, without one as many as there are cores, at most two")  # fmt: skip
    how.add_argument("--launch", metavar="COMMAND", help="what stands before launcher/pretrain.py when you train, such as "
                     "'srun python' or 'torchrun --standalone --nproc-per-node 8'; by default deepspeed with --ranks "
                     "processes")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep both runs, equal or not; the next verification of the "
                        "same run removes them")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)  # options may stand between overrides


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that can be refused before anything is started. Raises ConfigError or VerifyError."""
    cfg = load_recipe(args.config, args.overrides)
    if not LEAST_STEPS <= args.steps <= cfg.train.steps:
        raise VerifyError(
            f"--steps {args.steps} with train.steps={cfg.train.steps}; expected {LEAST_STEPS} to {cfg.train.steps}"
        )
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise VerifyError(
            "this process is one of several ranks; start verify_resume once, with plain python, and say with --launch how "
            "the training is started"
        )
    return Plan(
        cfg=cfg,
        arguments=["--config", args.config, *args.overrides],
        launch=launcher(args.launch, args.ranks),
        scratch=Path(cfg.run.folder) / f"{cfg.run.name}.verify-resume",
        steps=args.steps,
    )


def launcher(given: str | None, ranks: int | None) -> Callable[[], list[str]]:
    """What stands before the script at each start. Raises VerifyError for a command that is not there."""
    if given is None:
        n = ranks if ranks is not None else torch.accelerator.device_count() or min(2, os.cpu_count() or 1)
        if n < 1:
            raise VerifyError(f"--ranks {n}; expected at least 1")
        return lambda: ["deepspeed", "--num_accelerators", str(n), "--master_port", str(free_port())]
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise VerifyError(f"--launch {given!r}: {error}; quote it as in a shell") from None
    if not words or shutil.which(words[0], path=search_path()) is None:
        raise VerifyError(
            f"--launch {given!r}: there is no program {words[0] if words else ''!r}; expected what stands before "
            "launcher/pretrain.py when you train, such as 'srun python'"
        )
    return lambda: words


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def verify(plan: Plan, keep: bool) -> int:
    """Run, kill, resume, compare and report. Returns the exit code."""
    cfg, scratch, steps = plan.cfg, plan.scratch, plan.steps
    straight, resumed = scratch / "straight", scratch / "resumed"
    logs = [scratch / f"{name}.log" for name in ("straight", "killed", "resumed")]
    settings = ", ".join(f"{key}={value}" for key, value in plan.overrides.items())
    say(
        f"{cfg.run_dir}: {steps} of {cfg.train.steps} steps, started as {hide(shlex.join(plan.launch()))} …; in {scratch}"
    )
    say(f"  set for both runs: {settings}; all else is your config's")
    say(f"1/4 straight: {steps} steps without a stop; log {logs[0]}")
    run_to_the_end(plan, "straight", logs[0])
    say(f"2/4 resumed, first start: SIGKILL at about step {steps // 2}; log {logs[1]}")
    killed_at, saved = run_and_kill(plan, "resumed", logs[1])
    n_starts = len(starts_of(resumed))
    say(f"    killed after step {killed_at}, its newest checkpoint is of step {saved}")
    say(f"3/4 resumed, second start: the same command, from step {saved} to {steps}; log {logs[2]}")
    run_to_the_end(plan, "resumed", logs[2])
    say(f"4/4 comparing {straight} with {resumed}")
    findings = [check_resumed(starts_of(resumed)[n_starts], saved), *compare(straight, resumed, steps)]
    if can_be_audited(cfg):
        findings += [audit_run(run_dir, steps) for run_dir in (straight, resumed)]
    for line in report(findings, cfg, killed_at, saved):
        say(line)
    equal = first_difference(findings) is None
    if equal and not keep:
        shutil.rmtree(scratch)
    else:
        say(f"both runs are kept in {scratch}; the next verification of this run removes them")
    return 0 if equal else 1


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        plan = make_plan(args)
        with scratch_folder(plan.scratch):
            try:
                return verify(plan, args.keep)
            except StartFailed as error:
                print(
                    f"verify_resume: {error}\nNothing was proved; what it wrote is kept in {plan.scratch}",
                    file=sys.stderr,
                )
                return error.code
            except BaseException:
                shutil.rmtree(plan.scratch, ignore_errors=True)
                raise
    except (ConfigError, DataError, RunDirError, VerifyError) as error:
        print(hide(f"verify_resume: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify_resume: interrupted; its processes are ended, nothing was proved", file=sys.stderr)
        return 130


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt  # so that what was started is ended


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main(sys.argv[1:]))
