"""Ends an export at one file operation after the other: tests/faults/test_kill_export.py.

    LD_PRELOAD=kill_at.so python tests/faults/kill_export.py RUN FOLDER EVERY

Every case is a fork that exports RUN to FOLDER/out, beside what the case before it left. Prints a line of JSON for each:
{"n", "count", "output": "absent" or "whole" or what is wrong}.
"""

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from launcher import export
from parallel.checkpoint import file_hash

SHIM = ctypes.CDLL(None)
SHIM.kill_at_count.restype = ctypes.c_long
ARGUMENTS = ["--shard-size", "60KB", "--dtype", "bf16"]


def attempt(run: Path, folder: Path, n: int) -> tuple[int, int]:
    """(how it ended, operations counted) of an export that is ended at operation n; 0: never."""
    counted = folder.parent / "counted"
    counted.unlink(missing_ok=True)
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        return status, int(counted.read_text()) if counted.exists() else 0
    code = 1
    try:
        torch.set_num_threads(1)
        SHIM.kill_at_arm(os.fsencode(folder), ctypes.c_long(n))
        with contextlib.redirect_stdout(io.StringIO()):
            code = export.main([str(run), "--output", str(folder / "out"), *ARGUMENTS])
        counted.write_text(str(SHIM.kill_at_count()))
    finally:
        os._exit(code)


def state_of(output: Path) -> str:
    if not output.exists():
        return "absent"
    try:
        listed = json.loads((output / "export_report.json").read_text())["files"]
        wrong = [name for name, entry in listed.items() if file_hash(output / name) != entry["xxh3"]]
        have = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
        wrong += sorted(have ^ {*listed, "README.md", "export_report.json"})
        return f"wrong: {wrong}" if wrong else "whole"
    except (OSError, ValueError) as error:
        return f"wrong: {error!r}"


def main(run: Path, folder: Path, every: int) -> None:
    export.PROOF_CHARACTERS, export.PROOF_TOKENS = 1000, 64
    folder.mkdir()
    status, count = attempt(run, folder, 0)
    assert status == 0, "the export that only counts did not end well"
    print(json.dumps({"n": 0, "count": count, "output": state_of(folder / "out")}), flush=True)
    # the last ones are always tried: they are the commit
    for n in sorted({*range(1, count + 1, every), *range(count - 5, count + 1)}):
        shutil.rmtree(folder / "out", ignore_errors=True)
        status, _ = attempt(run, folder, n)
        assert os.WIFSIGNALED(status), f"not ended at operation {n} of {count}: {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"n": n, "count": count, "output": state_of(folder / "out")}), flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    status, _ = attempt(run, folder, 0)
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps({"n": 0, "count": count, "output": state_of(folder / "out"), "left": left}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
