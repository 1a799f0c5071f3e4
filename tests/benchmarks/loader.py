"""Cell E: batches of shuffled windows out of 100M tokens on local disk, ours beside other loaders.

    OMP_NUM_THREADS=1 python tests/benchmarks/loader.py [--pairs 5] [--seconds 4] [--tokens 100_000_000]
        [--peer mosaic=PYTHON] [--peer litdata=PYTHON] [--folder FOLDER]

PYTHON is the interpreter of an environment with the peer in it (mosaicml-streaming or litdata, and torch). All read the
same random uint16 tokens, T=512, 8 sequences a batch, and give int64 tokens and targets (8, 512); each side's data is
written in the form that it recommends. "plain" indexes a memory map in a random order: the floor. Each run is a fresh
process; sides take turns. Files are in the page cache. Memory is the sum of the proportional set sizes of the process
and its workers at the end, less what the imports took; mapped pages of the corpus count in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
T, SEQUENCES = 512, 8
SHARDS, DOCUMENT = 40, 1000  # shards of the corpus (as launcher/prepare.py would make), tokens of a document
DROPPED = 50  # batches before the speed is taken
END = 10  # batches before an epoch's end at which reading stops, so that files are still mapped when memory is taken
WORKERS = {"mosaic": (0, 2), "litdata": (0, 2)}


def windows_of(folder: Path) -> np.ndarray:
    """All windows of T + 1 tokens, next to each other: (n, T + 1) in uint16, mapped."""
    tokens = np.memmap(folder / "tokens.u16", dtype=np.uint16, mode="r")
    return tokens[: len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)


# -- writing: each side's own form of the same tokens --------------------------------------------------------------------


def write_ours(folder: Path) -> None:
    from data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, SplitEntry, TokenizerEntry
    from data.shards import ShardWriter

    tokens, shards = np.memmap(folder / "tokens.u16", dtype=np.uint16, mode="r"), []
    (folder / "ours" / "made-up").mkdir(parents=True)
    for number, part in enumerate(np.array_split(tokens, SHARDS)):
        name = f"made-up/train-{number:05d}-000"
        with ShardWriter(folder / "ours" / name, np.uint16) as writer:
            for start in range(0, len(part), DOCUMENT):
                writer.add(part[start : start + DOCUMENT])
            written = writer.close()
        shards.append(ShardEntry(name=name, bytes=4 * written.tokens, **written._asdict()))
    source = SourceEntry(kind="made up", about={}, left_out={}, splits={"train": SplitEntry(shards=tuple(shards))})
    tokenizer = TokenizerEntry(fingerprint="0123456789abcdef", vocab_size=2**16, eos_id=2)
    manifest = Manifest(tokenizer=tokenizer, dtype="uint16", seed=0, sources={"made-up": source})
    (folder / "ours" / MANIFEST).write_text(manifest.model_dump_json())


def write_mosaic(folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mosaic"), columns={"tokens": f"ndarray:uint16:{T + 1}"}) as writer:
        for window in windows_of(folder):
            writer.write({"tokens": np.ascontiguousarray(window)})


def litdata_part(part: tuple[str, int, int]) -> Iterator[Any]:
    import torch

    folder, first, last = part
    yield torch.from_numpy(windows_of(Path(folder))[first:last].copy().ravel())


def write_litdata(folder: Path) -> None:
    from litdata import TokensLoader, optimize

    n = len(windows_of(folder))
    bounds = [n * part // SHARDS for part in range(SHARDS + 1)]
    optimize(
        fn=litdata_part, inputs=[(str(folder), first, last) for first, last in zip(bounds, bounds[1:], strict=False)],
        output_dir=str(folder / "litdata"), chunk_bytes="64MB", item_loader=TokensLoader(), num_workers=1,
    )  # fmt: skip


# -- reading: each returns what gives batches, for ever or for an epoch --------------------------------------------------


def split(rows: Any) -> tuple[Any, Any]:
    """(n, T + 1) of any integer type -> tokens and targets, (n, T) int64 each."""
    import torch

    both = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(rows)
    both = both.to(torch.int64)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def open_ours(folder: Path, _: int) -> Iterator[tuple[Any, Any]]:
    cfg = DataConfig.model_validate(
        {"corpus": str(folder / "ours"), "sources": [{"kind": "text", "paths": ["-"], "name": "made-up"}]}
    )
    loader = Loader(Dataset.open(cfg, T), global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES, dp_rank=0, dp_size=1)
    return ((batch.tokens[0], batch.targets[0]) for batch in loader)


def open_plain(folder: Path, _: int) -> Iterator[tuple[Any, Any]]:
    windows = windows_of(folder)
    order = np.random.default_rng(0).permutation(len(windows))
    starts = range(0, len(order) - SEQUENCES + 1, SEQUENCES)
    return (split(windows[order[start : start + SEQUENCES]].astype(np.int64)) for start in starts)


def collate_mosaic(samples: list[dict[str, np.ndarray]]) -> tuple[Any, Any]:
    return split(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def open_mosaic(folder: Path, workers: int) -> Iterator[tuple[Any, Any]]:
    dataset = streaming.StreamingDataset(local=str(folder / "mosaic"), shuffle=True, batch_size=SEQUENCES)
    return iter(
        streaming.StreamingDataLoader(
            dataset, batch_size=SEQUENCES, num_workers=workers, collate_fn=collate_mosaic, drop_last=True
        )
    )


def collate_litdata(samples: list[Any]) -> tuple[Any, Any]:
    import torch

    return split(torch.stack(samples))


def open_litdata(folder: Path, workers: int) -> Iterator[tuple[Any, Any]]:
    dataset = litdata.StreamingDataset(
        str(folder / "litdata"), item_loader=litdata.TokensLoader(block_size=T + 1), shuffle=True, drop_last=True
    )
    return iter(
        litdata.StreamingDataLoader(
            dataset, batch_size=SEQUENCES, num_workers=workers, collate_fn=collate_litdata, drop_last=True
        )
    )


WRITERS = {"ours": write_ours, "mosaic": write_mosaic, "litdata": write_litdata}
OPENERS: dict[str, Callable[[Path, int], Iterator[tuple[Any, Any]]]] = {
    "ours": open_ours, "plain": open_plain, "mosaic": open_mosaic, "litdata": open_litdata,
}  # fmt: skip


# -- one run, in a process of its own ------------------------------------------------------------------------------------


def family() -> list[int]:
    """This process and all under it."""
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def pss_mib() -> float:
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in family()]
    return sum(int(line.split()[1]) for lines in rollups for line in lines if line.startswith("Pss:")) / 1024


def cpu_s() -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in family()]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def read(side: str, folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Batches for so many seconds or almost one epoch, whichever ends first."""
    import_side(side)
    before, began = pss_mib(), time.perf_counter()
    batches = OPENERS[side](folder, workers)
    tokens, targets = next(batches)
    first_s = time.perf_counter() - began
    seen = set()
    for _ in range(DROPPED):
        assert tokens.shape == targets.shape == (SEQUENCES, T), tokens.shape
        assert str(tokens.dtype) == "torch.int64", tokens.dtype
        assert (tokens[:, 1:] == targets[:, :-1]).all(), "targets are not the tokens one further on"
        seen |= {row.tobytes() for row in tokens.numpy()}
        tokens, targets = next(batches)
    assert len(seen) == DROPPED * SEQUENCES, "windows come twice"
    times, used, last = [], cpu_s(), time.perf_counter()
    end, most = last + seconds, len(windows_of(folder)) // SEQUENCES - DROPPED - END
    for _ in batches:
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if now > end or len(times) == most:
            break
    n_tokens, used = len(times) * SEQUENCES * T, cpu_s() - used
    return {
        "tokens_per_s": n_tokens / sum(times), "p99_ms": 1e3 * float(np.quantile(times, 0.99)), "first_s": first_s,
        "cpu_s_per_gtok": 1e9 * used / n_tokens, "pss_mib": pss_mib() - before, "imports_mib": before,
    }  # fmt: skip


def import_side(side: str) -> None:
    """Imports are not measured; the names become global, where the openers look for them."""
    import torch

    if side == "ours":
        global Dataset, DataConfig, Loader
        from data.config import DataConfig
        from data.dataset import Dataset
        from data.loader import Loader
    elif side == "mosaic":
        global streaming
        import streaming
    elif side == "litdata":
        global litdata
        import litdata
    torch.zeros(1)


# -- the comparison ------------------------------------------------------------------------------------------------------


def run(python: str, *job: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if python == sys.executable else ""}
    done = subprocess.run(
        [python, __file__, "--job", *job], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(job)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(results: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    ours = results["ours", 0]
    for (side, workers), runs in results.items():
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        speed = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, runs, strict=True)]
        first = [a["first_s"] / b["first_s"] for a, b in zip(ours, runs, strict=True)]
        print(
            f"{side}, {workers} workers: {middle['tokens_per_s'] / 1e6:.1f} M tokens/s, p99 {middle['p99_ms']:.2f} ms, "
            f"first batch {middle['first_s']:.3f} s, CPU {middle['cpu_s_per_gtok']:.1f} s/Gtok, "
            f"memory {middle['pss_mib']:.0f} MiB over imports of {middle['imports_mib']:.0f} | ours / this: "
            f"tokens/s {statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f}), "
            f"first batch {statistics.median(first):.3f} "
            f"({min(first):.3f} to {max(first):.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of reading in each run")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON")
    parser.add_argument("--folder", help="where the temporary folder with the data is made")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        kind, side, folder, *rest = args.job
        if kind == "write":
            WRITERS[side](Path(folder))
            print("{}")
        else:
            print(json.dumps(read(side, Path(folder), int(rest[0]), float(rest[1]))))
        return
    pythons = {"ours": sys.executable, "plain": sys.executable, **dict(peer.split("=", 1) for peer in args.peer)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        np.random.default_rng(0).integers(0, 2**16, args.tokens, dtype=np.uint16).tofile(Path(folder) / "tokens.u16")
        for side in pythons.keys() & WRITERS.keys():
            run(pythons[side], "write", side, folder)
        results: dict[tuple[str, int], list[dict[str, Any]]] = {
            (side, workers): [] for side in pythons for workers in WORKERS.get(side, (0,))
        }
        for pair in range(args.pairs):
            for side, workers in [*results] if pair % 2 == 0 else [*results][::-1]:
                job = ("read", side, folder, str(workers), str(args.seconds))
                results[side, workers].append(run(pythons[side], *job))
                print(f"pair {pair}: {side}, {workers}: {results[side, workers][-1]}", file=sys.stderr, flush=True)
        report(results)


if __name__ == "__main__":
    main()
