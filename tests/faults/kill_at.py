"""Ends a rank at one file operation of a save after the other, and resumes each time: tests/faults/test_kill_at.py.

    LD_PRELOAD=kill_at.so python tests/faults/kill_at.py FOLDER

Torch and DeepSpeed are imported once; every case is a fork of two ranks that train, save and are ended, and of two that
go on. Prints a line of JSON for each case: {"rank", "n", "count", "resumed", "state", "losses"}.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import xxhash

from model.config import ModelConfig
from parallel.checkpoint import newest_good
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig, ParallelConfig
from parallel.mesh import Mesh, Place, build_mesh
from ranks import build, manifest_of, run_steps, whole_state

RANKS, STEPS = 2, 4
# one block and few tensors: each is a file operation
MODEL = ModelConfig(vocab_size=97, seq_len=16, d_model=24, n_layers=1, n_heads=2, d_ff=32, tie_embeddings=True)
SHIM = ctypes.CDLL(None)
SHIM.kill_at_count.restype = ctypes.c_long


def engine_of(mesh: Mesh):
    return build(mesh, ParallelConfig(zero_stage=1, precision="fp32"), MODEL)


def save_under_fire(mesh: Mesh, folder: Path, rank: int, n: int) -> int:
    """Steps 1 and 2 with a checkpoint after each, of which one stays; the second save is armed."""
    engine = engine_of(mesh)
    writer = CheckpointWriter(folder, mesh, CheckpointConfig(keep=1))
    for step in (1, 2):
        run_steps(engine, range(step - 1, step), vocab_size=MODEL.vocab_size)
        if step == 2 and mesh.rank == rank:
            SHIM.kill_at_arm(os.fsencode(folder), ctypes.c_long(n))
        writer.save(engine, manifest_of(engine, step))
        assert writer.wait().error is None, writer.wait()
    return SHIM.kill_at_count()


def go_on(mesh: Mesh, folder: Path) -> dict:
    engine = engine_of(mesh)
    reader = newest_good(folder, mesh)
    engine.load_state(reader, reader.manifest.adam_steps)
    losses = run_steps(engine, range(reader.manifest.step, STEPS), vocab_size=MODEL.vocab_size)
    state = whole_state(engine)
    digest = xxhash.xxh3_64_hexdigest(b"".join(state[key].numpy().tobytes() for key in sorted(state)))
    return {"resumed": reader.manifest.step, "state": digest, "losses": [loss for loss, *_ in losses[-2:]]}


def fork(number: int, folder: Path, work, *arguments) -> int:
    """A process that is rank `number` and leaves what work returned in folder/result-NUMBER."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        place = Place(number, RANKS, number, RANKS, f"file://{folder}/store", "a test")
        result = work(build_mesh(place, timeout_s=20), *arguments)
        (folder / f"result-{number}").write_text(json.dumps(result))
        code = 0
    finally:
        os._exit(code)


def ranks(folder: Path, work, *arguments):
    """What rank 0 and 1 returned; None for one that ended otherwise. The first end but by work's return ends the other."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pids = {fork(number, folder, work, *arguments): number for number in range(RANKS)}
    until = time.monotonic() + 60
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        pids.pop(pid, None)
        late = time.monotonic() > until
        if late or (pid and status):
            time.sleep(0.3)  # the other may still write what it had begun
            for other in pids:
                os.kill(other, signal.SIGKILL)
        elif not pid:
            time.sleep(0.01)
    files = [folder / f"result-{number}" for number in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def main(folder: Path) -> None:
    meeting, checkpoints = folder / "meeting", folder / "checkpoints"
    for rank in range(RANKS):
        count, n = 1, 0
        while n <= count:
            shutil.rmtree(checkpoints, ignore_errors=True)
            counts = ranks(meeting, save_under_fire, checkpoints, rank, n)
            if n == 0:
                assert None not in counts, "the save that only counts did not end well"
                count = counts[rank]
            else:
                assert counts[rank] is None, f"rank {rank} was not ended at operation {n} of {count}"
            (first, second) = ranks(meeting, go_on, checkpoints)
            assert first == second
            print(json.dumps({"rank": rank, "n": n, "count": count, **(first or {})}), flush=True)
            n += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
