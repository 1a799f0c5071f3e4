"""What grows with the number of nodes, measured here for 1,024 nodes of 8 GPUs; cluster/SCALE.md tells the results.

    OMP_NUM_THREADS=1 python tests/benchmarks/scale.py [store] [gloo] [cursor] [manifest] [files] [interval]

store      clients of one TCPStore in threads of two processes: until all have met, heartbeats a second, all states at once
gloo       process groups of threads in one process: messages to the store and seconds until they are made
cursor     every rank of 8,192 computes its samples of a step: disjoint, complete, seconds a rank
manifest   a checkpoint of 8,192 files: manifest's size, seconds to write, read and look for; opening one file or all
files      start-up and open files of a corpus of N shards
interval   the best time between saves for a number of nodes (Young, Daly), and the goodput to expect

All in one machine: no network is in the figures.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

RANKS = 8192
GPUS = 8  # a node
# Llama 3 (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs
FAILURES_PER_GPU_S = 419 / (54 * 86_400 * 16_384)

STATE = '{"beat": 1000, "entered": 5000, "where": "forward of step 1000, samples 4096000 to 4100095", "lasted_s": 0}'


def in_threads(n: int, work: Callable[[int], Any]) -> float:
    """Seconds until work(0) to work(n - 1) have ended, each in a thread."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


# -- the store ----------------------------------------------------------------------------------------------------------


def clients(port: int, n: int, world: int, seconds: float, beats: Any, met_s: Any) -> None:
    """n of the world's clients: all meet, then send heartbeats as launcher/watchdog.py does, as fast as they get answers."""
    done = [0] * n

    def one(i: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
        if store.add("met", 1) == world:
            store.set("all", "1")
        store.wait(["all"])
        met_s[i] = time.perf_counter()
        until = met_s[i] + seconds
        while time.perf_counter() < until:
            store.set(f"watchdog/{i}", STATE)
            store.check(["watchdog/failure"])
            done[i] += 1

    in_threads(n, one)
    beats.value = sum(done)


def store() -> None:
    print("ranks  all have met, s  beats/s (a set and a check each)")
    context = multiprocessing.get_context("spawn")
    for world in (128, 256, 512, 1024):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        parts, seconds = 2, 5.0
        beats = [context.Value("q", 0) for _ in range(parts)]
        met = [context.Array("d", world // parts) for _ in range(parts)]
        processes = [
            context.Process(target=clients, args=(server.port, world // parts, world, seconds, beats[p], met[p]))
            for p in range(parts)
        ]
        for process in processes:
            process.start()
        while server.add("met", 0) == 0:  # after their imports
            time.sleep(0.001)
        began = time.perf_counter()
        for process in processes:
            process.join()
        met_s = max(max(array) for array in met) - began
        print(f"{world:5d}  {met_s:15.2f}  {sum(b.value for b in beats) / seconds:8,.0f}", flush=True)
    states()


def states() -> None:
    """What a rank asks when a collective has failed: where all are (launcher/watchdog.py)."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keys = [f"watchdog/{rank}" for rank in range(RANKS)]
    server.multi_set(keys, [STATE] * RANKS)
    for askers in (1, 16, 64):
        stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(askers)]
        seconds = in_threads(askers, lambda i, stores=stores: stores[i].multi_get(keys))
        print(
            f"the states of {RANKS:,} ranks, {len(STATE) * RANKS / 1e6:.1f} MB: {seconds:.2f} s for {askers} who ask at once"
        )


# -- process groups -----------------------------------------------------------------------------------------------------


class Counting(dist.Store):
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = dist.HashStore(), Counter[str]()

    def set(self, key: str, value: Any) -> None:
        self.count["set"] += 1
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.count["get"] += 1
        return self.inner.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.count["wait"] += 1
        self.inner.wait(keys, timeout or timedelta(seconds=300))


def gloo() -> None:
    print("connections   ranks  store messages  made, s  first all-reduce, s")
    for lazy in ("0", "1"):
        os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
        for n in (16, 32, 64, 128):
            messages, seconds = 0, []
            for at in (Counting(), dist.HashStore()):
                groups: dict[int, Any] = {}

                def make(rank: int, at: Any = at, n: int = n, groups: dict[int, Any] = groups) -> None:
                    groups[rank] = dist.ProcessGroupGloo(at, rank, n, timedelta(seconds=300))

                made_s = in_threads(n, make)
                if isinstance(at, Counting):
                    messages = sum(at.count.values())
                seconds = [
                    made_s,
                    in_threads(n, lambda r, groups=groups: groups[r].allreduce([torch.ones(4)]).wait()),
                ]
            kind = "as they come" if lazy == "1" else "all to all"
            print(f"{kind:12}  {n:5d}  {messages:14,}  {seconds[0]:7.2f}  {seconds[1]:8.2f}", flush=True)


# -- data ---------------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, shards: int, tokens: int, document: int = 500) -> None:
    """Random tokens in so many shards of one source."""
    from data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, SplitEntry, TokenizerEntry
    from data.shards import ShardWriter

    entries, rng = [], np.random.default_rng(0)
    (folder / "made-up").mkdir(parents=True)
    for number in range(shards):
        name = f"made-up/train-{number:05d}-000"
        with ShardWriter(folder / name, np.uint16) as writer:
            for _ in range(tokens // document):
                writer.add(rng.integers(0, 2**16, document, dtype=np.uint16))
            entries.append(ShardEntry(name=name, bytes=4 * tokens, **writer.close()._asdict()))
    source = SourceEntry(kind="made up", about={}, left_out={}, splits={"train": SplitEntry(shards=tuple(entries))})
    tokenizer = TokenizerEntry(fingerprint="0123456789abcdef", vocab_size=2**16, eos_id=2)
    manifest = Manifest(tokenizer=tokenizer, dtype="uint16", seed=0, sources={"made-up": source})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def open_corpus(folder: Path, batch: int) -> Any:
    from data.config import DataConfig
    from data.dataset import Dataset

    sources = [{"kind": "text", "name": "made-up", "paths": ["-"]}]
    return Dataset.open(DataConfig.model_validate({"corpus": str(folder), "sources": sources}), 128, batch)


def cursor() -> None:
    """The loader of every rank, as the train loop has it."""
    from data.loader import Loader

    micro, accum, step = 2, 2, 1000
    batch = RANKS * micro * accum
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name) / "c", 8, 128 * batch // 8 + 200_000)
        dataset = open_corpus(Path(name) / "c", batch)
        seen, seconds = [], []
        for rank in range(RANKS):
            began = time.perf_counter()
            with Loader(dataset, global_batch_size=batch, micro_batch_size=micro, dp_rank=rank, dp_size=RANKS,
                        samples=step * batch, prefetch=1) as loader:  # fmt: skip
                seen.append(next(loader).samples.ravel())
                seconds.append(time.perf_counter() - began)
        every = np.sort(np.concatenate(seen))
        assert np.array_equal(every, np.arange(step * batch, (step + 1) * batch)), "lost or read twice"
        print(
            f"{RANKS:,} ranks read {batch:,} samples of step {step:,}, each once; from a loader's start to its first "
            f"batch {1e3 * np.median(seconds):.1f} ms ({1e3 * np.quantile(seconds, 0.99):.1f} ms for 99 %)"
        )


def files() -> None:
    from data.loader import Loader

    print("shards  manifest, MB  opened, s  first batch, s  shards' files mapped after 64 batches of 16")
    for shards in (100, 1000, 10_000):
        with tempfile.TemporaryDirectory() as name:
            write_corpus(Path(name) / "c", shards, 2000)
            n_bytes = (Path(name) / "c/manifest.json").stat().st_size
            began = time.perf_counter()
            dataset = open_corpus(Path(name) / "c", 16)
            opened_s = time.perf_counter() - began
            with Loader(dataset, global_batch_size=16, micro_batch_size=16, dp_rank=0, dp_size=1) as loader:
                began = time.perf_counter()
                next(loader)
                first_s = time.perf_counter() - began
                for _ in range(63):
                    next(loader)
                maps = Path("/proc/self/maps").read_text().splitlines()
                mapped = len({line.split()[-1] for line in maps if "train-" in line})
            print(f"{shards:6,}  {n_bytes / 1e6:12.2f}  {opened_s:9.2f}  {first_s:14.2f}  {mapped}, at most "
                  f"{sum(corpus.most_files for corpus in dataset.corpora.values())}", flush=True)  # fmt: skip


# -- checkpoints --------------------------------------------------------------------------------------------------------


def shapes_of(layers: int = 96, d: int = 12_288) -> dict[str, list[int]]:
    """Names and shapes as of GPT-3 175B."""
    block = {"attn.wq": [d, d], "attn.wk": [d, d], "attn.wv": [d, d], "attn.wo": [d, d], "mlp.up": [4 * d, d],
             "mlp.down": [d, 4 * d], "norm1": [d], "norm2": [d]}  # fmt: skip
    return {f"blocks.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}


def manifest() -> None:
    from parallel.checkpoint import (
        CheckpointReader,
        Manifest,
        committed_steps,
        faults,
        folder_name,
        manifest_text,
        read_manifest,
        shard_name,
        write_synced,
    )
    from parallel.checkpoint_writer import write_safetensors

    with tempfile.TemporaryDirectory() as name:
        for step in (1000, 2000, 3000):
            folder = Path(name) / folder_name(step)
            folder.mkdir()
            entries, began = {}, time.perf_counter()
            for rank in range(RANKS):  # a fragment of three tensors each, as ZeRO 1 leaves them
                part = {
                    f"{kind}:w:{4 * rank}": torch.full((4,), float(rank))
                    for kind in ("weight", "exp_avg", "exp_avg_sq")
                }
                path = folder / shard_name(rank)
                entries[path.name] = {"xxh3": write_safetensors(path, part), "bytes": path.stat().st_size}
            files_s = time.perf_counter() - began
            whole = Manifest(step, step, RANKS, 1, {"w": [4 * RANKS], **shapes_of()}, entries, {"samples": 1}, {})
            began = time.perf_counter()
            write_synced(folder / "manifest.json", manifest_text(whole))
            write_s = time.perf_counter() - began

        def timed(what: str, work: Callable[[], Any]) -> None:
            began = time.perf_counter()
            work()
            print(f"{what:60} {time.perf_counter() - began:8.3f} s", flush=True)

        print(f"{'manifest.json':60} {(folder / 'manifest.json').stat().st_size / 1e6:8.2f} MB")
        print(f"{f'write {RANKS:,} small files (one process; ranks do it at once)':60} {files_s:8.3f} s")
        print(f"{'write the manifest, synced':60} {write_s:8.3f} s")
        timed("read and check the manifest (each rank)", lambda: read_manifest(folder))
        timed("list three checkpoints", lambda: committed_steps(Path(name)))
        timed("compare one file with its hash (each rank its own)", lambda: faults(folder, 7, RANKS))
        timed("compare all files with their hashes (one process)", lambda: faults(folder))
        timed("see which files are there (each rank)", lambda: os.listdir(folder))
        timed("open the own file of a rank (the same world again)", lambda: CheckpointReader(folder, shard_name(7)))
        timed("open all files (another world: each rank)", lambda: CheckpointReader(folder))
        own = [({"bytes": 1, "xxh3": "0" * 32}, None, False)] * RANKS
        import pickle

        timed(
            "unpickle what one agreement of a save brings (each rank)",
            lambda: [pickle.loads(pickle.dumps(o)) for o in own],
        )
        (folder / shard_name(RANKS - 1)).write_bytes(b"cut")
        timed("find the last file cut, and the checkpoint before whole", lambda: (faults(folder), faults(
            Path(name) / folder_name(2000))))  # fmt: skip


# -- failures -----------------------------------------------------------------------------------------------------------


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Between saves that hold the training up for stall_s each, with mtbf_s between failures (Young 1974): sqrt(2 s M).

    Daly's higher-order terms change it by less than the stall's share of the interval, which is small here.
    """
    return math.sqrt(2 * stall_s * mtbf_s)


def expected_goodput(interval_s: float, stall_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of wall time in steps that count.

    A save in the background counts once written: a failure costs half an interval, the writing, and the restart.
    """
    saving = stall_s / (interval_s + stall_s)
    failing = (interval_s / 2 + write_s + restart_s) / mtbf_s
    return max(0.0, (1 - saving) * (1 - failing))


def interval() -> None:
    """Of a 70B model (840 GB of fp32 weights and moments), with what RECORDS.md measured and what is assumed."""
    state, copy_rate = 12 * 70e9, 0.305e9 / 0.021  # bytes; bytes/s of a rank's copy to the host, cell G of RECORDS.md
    node_rate, all_rate = 1e9, 100e9  # bytes/s: of a node as on the SSD of cell G; of the file system, assumed
    restart_s = 300.0  # assumed: SLURM's two minutes, and the start
    print("nodes   GPUs  MTBF, h  stall, s  written, s  best interval, s  goodput  with a save an hour")
    for nodes in (8, 16, 32, 64, 128, 256, 512, 1024):
        mtbf_s = 1 / (FAILURES_PER_GPU_S * GPUS * nodes)
        stall_s, write_s = state / (GPUS * nodes) / copy_rate, state / min(nodes * node_rate, all_rate)
        # saves cannot come faster than they are written
        best_s = max(best_interval_s(stall_s, mtbf_s), write_s)
        rest = (stall_s, write_s, restart_s, mtbf_s)
        print(f"{nodes:5,}  {GPUS * nodes:5,}  {mtbf_s / 3600:7.1f}  {stall_s:8.2f}  {write_s:10.1f}  {best_s:16.0f}  "
              f"{expected_goodput(best_s, *rest):7.2%}  {expected_goodput(3600, *rest):7.2%}")  # fmt: skip


PARTS = {"store": store, "gloo": gloo, "cursor": cursor, "manifest": manifest, "files": files, "interval": interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS], choices=[*PARTS, []])
    for name in parser.parse_args().parts:
        print(f"-- {name}", flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of gloo's groups
