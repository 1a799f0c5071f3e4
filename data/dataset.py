"""What a run reads: the sources of its corpus, mixed, as a function from global sample numbers to windows.

The run's samples are numbered 0, 1, 2, ... Sample g belongs to a source (data/mixture.py), is the n-th of that source,
and reads a window that the source's order names (data/order.py). What is left out on purpose (data.skip) keeps its
number and is passed over. Nothing here depends on ranks or batches, and all that a checkpoint needs is the number of
the next sample and what that number refers to: the cursor.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, NonNegativeInt, ValidationError

from data.config import DataConfig, SkipConfig, StageConfig
from data.corpus import Corpus, CorpusFolder, Piece, Reading
from data.errors import DataError
from data.layout import Rows
from data.manifest import ShardEntry
from data.mixture import Era, EraStage, Mixture, temper
from data.order import WindowOrder
from data.store import Store

MANY_EPOCHS = 4  # repeated text helps little beyond this (Muennighoff et al., arXiv:2305.16264)

IntArray = NDArray[np.int64]
Stretch = tuple[int, int]  # first and last sample


class DatasetError(DataError):
    """Sources that do not fit the config or the run, or a cursor that belongs to other data."""


class Cursor(BaseModel, frozen=True, extra="forbid"):
    """Where a run stands in its data, and what the number refers to; saved with every checkpoint."""

    samples: NonNegativeInt  # number of the next sample to read
    seed: NonNegativeInt
    sources: dict[str, str]  # fingerprint of every source that the run has ever had
    eras: tuple[Era, ...]  # how they were mixed, from the beginning


class Place(NamedTuple):
    """Where samples lie: arrays (n,)."""

    sources: IntArray  # number of the source in Dataset.names
    indices: IntArray  # which of its source's samples it is
    epochs: IntArray  # of the source
    windows: IntArray  # number in the source's corpus


class Dataset:
    """Use Dataset.open; then a run that goes on from a checkpoint calls go_on. Who looks back uses Dataset.recall."""

    def __init__(
        self, corpora: dict[str, Corpus], eras: Sequence[Era], seed: int, skip: Sequence[SkipConfig], batch: int
    ) -> None:
        """corpora: by source.    batch: sequences a step, for entries of data.skip that name steps."""
        self.corpora, self.seed = corpora, seed
        self.names = tuple(sorted(corpora))  # so that the order in which a config names them changes nothing
        self.eras = tuple(eras)
        self.mixture = Mixture(self.names, self.eras, seed)
        self.orders: dict[str, WindowOrder] = {name: corpus.order(seed) for name, corpus in corpora.items()}
        self.seq_len = next(iter(corpora.values())).seq_len
        self.fixed_targets = not any(corpus.counts_targets for corpus in corpora.values())
        self._fingerprints = {name: corpus.fingerprint for name, corpus in corpora.items()}  # gone ones' too: see go_on
        self._wishes: dict[Store, list[ShardEntry]] = {}
        self._masked = any(corpus.document_mask for corpus in corpora.values())
        self.stretches = _stretches(skip, batch)
        self._skipped_samples = _merged(span for _, span in self.stretches)
        self._skipped_windows: dict[str, IntArray] = {}  # by source, ascending
        for entry in skip:
            if entry.source is not None and entry.shard is not None and entry.documents is not None:
                windows = corpora[entry.source].windows_of(entry.shard, entry.documents)
                known = self._skipped_windows.get(entry.source, windows)
                self._skipped_windows[entry.source] = np.union1d(known, windows)

    @classmethod
    def open(cls, cfg: DataConfig, seq_len: int, batch: int = 1) -> "Dataset":
        """The training split of all sources of the config, mixed as it says.

        Raises a DataError where the corpus lacks a source, or has none of its windows, or cfg.skip leaves out all.
        """
        folder = CorpusFolder(cfg.corpus, reading(cfg, seq_len))
        corpora = {source.label: folder.split(source.label, "train") for source in cfg.sources}
        if unknown := sorted({e.source for e in cfg.skip if e.source is not None} - corpora.keys()):
            raise DatasetError(f"data.skip names {', '.join(unknown)}; data.sources has {list(corpora)}")
        dataset = cls(corpora, [_era(cfg, corpora, seq_len)], cfg.seed, cfg.skip, batch)
        for name, windows in dataset._skipped_windows.items():
            if len(windows) == corpora[name].n_windows:
                raise DatasetError(f"data.skip leaves out every window of {name}; take it out of data.sources instead")
        return dataset

    @classmethod
    def recall(cls, cfg: DataConfig, seq_len: int, batch: int, cursor: dict[str, Any]) -> "Dataset":
        """Look back: all sources that the run has had, mixed as when the cursor was saved, whatever data.sources says now.

        Raises DatasetError where the corpus no longer has one of them, and else as go_on does.
        """
        saved = _typed(cursor)
        folder = CorpusFolder(cfg.corpus, reading(cfg, seq_len))
        names = _names(saved.eras)
        if gone := sorted(names - folder.manifest.sources.keys()):
            raise DatasetError(
                f"the run read {', '.join(gone)}, which {folder.location} no longer has; it has "
                f"{sorted(folder.manifest.sources)}: prepare them again, or name a copy of the corpus that has them"
            )
        dataset = cls({name: folder.split(name, "train") for name in names}, saved.eras, cfg.seed, cfg.skip, batch)
        dataset._check(saved)
        return dataset

    def go_on(self, cursor: dict[str, Any]) -> int:
        """Take over the past of the run that the cursor was saved with. Returns the number of the next sample.

        Where the mixture has changed since (launcher/ has seen to it that this was on purpose), a new era begins at
        that sample, and every source goes on behind what it gave before. Raises DatasetError, naming what differs,
        when the cursor belongs to other data.
        """
        saved = _typed(cursor)
        self._check(saved)
        eras = list(saved.eras)
        now = self.eras[-1].model_copy(update={"start": eras[-1].start})
        if now != eras[-1]:
            eras.append(now.model_copy(update={"start": saved.samples}))
        self.eras, self._fingerprints = tuple(eras), saved.sources | self._fingerprints
        self.mixture = Mixture(sorted({*self.names, *_names(eras)}), self.eras, self.seed)
        return saved.samples

    def _check(self, saved: Cursor) -> None:
        """Raise DatasetError, naming what differs, when the cursor belongs to other data."""
        differs = [f"seed was {saved.seed}, is {self.seed}"] if saved.seed != self.seed else []
        for name, fingerprint in saved.sources.items():
            if name in self.corpora:
                before, now = _parts(fingerprint), _parts(self._fingerprints[name])
                differs += [
                    f"{key} of {name} was {before.get(key)}, is {now.get(key)}"
                    for key in sorted(before.keys() | now.keys())
                    if before.get(key) != now.get(key)
                ]
        if differs:
            folder = next(iter(self.corpora.values())).location
            raise DatasetError(
                f"the checkpoint was trained on other data than {folder}: {'; '.join(differs)}. Go on with the corpus, "
                "seq_len and seed that the run began with (new text under a new source name), or begin a new run"
            )

    def cursor(self, samples: int) -> dict[str, Any]:
        """What to save when `samples` is the number of the next sample to read."""
        saved = Cursor(samples=samples, seed=self.seed, sources=self._fingerprints, eras=self.eras)
        return saved.model_dump(mode="json")

    # -- samples -------------------------------------------------------------------------------------------------------

    def take(self, first: int, count: int) -> tuple[IntArray, int]:
        """The next `count` samples from `first` on that are not left out, (count,), and the number to go on from."""
        taken: list[IntArray] = []
        need, start = count, first
        while need:
            for low, high in self._skipped_samples:  # ascending: a stretch is passed at once, however long
                if low <= start <= high:
                    start = high + 1
            samples = np.arange(start, start + need, dtype=np.int64)
            kept = samples[~self._left_out(samples)]
            taken.append(kept)
            need -= len(kept)
            start += len(samples)
        return np.concatenate(taken), start

    def _left_out(self, samples: IntArray) -> NDArray[np.bool_]:
        out = np.zeros(len(samples), dtype=np.bool_)
        for first, last in self._skipped_samples:
            out |= (samples >= first) & (samples <= last)
        if self._skipped_windows:
            place = self.locate(samples)
            for name, windows in self._skipped_windows.items():
                out |= (place.sources == self.mixture.names.index(name)) & np.isin(place.windows, windows)
        return out

    def locate(self, samples: IntArray) -> Place:
        """Source, epoch and window of samples (n,). Raises MixtureError beyond what max_epochs admits."""
        sources, indices = self.mixture.locate(samples)
        epochs, windows = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(sources).tolist():
            here = sources == number
            name = self.mixture.names[number]
            if name not in self.orders:
                raise DatasetError(f"the run read {name} before; put it back into data.sources to look at its samples")
            epochs[here], windows[here] = self.orders[name](indices[here])
        return Place(sources, indices, epochs, windows)

    def read(self, samples: IntArray) -> Rows:
        """The windows of samples (n,), in their order."""
        place = self.locate(samples)
        numbers = np.unique(place.sources).tolist()
        if len(numbers) == 1:
            return self._read(self.mixture.names[numbers[0]], place.indices, place.windows)
        n, length = len(samples), self.seq_len
        tokens = np.empty((n, length + 1), dtype=np.int64)
        documents = np.empty((n, length), dtype=np.int32) if self._masked else None
        counted = None if self.fixed_targets else np.empty((n, length), dtype=np.bool_)
        for number in numbers:
            here = np.flatnonzero(place.sources == number)
            rows = self._read(self.mixture.names[number], place.indices[here], place.windows[here])
            tokens[here] = rows.tokens
            if documents is not None and rows.documents is not None:
                documents[here] = rows.documents
            if counted is not None and rows.counted is not None:
                counted[here] = rows.counted
        return Rows(tokens, documents, counted)

    def _read(self, name: str, indices: IntArray, windows: IntArray) -> Rows:
        return self.corpora[name].read_in_order(self.orders[name], indices, windows)

    @property
    def remote(self) -> bool:
        """Whether a source lies at a URL."""
        return any(corpus.remote for corpus in self.corpora.values())

    def prefetch(self, samples: IntArray) -> None:
        """Of sources at URLs: begin to fetch the shards that come after these samples, which are all of a step."""
        if not self.remote:
            return
        place, wishes = self.locate(samples), dict[Store, list[ShardEntry]]()
        for number in np.unique(place.sources).tolist():
            name = self.mixture.names[number]
            corpus, order = self.corpora[name], self.orders[name]
            if not corpus.remote:
                continue
            epoch, last = order.group(int(place.indices[place.sources == number].max()))
            following = order.shards(epoch, last + 1)
            wishes.setdefault(corpus.store, []).extend(corpus.shards[shard] for shard in following)
        if wishes != self._wishes:  # the same from step to step, until a group ends
            self._wishes = wishes
            for store, entries in wishes.items():
                store.prefetch(entries)

    def stats(self) -> dict[str, float]:
        """What was fetched over the network so far, by this process; empty when nothing lies at a URL."""
        stores = {corpus.store for corpus in self.corpora.values() if corpus.remote}
        totals: dict[str, float] = {}
        for store in stores:
            for name, value in store.stats().items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def close(self) -> None:
        """End what fetches in the background."""
        for store in {corpus.store for corpus in self.corpora.values()}:
            store.close()

    def pieces(self, sample: int) -> tuple[str, int, list[Piece]]:
        """(source, epoch of it, the pieces of documents that the sample reads)."""
        place = self.locate(np.array([sample], dtype=np.int64))
        name = self.mixture.names[int(place.sources[0])]
        return name, int(place.epochs[0]), self.corpora[name].pieces(int(place.windows[0]))

    def describe(self, samples: ArrayLike) -> str:
        """Where the tokens of samples come from, a line each: source, epoch, window, documents. For error reports."""
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        place = self.locate(numbers)
        lines = []
        for row, sample in enumerate(numbers.tolist()):
            name, window = self.mixture.names[int(place.sources[row])], int(place.windows[row])
            places: dict[str, list[int]] = {}
            for piece in self.corpora[name].pieces(window):
                places.setdefault(piece.shard, []).append(piece.document)
            where = ", ".join(f"{shard} {_ranges(documents)}" for shard, documents in places.items())
            lines.append(
                f"sample {sample}: {name}, epoch {int(place.epochs[row])}, window {window}, documents of {where}"
            )
        return "\n".join(lines)

    def end_of(self, first: int, count: int) -> int:
        """One past the last of the next `count` samples from `first` on that are not left out, without looking at each.

        What take would say, where stretches are left out; where documents are, the most that it can be.
        """
        if count < 1:
            return first
        end = first + count
        while (farther := self._behind_stretches(first, count + self._most_documents(first, end))) != end:
            end = farther
        return end

    def _behind_stretches(self, first: int, count: int) -> int:
        end = first + count
        for low, high in self._skipped_samples:
            if low < end and high >= first:
                end += high - max(low, first) + 1
        return end

    def _most_documents(self, first: int, end: int) -> int:
        """At most so many of the samples first to end - 1 have a token of left-out documents."""
        before, after, total = self.mixture.counts(first), self.mixture.counts(end), 0
        for name, windows in self._skipped_windows.items():
            n, out = self.orders[name].n_windows, len(windows)
            (epoch, rest), (last_epoch, last_rest) = divmod(before[name], n), divmod(after[name], n)
            most = (last_epoch - epoch) * out + min(out, last_rest) - max(0, rest - (n - out))
            total += min(most, after[name] - before[name])
        return total

    # -- what a run will read ------------------------------------------------------------------------------------------

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been read when the run has passed `samples` samples."""
        counts = self.mixture.counts(samples)
        return {name: counts[name] / self.orders[name].n_windows for name in self.names}

    def change(self, first: int, stages: Sequence[StageConfig]) -> tuple[list[str], list[str]]:
        """(news, warnings) of a mixture that the config changes where the run goes on; none where it does not.

        first: what go_on returned.    stages: of the config.
        """
        if len(self.eras) < 2 or self.eras[-1].start != first:
            return [], []
        (past, now), names = self.eras[-2:], self.mixture.names
        differs = self.mixture.differs_from(Mixture(names, self.eras[:-1], self.seed), first)
        if differs == first:
            shares = ", ".join(f"{name} {share:.2%}" for name, share in self.mixture.shares(first).items() if share)
            return [f"the mixture of sources changes at sample {first}: {shares}"], []
        effect = f"the change takes effect {'at no sample' if differs is None else f'from sample {differs} on'}"
        stage = sum(stage.start <= first for stage in now.stages) - 1
        if stage and past.stages[0] != now.stages[0]:
            return [], [
                f"data.sources has other weights than before, but at sample {first} the stage from_tokens="
                f"{stages[stage - 1].from_tokens} of data.stages governs, with weights of its own: edit these and allow "
                f"data.stages to change the mixture here. As it is, {effect}"
            ]
        return [f"the mixture of sources at sample {first} is what it was; {effect}"], []

    def check_length(self, samples: int) -> list[str]:
        """Look ahead to the run's end at `samples` samples, left-out ones counted: what end_of says.

        Returns what its user should know, a line each: sources that end at max_epochs, and those read more often than
        MANY_EPOCHS times without one. Raises DatasetError when max_epochs ends all sources before.
        """
        end = self.mixture.end
        if end is not None and end < samples:
            raise DatasetError(
                f"the run needs up to {samples} samples, left-out ones counted, but max_epochs in data.sources admits "
                f"{end}; raise max_epochs, add text, or set train.steps lower"
            )
        lines = [
            f"{name} has been read max_epochs times at sample {sample} of {samples}; the other sources share its place"
            for sample, name in self.mixture.exhausted
            if sample < samples
        ]
        return lines + [
            f"{name} is read {epochs:.1f} times; more than {MANY_EPOCHS} help little: consider a lower weight, or "
            "max_epochs to cap it"
            for name, epochs in self.epochs(samples).items()
            if epochs > MANY_EPOCHS and name not in self.eras[-1].most
        ]


def open_valid(cfg: DataConfig, seq_len: int) -> tuple[dict[str, Corpus], list[str]]:
    """The held-out split of each source of the config that has one with a window in it, and a line for each without."""
    folder = CorpusFolder(cfg.corpus, reading(cfg, seq_len))
    have = folder.manifest.splits("valid")
    splits = {source.label: folder.split(source.label, "valid") for source in cfg.sources if source.label in have}
    lines = [
        f"{name} is not evaluated: its {len(corpus.shards)} held-out shards of {corpus.n_tokens} tokens have no window of "
        f"model.seq_len={seq_len}; prepare it with a larger data.valid_fraction or data.shard_bytes"
        for name, corpus in splits.items()
        if not corpus.n_windows
    ]
    return {name: corpus for name, corpus in splits.items() if corpus.n_windows}, lines


def reading(cfg: DataConfig, seq_len: int) -> Reading:
    """How the config has its corpus read."""
    return Reading(seq_len, cfg.packing, cfg.document_mask, cfg.shuffle_shards, cfg.cache)


def _era(cfg: DataConfig, corpora: dict[str, Corpus], seq_len: int) -> Era:
    """What the config says of the mixture."""
    given = {source.label: source.weight for source in cfg.sources if source.weight is not None}
    weights = given or {name: float(corpus.n_tokens) for name, corpus in corpora.items()}
    stages = [EraStage(start=0, weights=temper(weights, cfg.temperature))] + [
        EraStage(start=-(-stage.from_tokens // seq_len), weights=temper(stage.weights, cfg.temperature))
        for stage in cfg.stages
    ]
    most = {
        source.label: max(1, math.floor(source.max_epochs * corpora[source.label].n_windows))
        for source in cfg.sources
        if source.max_epochs is not None
    }
    return Era(start=0, stages=tuple(stages), most=most)


def _typed(cursor: dict[str, Any]) -> Cursor:
    try:
        return Cursor.model_validate_json(json.dumps(cursor))
    except ValidationError as error:
        raise DatasetError(
            f"the data cursor of the checkpoint is damaged or of another version ({error.errors()[0]['msg']} at "
            f"{error.errors()[0]['loc']}): use an earlier checkpoint, or the Longhaul version that wrote it"
        ) from None


def shares_at(cursor: dict[str, Any], sample: int) -> dict[str, float]:
    """The share of each source in the mixture at a sample before the cursor, from the cursor alone."""
    saved = _typed(cursor)
    return Mixture(sorted(_names(saved.eras)), saved.eras, saved.seed).shares(sample)


def _names(eras: Sequence[Era]) -> set[str]:
    """All sources that were ever in the mixture."""
    return {name for era in eras for stage in era.stages for name in stage.weights}


def _stretches(skip: Sequence[SkipConfig], batch: int) -> list[tuple[SkipConfig, Stretch]]:
    """The entries that name steps or samples, each with the samples that it leaves out.

    An entry's steps are as the log counted them when only the entries before it were there. Raises DatasetError where
    that is not known because documents are left out too.
    """
    found: list[tuple[SkipConfig, Stretch]] = []
    for entry in skip:
        if entry.samples is not None:
            found.append((entry, entry.samples))
        if entry.steps is not None:
            if any(other.documents for other in skip):
                raise DatasetError(
                    f"data.skip names steps {list(entry.steps)} and also documents, after which steps cannot be told "
                    "apart; name samples instead: launcher/audit.py RUN --step K says which"
                )
            first, last = (entry.steps[0] - 1) * batch, entry.steps[1] * batch - 1
            for start, end in _merged(span for _, span in found):  # samples left out earlier have pushed these on
                first, last = (n + end - start + 1 if n >= start else n for n in (first, last))
            found.append((entry, (first, last)))
    return found


def _merged(spans: Iterable[Stretch]) -> list[Stretch]:
    """Spans as ascending ones that do not overlap."""
    merged: list[Stretch] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _parts(fingerprint: str) -> dict[str, str]:
    """A corpus fingerprint's "key=value key=value" as a mapping."""
    return dict(part.partition("=")[::2] for part in fingerprint.split())


def _ranges(numbers: list[int]) -> str:
    """An ascending list as "3" or "3-7" stretches: [3, 4, 5, 9] -> "3-5, 9"."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and stretches[-1][1] == number - 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in stretches)
