"""Cell D's tokenizing: encode_batch beside datasets.map with the same tokenizer, interleaved, ids compared.

    OMP_NUM_THREADS=1 python tests/benchmarks/bulk_encode.py [--pairs 5] [--poems FILE.jsonl.gz]

Texts: the running Python's standard library, and a file of JSON lines with "text" where one is given. Tokenizers, trained
here on the same texts: byte-level BPE (16,384), SentencePiece BPE and unigram (8,192). Each side has two processes and
the whole way from an Arrow file of texts to a file of ids: theirs datasets.map(batched=True, num_proc=2), ours two
processes started beforehand that take the same rows, in batches of 2**20 characters. Both load their tokenizer anew in
every run; ours proves its ids in every run. Prints medians over the pairs of theirs / ours, of wall time and of CPU
seconds. About 20 s a pair for all rows on two cores; the file's rows are compared once, id by id.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from data.tokenizer import TokenizerConfig, load_tokenizer, train

N_PROCESSES = 2
BATCH_CHARS = 2**20


def library_texts() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    texts = (path.read_bytes().decode("utf-8", errors="ignore") for path in paths)
    return [text for text in texts if text]


def poem_texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def make_tokenizers(texts: list[str], folder: Path) -> dict[str, Path]:
    sample = 4 * 2**20
    made = {}
    for model_type in ("bpe", "unigram"):
        cfg = TokenizerConfig(model_type=model_type, train_bytes=sample)
        made[f"SentencePiece {model_type}"] = train([(texts, sample)], folder / model_type, cfg).folder
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=16384,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts[::3], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder / "byte_level")
    return {"byte-level BPE": folder / "byte_level", **made}


# -- their side --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _library(folder: str, _run: int) -> Callable[[list[str]], list[list[int]]]:
    """The tokenizer's own library, as its documentation uses it under datasets.map."""
    if (Path(folder) / "tokenizer.json").is_file():
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
        return lambda batch: fast(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    return lambda batch: processor.encode(batch, num_threads=1)


def _map(batch: dict[str, list[str]], folder: str, run: int) -> dict[str, list[list[int]]]:
    return {"ids": _library(folder, run)(batch["text"])}


def theirs(texts: datasets.Dataset, folder: Path, run: int) -> Any:
    return texts.map(
        _map,
        batched=True,
        num_proc=N_PROCESSES,
        remove_columns=["text"],
        fn_kwargs={"folder": str(folder), "run": run},
        features=datasets.Features({"ids": datasets.List(datasets.Value("int32"))}),
        load_from_cache_file=False,
        new_fingerprint=f"{folder.name}{run}",
    )


# -- our side ----------------------------------------------------------------------------------------------------------


def ours(pool: Any, stored: Path, folder: Path, out: Path) -> list[tuple[Path, list[int]]]:
    return pool.starmap(_encode, [(stored, folder, out / str(rank), rank) for rank in range(N_PROCESSES)], chunksize=1)


def _encode(stored: Path, folder: Path, out: Path, rank: int) -> tuple[Path, list[int]]:
    """One process's share of the rows, as datasets cuts them, to a file of ids. Gives the file and the lengths."""
    rows = datasets.load_from_disk(str(stored)).shard(N_PROCESSES, rank, contiguous=True)
    tokenizer = load_tokenizer(folder)
    lengths: list[int] = []
    with open(out, "wb") as file:
        for batch in batches(text for part in rows.data["text"].chunks for text in part.to_pylist()):
            for ids in tokenizer.encode_batch(batch):
                file.write(ids)
                lengths.append(len(ids))
    return out, lengths


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_chars = 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


# -- the measurement ---------------------------------------------------------------------------------------------------


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of this process, of its children that ended, and of those that have not."""
    mine = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    total = sum(usage.ru_utime + usage.ru_stime for usage in mine)
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed(work: Callable[[], Any], pids: list[int]) -> tuple[Any, float, float]:
    cpu, began = cpu_s(pids), time.perf_counter()
    result = work()
    return result, time.perf_counter() - began, cpu_s(pids) - cpu


def compare(name: str, texts: list[str], folder: Path, pool: Any, n_pairs: int) -> None:
    n_mb = sum(len(text.encode()) for text in texts) / 1e6
    walls, cpus = [], []
    with tempfile.TemporaryDirectory() as place:
        stored, out = Path(place) / "stored", Path(place)
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(stored)
        opened = datasets.load_from_disk(str(stored))
        pids = [process.pid for process in pool._pool]
        sides = {"theirs": lambda pair: theirs(opened, folder, pair), "ours": lambda _: ours(pool, stored, folder, out)}
        for pair in range(-1, n_pairs):  # the first is dropped: imports
            order = ["theirs", "ours"] if pair % 2 == 0 else ["ours", "theirs"]
            found = {side: timed(partial(sides[side], pair), pids) for side in order}
            (their_ids, wall, cpu), (our_ids, our_wall, our_cpu) = found["theirs"], found["ours"]
            if pair < 0:
                _check(their_ids, our_ids)
            else:
                walls.append((wall, our_wall))
                cpus.append((cpu, our_cpu))
            their_ids.cleanup_cache_files()
    ratios, cpu_ratios = [a / b for a, b in walls], [a / b for a, b in cpus]
    wall, our_wall = (statistics.median(side) for side in zip(*walls, strict=True))
    cpu, our_cpu = (statistics.median(side) for side in zip(*cpus, strict=True))
    print(
        f"| {name} | {n_mb:.1f} MB, {len(texts):,} | {n_mb / wall:.1f} | {n_mb / our_wall:.0f} | "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f}, {max(ratios):.1f}) | {cpu / n_mb * 1e3:.0f} | "
        f"{our_cpu / n_mb * 1e3:.1f} | {statistics.median(cpu_ratios):.1f} |",
        flush=True,
    )


def _check(their_ids: Any, our_ids: list[tuple[Path, list[int]]]) -> None:
    """Every id of every document."""
    column = their_ids.with_format("arrow")[:]["ids"].combine_chunks()
    expected = column.flatten().to_numpy()
    assert np.array_equal(expected, np.concatenate([np.fromfile(file, np.int32) for file, _ in our_ids])), "ids differ"
    lengths = [length for _, part in our_ids for length in part]
    assert np.array_equal(column.value_lengths().to_numpy(), lengths), "documents differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--poems", type=Path, default=Path(__file__).parents[3] / "shared/data/poetry-zh.jsonl.gz")
    parser.add_argument("--only", default="", help="part of a row's name")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    corpora = {"library": library_texts()}
    if args.poems.is_file():
        corpora["poems"] = poem_texts(args.poems)
    print("| tokenizer, text | size, documents | datasets.map MB/s | ours MB/s | speed: median (min, max) | "
          "theirs CPU-ms/MB | ours | CPU ratio |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(N_PROCESSES) as pool:
        pool.map(abs, range(N_PROCESSES))
        made = make_tokenizers([text for texts in corpora.values() for text in texts[:20_000]], Path(folder))
        for tokenizer, path in made.items():
            for corpus, texts in corpora.items():
                if args.only in (name := f"{tokenizer}, {corpus}"):
                    compare(name, texts, path, pool, args.pairs)


if __name__ == "__main__":
    main()
