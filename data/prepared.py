"""Sources that are tokens already: another prepared corpus, and .bin/.idx pairs of Megatron-LM's. Nothing is copied."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data.corpus import read_manifest, shard_files
from data.manifest import MANIFEST, Manifest, SourceEntry, parse_manifest
from data.shards import Shard, bin_path, idx_path
from data.sources import CorpusConfig, MegatronConfig
from data.store import CacheConfig, MissingError, is_url, open_store
from data.tokenizer import Tokenizer, load_tokenizer
from data.units import TOKENIZER, Pair, PrepareError

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "tokenizer.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Pairs:
    """The pairs of a megatron source, in the order that the config names them; listed as data.sources.Source is."""

    name: str
    kind: str
    pairs: tuple[Pair, ...]
    fingerprint: str  # of names, sizes and modification times

    @property
    def n_bytes(self) -> int:
        return sum(pair.n_bytes for pair in self.pairs)

    @property
    def folder(self) -> str:
        """From which the pairs are named."""
        return self.pairs[0].folder

    def describe(self) -> dict[str, str | int]:
        return {"kind": self.kind, "files": 2 * len(self.pairs), "bin_bytes": self.n_bytes}

    def units(self, _: int) -> list[Pair]:
        return list(self.pairs)


@dataclass(frozen=True)
class Prepared:
    """A source of another corpus."""

    name: str
    location: str  # of the corpus: absolute path or URL
    manifest: Manifest
    entry: SourceEntry  # for this corpus's manifest

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.entry.model_dump_json().encode())

    def describe(self) -> dict[str, str | int]:
        return {"kind": "corpus", "location": self.location}


def open_pairs(cfg: MegatronConfig) -> Pairs:
    """List the pairs. Raises ShardError for one that is missing or is no pair, PrepareError for a URL."""
    for prefix in cfg.prefix:
        if is_url(prefix):
            raise PrepareError(
                f"source {cfg.label!r}: {prefix} is a URL, and a megatron source is read where it lies; copy its .bin "
                "and .idx to a local disk, or to all nodes' common one"
            )
    prefixes = [os.path.abspath(os.path.expanduser(prefix)) for prefix in cfg.prefix]
    folder = os.path.commonpath([os.path.dirname(prefix) for prefix in prefixes])
    digest, pairs = xxhash.xxh3_64(), []
    for number, prefix in enumerate(prefixes):
        Shard(prefix)
        name = os.path.relpath(prefix, folder)
        states = [path(prefix).stat() for path in (bin_path, idx_path)]
        for state in states:
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
        pairs.append(Pair(cfg.label, number, states[0].st_size, folder, name))
    return Pairs(cfg.label, cfg.kind, tuple(pairs), digest.hexdigest())


def open_corpus(cfg: CorpusConfig, cache: CacheConfig) -> Prepared:
    """Read another corpus's manifest and look at the sizes of its shards. Raises a DataError where it is not whole."""
    location = cfg.path if is_url(cfg.path) else os.path.abspath(os.path.expanduser(cfg.path))
    if is_url(location):
        with open_store(location, cache) as store:
            manifest = parse_manifest(store.read(MANIFEST), f"{location}/{MANIFEST}")
    else:
        manifest = read_manifest(location)
    if cfg.source is None and len(manifest.sources) > 1:
        raise PrepareError(
            f"source {cfg.label!r}: {location} has the sources {', '.join(manifest.sources)}; name one of them as "
            "`source`, or list each as a source of its own"
        )
    name = cfg.source or next(iter(manifest.sources))
    if name not in manifest.sources:
        raise PrepareError(
            f"source {cfg.label!r}: {location} has no source {name!r}, only {', '.join(manifest.sources)}; correct "
            "`source`"
        )
    found = manifest.sources[name]
    entry = found.model_copy(update={"folder": found.folder or location})
    _check_sizes(cfg.label, entry)
    return Prepared(cfg.label, location, manifest, entry)


def _check_sizes(label: str, entry: SourceEntry) -> None:
    assert entry.folder is not None
    if is_url(entry.folder):
        return  # the store compares each shard's hash when it fetches it
    for split in entry.splits.values():
        for shard in split.shards:
            for file, size in shard_files(Path(entry.folder), shard):
                if not file.is_file() or file.stat().st_size != size:
                    raise PrepareError(
                        f"source {label!r}: {file} is missing or not of {size} bytes, as its {MANIFEST} says; prepare "
                        "that corpus again, which makes missing shards anew"
                    )


@contextmanager
def tokenizer_of(prepared: Prepared, cache: CacheConfig) -> Iterator[Tokenizer]:
    """The tokenizer of another corpus; one at a URL is fetched, and gone afterwards."""
    if not is_url(prepared.location):
        yield load_tokenizer(Path(prepared.location) / TOKENIZER)
        return
    with tempfile.TemporaryDirectory() as folder, open_store(prepared.location, cache) as store:
        for name in _TOKENIZER_FILES:
            try:
                content = store.read(f"{TOKENIZER}/{name}")
            except MissingError:
                continue
            (Path(folder) / name).write_bytes(content)
        yield load_tokenizer(folder)
