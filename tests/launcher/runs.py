"""Real runs for tests: the commands as a user types them, on a corpus prepared from a little real text."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from parallel.checkpoint import CheckpointReader, committed_steps
from parallel.state import KINDS

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent  # deepspeed and torchrun of this environment
PRETRAIN, FINETUNE = "launcher/pretrain.py", "launcher/finetune.py"
INJECT = "tests/faults/inject.py"  # the same with faults in it

RECIPE = """
run: {{name: {name}, folder: {folder}, seed: 4611686018427387904}}
model: {{vocab_size: 512, seq_len: 32, d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, d_ff: 64, dropout: 0.1}}
data: {{corpus: {corpus}, sources: [{{kind: text, paths: [-]}}], tokenizer: {{vocab_size: 512}}}}
optim: {{lr: 1e-3, warmup_steps: 3}}
parallel: {{zero_stage: 1, precision: fp32, timeout_s: 60}}
train: {{steps: 24, global_batch_size: 8, micro_batch_size: 2}}
checkpoint: {{every: 5, keep: 0}}
log: {{every: 1}}
eval: {{every: 12, windows: 10, prompts: ["def "], sample_tokens: 4}}
"""


def write_recipe(folder: Path, corpus: Path, name: str = "test") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, folder=folder / "runs", corpus=corpus))
    return path


def environment(**more: str) -> dict[str, str]:
    """Ours without what another launcher may have left in it."""
    drop = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def torchrun(ranks: int, *arguments: object) -> list[str]:
    return [str(SCRIPTS / "torchrun"), "--standalone", f"--nproc-per-node={ranks}", PRETRAIN, *map(str, arguments)]


def deepspeed(ranks: int, *arguments: object) -> list[str]:
    port = free_port()
    return [str(SCRIPTS / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port), PRETRAIN,
            *map(str, arguments)]  # fmt: skip


def injected(
    fault: str, rank: int, step: int, recipe: Path, *arguments: object, launch: Callable[..., list[str]] = torchrun
) -> list[str]:
    """Two ranks with a fault of tests/faults/inject.py in one of them, at an optimizer step; 0: before the first."""
    command = launch(2, fault, rank, step, "--", "--config", recipe, *arguments)
    return [INJECT if word == PRETRAIN else word for word in command]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command: list[str], log: Path, **env: str) -> subprocess.Popen:
    """The command in a process group of its own, its output in `log`."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(**env), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(command: list[str], log: Path, code: int | None = 0, timeout: float = 200, **env: str) -> str:
    """Run to the end; asserts the exit code and returns the output."""
    process = start(command, log, **env)
    try:
        process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # else it would run on beside the next tests
    text = log.read_text(errors="replace")
    assert code is None or process.returncode == code, f"exit code {process.returncode}\n{text[-6000:]}"
    return text


def rank_pids(recipe: Path) -> list[int]:
    """Process ids of the ranks of a job started with `recipe`, whatever launched them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        # a launcher has the script among its arguments too, but not as the program that Python runs
        program = [word for word in command[1:] if word not in ("-u", "")]
        if str(recipe) in command and program and program[0] in (PRETRAIN, FINETUNE, INJECT):
            found.append(int(entry.name))
    return sorted(found)


def kill(recipe: Path, launcher: subprocess.Popen) -> None:
    """SIGKILL for every rank and then the launcher."""
    pids = rank_pids(recipe)
    assert pids, "no rank is left to kill"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """step -> training loss, as logged to the last digit; a step logged twice fails."""
    found: dict[int, float] = {}
    for line in metrics(run_dir):
        if "loss/train" in line:
            assert line["step"] not in found, f"step {line['step']} is in metrics.jsonl twice"
            found[line["step"]] = line["loss/train"]
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    """Until metrics.jsonl has a line of `step` or later."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def final_state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> values, of the newest checkpoint."""
    folder = run_dir / "checkpoints"
    reader = CheckpointReader(folder / f"step-{committed_steps(folder)[-1]:08d}")
    kept = [(name, kind) for name in reader.manifest.shapes for kind in KINDS if reader.has(name, kind)]
    return {(name, kind): reader.tensor(name, kind) for name, kind in kept}


def assert_same_state(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"
