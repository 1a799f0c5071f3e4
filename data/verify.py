"""Proof that a finished corpus is what prepare wrote: every file is read and compared with its hash."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.cache import file_xxh3
from data.corpus import read_manifest, shard_files, shards_folder
from data.layout import COUNTS, counts_problem
from data.manifest import MANIFEST, Manifest, SourceEntry
from data.progress import progress
from data.store import is_url
from data.tokenizer import TokenizerError, load_tokenizer
from data.units import TOKENIZER, PrepareError


class Verified(NamedTuple):
    """What was looked at, and what is wrong."""

    files: int  # of shards, and counts of best_fit
    n_bytes: int
    at_urls: list[str]  # the sources whose shards lie at URLs; they are compared as they are fetched
    wrong: list[str]  # a line each: which file, what it should be, what to do


class _Check(NamedTuple):
    """A shard's file, and what it must be."""

    path: Path
    n_bytes: int
    xxh3: str
    todo: str


def verify(location: str) -> Verified:
    """Read all files of the corpus in a folder, of sources that lie in other folders too, with a progress bar.

    Raises PrepareError for a URL, CorpusError for a folder without a finished corpus.
    """
    if is_url(location):
        raise PrepareError(
            f"data.corpus={location} is a URL, and what lies there is compared with its hashes whenever it is fetched; "
            "verify the folder that it was copied from, with data.corpus=FOLDER"
        )
    folder, manifest = Path(location), read_manifest(location)
    at_urls = [name for name, source in manifest.sources.items() if source.folder is not None and is_url(source.folder)]
    checks = [
        check for name, source in manifest.sources.items() if name not in at_urls
        for check in _checks(folder, name, source)
    ]  # fmt: skip
    n_bytes, wrong = sum(check.n_bytes for check in checks), []
    with progress(n_bytes, "files") as advance:
        for check in checks:
            if problem := _problem(check, lambda count: advance(0, count)):
                wrong.append(f"{check.path} {problem}; {check.todo}")
            advance(1, 0)
    counts = sorted(folder.glob(COUNTS.format("*")))
    for path in counts:
        if problem := counts_problem(path.read_bytes(), manifest):
            wrong.append(f"{path} {problem}; run launcher/prepare.py again, which counts anew")
    return Verified(len(checks) + len(counts), n_bytes, at_urls, wrong + _tokenizer_problems(folder, manifest))


def _checks(folder: Path, name: str, source: SourceEntry) -> list[_Check]:
    todo = (
        "delete it and run launcher/prepare.py again, which makes it anew from its text"
        if source.folder is None
        else f"restore it: source {name!r} is used where it lies"
    )
    return [
        _Check(path, size, xxh3, todo)
        for split in source.splits.values()
        for shard in split.shards
        for (path, size), xxh3 in zip(
            shard_files(shards_folder(folder, source), shard), (shard.bin_xxh3, shard.idx_xxh3), strict=True
        )
    ]


def _problem(check: _Check, on_read: Callable[[int], None]) -> str:
    """What is wrong with a file; empty for nothing."""
    try:
        if (size := check.path.stat().st_size) != check.n_bytes:
            return f"has {size} bytes, {MANIFEST} says {check.n_bytes}"
        found = file_xxh3(check.path, on_read)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == check.xxh3 else f"has hash {found}, {MANIFEST} says {check.xxh3}"


def _tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    copy = f"; every run of this corpus has a copy, as runs/NAME/{TOKENIZER}"
    try:
        found = load_tokenizer(folder / TOKENIZER).fingerprint
    except TokenizerError as error:
        return [f"{error}{copy}"]
    expected = manifest.tokenizer.fingerprint
    return [] if found == expected else [
        f"{folder / TOKENIZER} has the fingerprint {found}, {MANIFEST} says {expected}: it is another one; restore it{copy}"
    ]  # fmt: skip
