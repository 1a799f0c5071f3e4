"""Which source a sample comes from, in closed form: exact shares over any long stretch, and no table that grows.

The samples of a segment are cut into blocks of L. With W the cumulated share of the sources up to one, the first k
blocks hold round(k * L * W) samples of these sources, in whole numbers: so every source's count is right to one sample
after every block, however many, and nothing drifts. Inside a block a keyed permutation (data/order.py) spreads them.
Sample g is then the n-th of its source, with n counted over the whole run.

A segment begins where the weights change: at a stage of the config, where a source has been read max_epochs times, or
at a checkpoint from which the run went on with other weights (an era). What each source gave before is its base.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, PositiveInt

from data.errors import DataError
from data.order import permute, stream_key

UNIT = 2**40  # shares are whole numbers of this; weights a million times apart keep six digits
_LEAST_BLOCK = 2**10
_MOST_BLOCK = 2**20  # so the smallest share is one in a million
_TABLES = 64  # blocks whose permutations are kept: 8 bytes a sample

IntArray = NDArray[np.int64]


class MixtureError(DataError):
    """Weights that cannot be mixed, or sources that do not last as long as the run."""


class EraStage(BaseModel, frozen=True, extra="forbid"):
    """Weights from a sample of the run on."""

    start: NonNegativeInt
    weights: dict[str, float]


class Era(BaseModel, frozen=True, extra="forbid"):
    """What a config said of the mixture, from sample `start` of the run until the next era. Kept in the data cursor."""

    start: NonNegativeInt
    stages: tuple[EraStage, ...]  # ascending; the first starts at 0
    most: dict[str, PositiveInt]  # samples of a source that may be read in all, of those that are capped


class Segment(NamedTuple):
    """Samples start to end of the run, mixed alike."""

    start: int
    end: int | None  # one past the last; None: for ever
    shares: tuple[int, ...]  # of the sources, in the mixture's order, in UNIT
    base: tuple[int, ...]  # samples that each source gave before
    block: int  # L


@dataclass(frozen=True)
class _Table:
    """One block: for each of its samples, its source and how many samples of that source the segment gave before."""

    sources: IntArray  # (L,)
    ranks: IntArray  # (L,)


class Mixture:
    """The eras of a run as one function from samples to sources.

    names: all sources of all eras, in a fixed order.    seed: of the order in which sources take turns.
    Raises MixtureError for a share below one in a million.
    """

    def __init__(self, names: Sequence[str], eras: Sequence[Era], seed: int) -> None:
        self.names, self.seed = tuple(names), seed
        self.segments: list[Segment] = []
        self.exhausted: list[tuple[int, str]] = []  # (sample from which it gives nothing more, source), by max_epochs
        self.end: int | None = None  # the sample at which all sources have been read as often as they may; None: never
        self._tables: OrderedDict[tuple[int, int], _Table] = OrderedDict()
        for era, following in zip(eras, [*eras[1:], None], strict=True):
            self._add_era(era, following.start if following else None)

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """(source, index) of samples (n,): the number of the source in names, and which of its samples it is; (n,) each.

        Raises MixtureError for a sample at or after `end`.
        """
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        for number, segment in enumerate(self.segments):
            here = (samples >= segment.start) & (samples < (math.inf if segment.end is None else segment.end))
            if here.any():
                sources[here], indices[here] = self._in_segment(number, samples[here] - segment.start)
        if self.end is not None and samples.size and int(samples.max()) >= self.end:
            raise MixtureError(
                f"sample {int(samples.max())} is asked for, but every source has been read max_epochs times after "
                f"{self.end} samples; raise max_epochs in data.sources, add text, or end the run earlier"
            )
        return sources, indices

    def counts(self, sample: int) -> dict[str, int]:
        """How many of the first `sample` samples of the run each source gave."""
        segment = max((s for s in self.segments if s.start <= sample), key=lambda s: s.start)
        given = self._given(self.segments.index(segment), sample - segment.start)
        return dict(zip(self.names, given, strict=True))

    def shares(self, sample: int) -> dict[str, float]:
        """The share of each source at a sample of the run."""
        segment = max((s for s in self.segments if s.start <= sample), key=lambda s: s.start)
        return {name: share / UNIT for name, share in zip(self.names, segment.shares, strict=True)}

    def differs_from(self, other: "Mixture", sample: int) -> int | None:
        """The first sample from `sample` on whose shares another mixture of the same names has otherwise; None: none."""
        edges = [edge for m in (self, other) for edge in (*(s.start for s in m.segments), m.end) if edge is not None]
        for edge in sorted({sample, *(edge for edge in edges if edge > sample)}):
            here, there = (None if m.end is not None and edge >= m.end else m.shares(edge) for m in (self, other))
            if here != there:
                return edge
        return None

    # -- segments ------------------------------------------------------------------------------------------------------

    def _add_era(self, era: Era, end: int | None) -> None:
        bounds = [max(stage.start, era.start) for stage in era.stages] + [end]
        for stage, start, stop in zip(era.stages, bounds, bounds[1:], strict=False):
            assert start is not None
            if stop is not None and stop <= start:
                continue  # over before this era began, or beginning after it ended
            if self.end is not None or (end is not None and start >= end):
                break
            self._add_stage(stage, start, stop if end is None or stop is None else min(stop, end), era.most)

    def _add_stage(self, stage: EraStage, start: int, end: int | None, most: Mapping[str, int]) -> None:
        """The stage as segments: a source that has given `most` leaves, and the others share its place."""
        while end is None or start < end:
            base = self._base(start)
            left = {
                name: weight
                for name, weight in stage.weights.items()
                if name not in most or base[self.names.index(name)] < most[name]
            }
            if not left:
                self.end = start
                return
            shares = _whole_shares([left.get(name, 0.0) for name in self.names])
            self.segments.append(Segment(start, end, shares, base, _block(shares, self.names)))
            if (leaves := self._first_to_leave(left, most, end)) is None:
                return
            start = leaves[0]
            self.exhausted.append(leaves)
            self.segments[-1] = self.segments[-1]._replace(end=start)

    def _base(self, start: int) -> tuple[int, ...]:
        if not self.segments:
            return (0,) * len(self.names)
        return tuple(self._given(len(self.segments) - 1, start - self.segments[-1].start))

    def _first_to_leave(
        self, left: Mapping[str, float], most: Mapping[str, int], end: int | None
    ) -> tuple[int, str] | None:
        """(first sample after a source's last, the source), of the one that first has given all it may in the segment."""
        number = len(self.segments) - 1
        start = self.segments[number].start
        found: list[tuple[int, str]] = []
        for name in sorted(left.keys() & most.keys()):
            source = self.names.index(name)
            last = math.ceil((most[name] + 2) * UNIT / self.segments[number].shares[source])
            low, high = 0, last + 2 * self.segments[number].block  # given(low) < most <= given(high)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._given(number, middle)[source] < most[name] else (low, middle)
            if end is None or start + high < end:
                found.append((start + high, name))
        return min(found, default=None)

    # -- inside a segment ----------------------------------------------------------------------------------------------

    def _bounds(self, segment: Segment, blocks: int) -> list[int]:
        """Samples of the first `blocks` blocks that come from the sources up to each; exact, in Python's integers."""
        cumulated, bounds = 0, []
        for share in segment.shares:
            cumulated += share
            bounds.append((blocks * segment.block * cumulated + UNIT // 2) // UNIT)
        return bounds

    def _given(self, number: int, within: int) -> list[int]:
        """How many samples each source gave before the run's sample segment.start + within."""
        segment = self.segments[number]
        block, rest = divmod(within, segment.block)
        counts = _differences(self._bounds(segment, block))
        if rest:
            part = np.bincount(self._table(number, block).sources[:rest], minlength=len(self.names))
            counts = [count + int(more) for count, more in zip(counts, part, strict=True)]
        return [base + count for base, count in zip(segment.base, counts, strict=True)]

    def _in_segment(self, number: int, within: IntArray) -> tuple[IntArray, IntArray]:
        segment = self.segments[number]
        base = np.array(segment.base, dtype=np.int64)
        blocks, places = np.divmod(within, segment.block)
        sources, indices = np.empty_like(within), np.empty_like(within)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            table = self._table(number, block)
            sources[here] = table.sources[places[here]]
            indices[here] = table.ranks[places[here]]
        return sources, indices + base[sources]

    def _table(self, number: int, block: int) -> _Table:
        key = (number, block)
        if key not in self._tables:
            segment = self.segments[number]
            before, after = self._bounds(segment, block), self._bounds(segment, block + 1)
            ends = np.array(after, dtype=np.int64) - np.array(before, dtype=np.int64)  # cumulated over the sources
            order = permute(np.arange(segment.block), segment.block, stream_key(self.seed, segment.start, block))
            sources = np.searchsorted(ends, order, side="right").astype(np.int64)
            ranks = np.empty_like(sources)
            for source, first in enumerate(_differences(before)):
                here = sources == source
                ranks[here] = first + np.arange(np.count_nonzero(here))
            self._tables[key] = _Table(sources, ranks)
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        return self._tables[key]


def temper(weights: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Weights to the power 1 / temperature, as shares that add up to 1 (multilingual sampling, arXiv:1907.05019)."""
    largest = max(weights.values())
    powers = {name: (weight / largest) ** (1 / temperature) for name, weight in weights.items()}
    total = math.fsum(powers.values())  # whatever their order
    return {name: power / total for name, power in powers.items()}


def _whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Shares in UNIT that add up to it exactly."""
    total, cumulated, ends = math.fsum(weights), 0.0, []
    for weight in weights:
        cumulated += weight
        ends.append(round(cumulated / total * UNIT))
    ends[-1] = UNIT
    return tuple(_differences(ends))


def _block(shares: tuple[int, ...], names: Sequence[str]) -> int:
    """Samples a block: so many that every source has at least one in each, a power of 2."""
    least = min(share for share in shares if share)
    block = max(_LEAST_BLOCK, 1 << (-(-UNIT // least) - 1).bit_length())
    if block > _MOST_BLOCK:
        raise MixtureError(
            f"the share of {names[shares.index(least)]} in the mixture is {least / UNIT:.2e}; expected at least "
            f"{1 / _MOST_BLOCK:.2e}: give it a larger weight or leave it out of data.sources"
        )
    return block


def _differences(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
