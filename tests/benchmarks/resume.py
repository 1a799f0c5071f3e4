"""Cell F: from an open process to the first batch, at any place of a made-up corpus of 10 trillion tokens.

    OMP_NUM_THREADS=1 python tests/benchmarks/resume.py [--repeats 5] [--shards 5000] [--global-batch 16]
        [--seq-len 2048] [--shuffle-shards none 8] [--folder FOLDER]

The corpus is two sources of sparse .bin files, 2 billion tokens each, with real indices and a real manifest; nothing
but holes on disk, save for the windows that are compared, which are given random tokens. A run of the first world
takes two steps from 0, 37 and 99 % on and leaves a cursor; each rank of the second world is then a fresh process, and
its time runs, imports done, from the config to its first batch. All ranks' samples and tokens together must be those
that the first world would have read next. Files are in the page cache: what a cold file system adds is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).parents[2]
TOKENS, DOCUMENTS = 2_000_000_000, 4  # of each shard
LENGTH = TOKENS // DOCUMENTS
SOURCES = {"web": 0.6, "code": 0.4}  # share of the shards
MICRO_BATCH = 4
SHARES, WORLDS = (0.0, 0.37, 0.99), ((1, 2), (2, 1))


def make_corpus(folder: Path, n_shards: int) -> None:
    from data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, SplitEntry, TokenizerEntry
    from data.shards import HEADER, MAGIC, VERSION, bin_path, idx_path

    lengths = np.full(DOCUMENTS, LENGTH, "<i4").tobytes()
    pointers = (np.arange(DOCUMENTS, dtype="<i8") * LENGTH * 2).tobytes()
    index = HEADER.pack(MAGIC, VERSION, 8, DOCUMENTS, DOCUMENTS + 1) + lengths + pointers
    index += np.arange(DOCUMENTS + 1, dtype="<i8").tobytes()
    entries = {}
    for source, share in SOURCES.items():
        (folder / source).mkdir(parents=True)
        shards = []
        for number in range(round(share * n_shards)):
            name = f"{source}/train-{number:05d}-000"
            idx_path(folder / name).write_bytes(index)
            with open(bin_path(folder / name), "wb") as stream:
                stream.truncate(2 * TOKENS)
            sizes = {"bytes": 4 * TOKENS, "bin_bytes": 2 * TOKENS, "idx_bytes": len(index)}
            hashes = {"bin_xxh3": xxhash.xxh3_64_hexdigest(name.encode()), "idx_xxh3": xxhash.xxh3_64_hexdigest(index)}
            shards.append(ShardEntry(name=name, tokens=TOKENS, documents=DOCUMENTS, **sizes, **hashes))
        splits = {"train": SplitEntry(shards=tuple(shards))}
        entries[source] = SourceEntry(kind="made up", about={}, left_out={}, splits=splits)
    tokenizer = TokenizerEntry(fingerprint="0123456789abcdef", vocab_size=2**16, eos_id=2)
    manifest = Manifest(tokenizer=tokenizer, dtype="uint16", seed=0, sources=entries)
    (folder / MANIFEST).write_text(manifest.model_dump_json())


# -- a process of its own: of the world that stops, or of the one that goes on ------------------------------------------


def config(job: dict[str, Any]) -> Any:
    from data.config import DataConfig

    sources = [{"kind": "text", "paths": ["-"], "name": name} for name in SOURCES]
    return DataConfig.model_validate(
        {"corpus": job["corpus"], "sources": sources, "seed": 7, "shuffle_shards": job["shuffle_shards"]}
    )


def row_hashes(tokens: np.ndarray) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(row)) for row in tokens]


def leave(job: dict[str, Any]) -> dict[str, Any]:
    """Two steps from a share of the corpus on: the cursor then, and the samples and tokens that would follow."""
    from data.dataset import Dataset
    from data.loader import Loader

    dataset = Dataset.open(config(job), job["seq_len"])
    first = int(job["share"] * sum(corpus.n_windows for corpus in dataset.corpora.values()))
    batch = {"global_batch_size": job["global_batch"], "micro_batch_size": MICRO_BATCH}
    with Loader(dataset, **batch, dp_rank=0, dp_size=job["dp_size"], samples=first) as loader:
        next(loader), next(loader)
        cursor = loader.cursor()
    samples, _ = dataset.take(cursor["samples"], job["global_batch"])
    generator = np.random.default_rng(0)
    for sample in samples.tolist():
        for piece in dataset.pieces(sample)[2]:
            with open(Path(job["corpus"]) / f"{piece.shard}.bin", "r+b") as stream:
                stream.seek(2 * (piece.document * LENGTH + piece.first))
                stream.write(generator.integers(0, 2**16, piece.tokens, dtype=np.uint16).tobytes())
    (Path(job["corpus"]) / "manifest.json").touch()  # or its shards would be newer, and compared with hashes
    hashes = row_hashes(dataset.read(samples).tokens)
    return {"cursor": cursor, "samples": samples.tolist(), "hashes": hashes}


def go_on(job: dict[str, Any]) -> dict[str, Any]:
    """One rank: seconds and memory from the config to the first batch, and what it read."""
    import torch

    from data.dataset import Dataset
    from data.loader import Loader

    cfg = config(job)
    before, began = memory_mib("VmRSS"), time.perf_counter()
    cpu = time.process_time()
    dataset = Dataset.open(cfg, job["seq_len"])
    opened = time.perf_counter()
    samples = dataset.go_on(job["cursor"])
    gone_on = time.perf_counter()
    batch = {"global_batch_size": job["global_batch"], "micro_batch_size": MICRO_BATCH}
    loader = Loader(dataset, **batch, dp_rank=job["dp_rank"], dp_size=job["dp_size"], samples=samples)
    first = next(loader)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    peak = memory_mib("VmHWM")
    loader.close()
    tokens = torch.cat([first.tokens, first.targets[..., -1:]], dim=-1).flatten(0, 1).numpy()
    return {
        "open_s": opened - began, "go_on_s": gone_on - opened, "batch_s": ended - gone_on, "total_s": ended - began,
        "cpu_s": cpu, "imports_mib": before, "peak_mib": peak,
        "samples": first.samples.tolist(), "hashes": row_hashes(tokens),
    }  # fmt: skip


def memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# -- the measurement ---------------------------------------------------------------------------------------------------


def run(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """leave or go_on in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", kind, json.dumps(job)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(left: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Micro-batch a of rank r holds s[(a * dp_size + r) * B + b]: put the ranks together, and compare."""
    samples = np.stack([np.array(rank["samples"]) for rank in ranks], axis=1)  # (A, ranks, B)
    hashes = np.stack([np.array(rank["hashes"]).reshape(-1, MICRO_BATCH) for rank in ranks], axis=1)
    if samples.ravel().tolist() != left["samples"] or hashes.ravel().tolist() != left["hashes"]:
        raise RuntimeError(f"the next samples should be {left['samples']}, were {samples.ravel().tolist()}, or tokens")
    if len(set(left["hashes"])) != len(left["hashes"]):
        raise RuntimeError("two windows have the same tokens: the comparison proves nothing")


def measure(corpus: Path, args: argparse.Namespace, shuffle: int | None, share: float, worlds: tuple[int, int]) -> None:
    common = {"corpus": str(corpus), "shuffle_shards": shuffle, "seq_len": args.seq_len,
              "global_batch": args.global_batch, "share": share}  # fmt: skip
    before, after = worlds
    left = run("leave", {**common, "dp_size": before})
    results = []
    for _ in range(args.repeats):
        jobs = [{**common, "cursor": left["cursor"], "dp_rank": rank, "dp_size": after} for rank in range(after)]
        ranks = [run("go_on", job) for job in jobs]
        check(left, ranks)
        results.append(max(ranks, key=lambda rank: rank["total_s"]))
    middle = {
        key: statistics.median(result[key] for result in results)
        for key in ("open_s", "go_on_s", "batch_s", "total_s", "cpu_s", "imports_mib", "peak_mib")
    }
    spread = [result["total_s"] for result in results]
    print(
        f"shuffle_shards {shuffle} | {share:.0%} | world {before} to {after} | first batch {middle['total_s']:.3f} s "
        f"({min(spread):.3f} to {max(spread):.3f}; CPU {middle['cpu_s']:.3f}): open {middle['open_s']:.3f}, go_on "
        f"{middle['go_on_s']:.3f}, batch {middle['batch_s']:.3f} | peak {middle['peak_mib']:.0f} MiB, of which imports "
        f"{middle['imports_mib']:.0f} | next samples exact",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", type=int, default=5000)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--shuffle-shards", nargs="+", default=["none", "8"])
    parser.add_argument("--folder", help="for the sparse files, which need a file system with holes")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        kind, job = args.job
        print(json.dumps({"leave": leave, "go_on": go_on}[kind](json.loads(job))))
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        corpus = Path(temporary) / "corpus"
        began = time.perf_counter()
        make_corpus(corpus, args.shards)
        manifest = (corpus / "manifest.json").stat().st_size
        print(f"{args.shards} shards, {args.shards * TOKENS / 1e12:g} trillion tokens, manifest of {manifest / 1e6:.2f} MB, "
              f"made in {time.perf_counter() - began:.1f} s; medians of {args.repeats} (slowest rank)")  # fmt: skip
        for name in args.shuffle_shards:
            for share in SHARES:
                for worlds in WORLDS:
                    measure(corpus, args, None if name == "none" else int(name), share, worlds)


if __name__ == "__main__":
    main()
