"""A rank of a job with a fault in it: python tests/faults/inject.py FAULT RANK STEP -- arguments of launcher/pretrain.py

The fault happens on one rank at one optimizer step (counted from 1; 0: before the first). It is put in from outside, so
that the program itself holds nothing for tests; torchrun and deepspeed start this file instead of launcher/pretrain.py.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import launcher.pretrain as pretrain
import launcher.watchdog as watchdog
from launcher import evaluation, saving, stragglers
from launcher.saving import Saves
from model.transformer import Transformer
from parallel import checkpoint, checkpoint_writer
from parallel.engine import Engine
from parallel.mesh import Mesh


def at(step: int, rank: int, fault: Callable[[Any], None]) -> Callable:
    """Wraps a method so that `fault` is called before it, once, on that rank in that step."""

    def wrap(method: Callable) -> Callable:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if now["step"] == step and int(os.environ["RANK"]) == rank and not now["done"]:
                now["done"] = True
                fault(self)
            return method(self, *args, **kwargs)

        return wrapped

    return wrap


now: dict[str, Any] = {"step": 0, "done": False}


def count_steps() -> None:
    enter = watchdog.Watchdog.enter

    def counted(self: Any, phase: str, step: int, samples: Any = ()) -> None:
        now["step"] = step if phase in ("forward", "backward", "update", "save", "evaluation") else 0
        enter(self, phase, step, samples)

    watchdog.Watchdog.enter = counted  # type: ignore[method-assign]


def die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def usr1(_: Any) -> None:
    """Twice: the second must change nothing."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGUSR1)


def nan_in_a_weight(engine: Any) -> None:
    next(f for f in engine.fragments() if f.kind == "weight").tensor[0] = math.nan


def bit_of_a_weight(saves: Any) -> None:
    next(iter(saves._engine.parameters.values())).detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def slower_steps(_: Any) -> None:
    """Time for a test to do what it does beside them."""
    update = Engine.update
    Engine.update = lambda *args: (time.sleep(0.15), update(*args))[1]  # type: ignore[method-assign]


def slow_rank(engine: Any) -> None:
    """Five times as slow for 40 steps, of one micro-batch each."""
    forward, left = engine.module.forward, iter(range(40))
    engine.module.forward = lambda *args: (next(left, None) is not None and time.sleep(0.16), forward(*args))[1]


def steady_ranks() -> None:
    """A forward pass long enough that other work on the machine makes no rank twice as slow; and less time to tell it."""
    forward = Transformer.forward
    Transformer.forward = lambda *args: (time.sleep(0.04), forward(*args))[1]  # type: ignore[method-assign]
    stragglers.STEPS, stragglers.WINDOWS = 40, 4


def late_view(folder: Path, seconds: float = 3.0) -> None:
    """This process sees an empty folder there for so long, as NFS may show it: a mount of its own."""
    empty = Path(f"{folder}.as-seen")
    empty.mkdir()
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    for arguments in (["--make-rprivate", "/"], ["--bind", str(empty), str(folder)]):
        subprocess.run(["mount", *arguments], check=True)
    timer = threading.Timer(seconds, subprocess.run, [["umount", "-l", str(folder)]])
    timer.daemon = True
    timer.start()


def no_view(folder: Path) -> None:
    checkpoint.SEEN_S = 2.0
    late_view(folder, 600)


def unreadable(_: Any) -> None:
    raise OSError(5, "Input/output error")


def slow_syncs(_: Any) -> None:
    sync = checkpoint_writer.sync
    checkpoint_writer.sync = lambda path: (time.sleep(2), sync(path))  # type: ignore[assignment]


def another_collective(engine: Any) -> None:
    torch.distributed.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3), group=engine.mesh.control)


def take_all_memory(_: Any) -> None:
    """Written to, so that it is there; more than the control group of the test has."""
    taken = [b"x" * 2**26 for _ in range(64)]
    raise AssertionError(f"{len(taken) / 16:g} GiB, and the kernel did not mind")


FAULTS: dict[str, tuple[Any, str, Callable[[Any], None]]] = {
    "die-at-start": (pretrain, "build_mesh", die),
    "die-in-engine": (pretrain, "build_engine", die),
    "die-in-agreement": (pretrain, "agree_on_start", die),
    "die-in-forward": (Engine, "forward", die),
    "die-in-backward": (Engine, "backward", die),
    "die-in-reduce": (Mesh, "sum_on_device", die),
    "die-in-update": (torch.optim.AdamW, "step", die),
    "raise-in-forward": (Engine, "forward", lambda _: 1 / 0),  # type: ignore[dict-item]
    "out-of-memory": (Engine, "forward", take_all_memory),
    "late": (Engine, "forward", lambda _: time.sleep(12)),
    "desync": (Engine, "forward", another_collective),
    "nan-weight": (Engine, "forward", nan_in_a_weight),
    "slow-sync": (Engine, "forward", slow_syncs),
    "flip-bit": (Saves, "begin", bit_of_a_weight),
    "slow-rank": (Engine, "forward", slow_rank),
    "slow-steps": (Engine, "forward", slower_steps),
    "usr1-in-forward": (Engine, "forward", usr1),
    "usr1-in-save": (Saves, "begin", usr1),
    "usr1-in-evaluation": (evaluation, "eval_batches", usr1),
    "unreadable-held-out": (evaluation, "eval_batches", unreadable),
    "late-view": (saving, "newest_good", late_view),
    "no-view": (saving, "newest_good", no_view),
}


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # deepspeed's
    name, rank, step, _, *arguments = words
    owner, method, fault = FAULTS[name]
    count_steps()
    if name == "slow-rank":
        steady_ranks()
    setattr(owner, method, at(int(step), int(rank), fault)(getattr(owner, method)))
    pretrain.leave(pretrain.main(arguments))
