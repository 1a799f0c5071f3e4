"""What is left out of a corpus for quality: exact duplicates, near duplicates, and documents that common filters reject.

Duplicates are found in two passes over the text. In the first, workers write of each unit what a decision needs:

  NNNNN.marks.npy    per document: verdict of the filters, split, xxh3-128 of the text
  NNNNN.sketch.npy   (bands, documents, rows) uint32: the documents' MinHash signatures, band by band

Then one process decides for all sources at once and writes NNNNN.verdict.npy, one byte a document, which the second pass
follows. Every file is a pure function of text and options; who wrote it, and in which order, does not matter.

Near duplicates (MinHash with locality-sensitive hashing, Broder 1997): documents that agree in a whole band of the
signature are candidates; those whose signatures agree in `threshold` of their slots are taken for near duplicates, and
the later one is left out. Held-out documents come before all others, so that none of their near duplicates is trained on.
Where b is near a and c is near b, both b and c go, whether or not c is near a.

Memory of the deciding process: at most 64 bytes a document (51 measured on a million), and 64 MiB: hashes while exact
duplicates are looked for; then a band's keys and their sorted order. The signatures stay on disk, 4 * num_perm bytes a
document, and are read once, band by band, and where candidates are compared.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data.errors import DataError

INSTALL = "pip install 'longhaul[clean]'"

FilterName = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]

_LAGS = (1, 2, 3)  # a document is compared with the first of its bucket and with so many before it
_CHECK_ROWS = 2**14  # signatures held at a time
_RECALL = 0.99  # a pair at the threshold shares a band with at least this chance
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_SENTENCE = re.compile(r"[^.!?\u3002\uff01\uff1f\n]+(?:[.!?\u3002\uff01\uff1f]+[\"'\u2019\u201d)]*)?")
_FILLING = np.uint64(2**64 - 1)
_KEPT, _DUPLICATE, _NEAR_DUPLICATE, _FILTERED = 0, 1, 2, 3  # verdicts; _FILTERED + i: by the i-th filter


class CleanError(DataError):
    """Cleaning that needs a library which is not installed, or files of the first pass that do not fit the text."""


class NearConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Near-duplicate removal: documents whose sets of shingles have an estimated Jaccard similarity of threshold."""

    # 0.8 in most published corpora; at exactly the threshold half the pairs are found, 0.05 above it nearly all
    threshold: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.8
    num_perm: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = 128  # slots of a signature, 4 bytes each
    # what a shingle is made of; characters (spaces left out) for Chinese and others written without spaces
    shingle: Literal["words", "characters"] = "words"
    shingle_size: Annotated[int, Field(ge=1, le=50)] = 5  # words or characters; case does not count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def rows(self) -> int:
        """Slots a band: the longest that still finds a pair at the threshold with a chance of 99 %."""
        candidates = [rows for rows in range(1, self.num_perm + 1) if self.num_perm % rows == 0]
        return max(r for r in candidates if r == 1 or 1 - (1 - self.threshold**r) ** (self.num_perm // r) >= _RECALL)


class CleanConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What launcher/prepare.py leaves out; nothing by default. Of equal documents the first is kept, in the order of
    data.sources, and in each source in its own."""

    exact: bool = False  # documents with the very same text, across all sources
    near: NearConfig | None = None  # nearly the same text, across all sources; text is read twice for these two
    # datatrove's rules, each with its published thresholds, for English and languages like it (Gopher:
    # arXiv:2112.11446; C4: arXiv:1910.10683; FineWeb: arXiv:2406.17557). A document is kept whole or left out: C4's
    # rules for lines count towards its verdict and cut nothing. The first filter to reject gives the reason
    filters: list[FilterName] = []

    @property
    def two_passes(self) -> bool:
        """Whether documents must be compared with each other before the first can be kept."""
        return self.exact or self.near is not None

    def check_installed(self) -> None:
        """Raise CleanError, before any work, when a library that this asks for is missing."""
        if self.near is not None:
            _rensa()
        if self.filters:
            _judges(tuple(self.filters))

    def reason(self, verdict: int) -> str:
        """The word under which documents of a verdict are counted."""
        if verdict < _FILTERED:
            return ("", "duplicate", "near_duplicate")[verdict]
        return f"filter:{self.filters[verdict - _FILTERED]}"


class Mark(NamedTuple):
    """What the first pass keeps of a document besides its signature."""

    verdict: int
    held: bool
    high: int  # of the text's xxh3-128
    low: int


_MARK = np.dtype([("verdict", "u1"), ("held", "?"), ("high", "<u8"), ("low", "<u8")])


# -- filters -----------------------------------------------------------------------------------------------------------


def filter_verdict(text: str, cfg: CleanConfig) -> int:
    """0, or the verdict of the first filter that rejects text."""
    for number, judge in enumerate(_judges(tuple(cfg.filters)) if cfg.filters else ()):
        if not judge(text):
            return _FILTERED + number
    return _KEPT


@lru_cache(maxsize=4)
def _judges(names: tuple[FilterName, ...]) -> tuple[Callable[[str], bool], ...]:
    """For each filter a function that says whether to keep a text.

    Words and sentences are split by two regular expressions here, not by spaCy or nltk as datatrove does unless told
    otherwise: those need packages and downloads of their own, and differ from these in rare words alone.
    """
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters
        from datatrove.utils.word_tokenizers import WordTokenizer
    except ImportError as error:
        raise CleanError(f"data.clean.filters={list(names)} needs datatrove ({error}); run: {INSTALL}") from None

    class Splitter(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end] for start, end in self.span_tokenize(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [found.span() for found in _SENTENCE.finditer(text) if found[0].strip()]

    classes = {
        "gopher_quality": filters.GopherQualityFilter,
        "gopher_repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }

    def judge(rule: Any, text: str) -> bool:
        answer = rule.filter(Document(text=text, id=""))
        return bool(answer[0] if isinstance(answer, tuple) else answer)

    splitter = Splitter()
    rules = [classes[name](language=splitter) for name in names]
    return tuple((lambda text, rule=rule: judge(rule, text)) for rule in rules)


# -- the first pass ----------------------------------------------------------------------------------------------------


def mark(text: str, payload: bytes, held: bool, cfg: CleanConfig) -> Mark:
    """The mark of a document; payload: its text in UTF-8.    held: whether it is held out."""
    digest = xxhash.xxh3_128_intdigest(payload)
    return Mark(filter_verdict(text, cfg), held, digest >> 64, digest & (2**64 - 1))


def sketch(texts: Sequence[str], near: NearConfig) -> NDArray[np.uint32]:
    """MinHash signatures of texts, (n, num_perm). They depend on text and near alone."""
    if not texts:
        return np.empty((0, near.num_perm), dtype=np.uint32)
    hashes, offsets = _shingles([_units(text, near) for text in texts], near.shingle_size)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, near.num_perm, near.seed)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _units(text: str, near: NearConfig) -> NDArray[np.uint64]:
    """What shingles are made of, as many as one shingle at least: a shorter text is filled up and is one shingle."""
    lower = text.lower()
    if near.shingle == "characters":
        units = np.frombuffer("".join(lower.split()).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    else:
        words = _WORD.findall(lower)
        units = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, count=len(words))
    if not len(units):  # nothing but spaces
        units = np.array([xxhash.xxh3_64_intdigest(text.encode())], dtype=np.uint64)
    filling = np.full(max(near.shingle_size - len(units), 0), _FILLING)
    return np.concatenate([units, filling]) if len(filling) else units


def _shingles(rows: Sequence[NDArray[np.uint64]], size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A hash for each shingle of each text, one text after the other, and where each text's begin and the last's end."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    units = np.concatenate([*rows, np.zeros(size - 1, dtype=np.uint64)])
    hashes = np.zeros(lengths.sum(), dtype=np.uint64)
    for place in range(size):
        hashes = _mix(hashes + units[place : place + len(hashes)])
    starts = np.cumsum(lengths) - lengths
    place_in_text = np.arange(len(hashes)) - np.repeat(starts, lengths)
    whole = place_in_text <= np.repeat(lengths - size, lengths)  # the others reach into the next text
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths - size + 1)])
    return hashes[whole], offsets.astype(np.uint64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al., 2014): a bijection that spreads every bit; sums wrap around."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise CleanError(f"data.clean.near needs rensa ({error}); run: {INSTALL}") from None
    return rensa


class Marker:
    """Collects the marks and signatures of a unit's documents and writes them; holds 18 + 4 * num_perm bytes each."""

    def __init__(self, prefix: Path, cfg: CleanConfig) -> None:
        """prefix: NNNNN of the files' names."""
        self._prefix, self._cfg = prefix, cfg
        self._marks: list[Mark] = []
        self._sketches: list[NDArray[np.uint32]] = []

    def add(self, texts: Sequence[str], marks: Iterable[Mark]) -> None:
        """The next documents. How they are cut into calls changes nothing."""
        self._marks += marks
        if self._cfg.near is not None:
            self._sketches.append(sketch(texts, self._cfg.near))

    def close(self) -> None:
        """Write both files; the marks last, which say that the unit is done."""
        if (near := self._cfg.near) is not None:
            rows = np.concatenate([np.empty((0, near.num_perm), dtype=np.uint32), *self._sketches])
            save(_path(self._prefix, "sketch"), np.ascontiguousarray(_by_band(rows, near)))
        save(_path(self._prefix, "marks"), np.array(self._marks, dtype=_MARK))


def is_marked(prefix: Path) -> bool:
    """Whether the first pass has done a unit."""
    return _path(prefix, "marks").is_file()


def _by_band(signatures: NDArray[np.uint32], near: NearConfig) -> NDArray[np.uint32]:
    """(n, num_perm) -> (bands, n, rows), so that a band lies in one piece on disk."""
    return signatures.reshape(len(signatures), near.num_perm // near.rows, near.rows).swapaxes(0, 1)


# -- the decision ------------------------------------------------------------------------------------------------------


def decide(prefixes: Sequence[Path], cfg: CleanConfig) -> None:
    """Write the verdicts of all units from their marks and signatures.

    prefixes: of all units of all sources, in their order: it decides which of two documents is the first.
    """
    marks = [np.empty(0, dtype=_MARK), *(np.array(_load(_path(prefix, "marks"))) for prefix in prefixes)]
    ends = np.cumsum([len(unit) for unit in marks])
    verdicts = np.concatenate([unit["verdict"] for unit in marks])
    held = np.concatenate([unit["held"] for unit in marks])
    if cfg.exact:
        _mark_equal(verdicts, *(np.concatenate([unit[half] for unit in marks]) for half in ("high", "low")))
    del marks
    if cfg.near is not None:
        _mark_near(verdicts, held, _Signatures([_path(prefix, "sketch") for prefix in prefixes], ends), cfg.near)
    for prefix, start, end in zip(prefixes, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        save(_path(prefix, "verdict"), verdicts[start:end])


def verdicts(prefix: Path) -> NDArray[np.uint8]:
    """The verdicts on a unit's documents, (n,), in order."""
    found: NDArray[np.uint8] = np.array(_load(_path(prefix, "verdict")))
    return found


def forget(prefix: Path) -> None:
    """Remove a unit's marks and signatures, which no one needs after the decision."""
    for kind in ("marks", "sketch"):
        _path(prefix, kind).unlink(missing_ok=True)


def _mark_equal(verdicts: NDArray[np.uint8], high: NDArray[np.uint64], low: NDArray[np.uint64]) -> None:
    """All but the first of equal texts that the filters let through."""
    kept = np.flatnonzero(verdicts == _KEPT)
    order = kept[np.lexsort((low[kept], high[kept]))]  # stable: equal ones stay in the order of the documents
    again = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    verdicts[order[1:][again]] = _DUPLICATE


class _Signatures:
    """The signature files of all units as one table; documents are numbered over all of them."""

    def __init__(self, paths: Sequence[Path], ends: NDArray[np.int64]) -> None:
        self._paths, self._ends = paths, ends

    def band_keys(self, band: int) -> NDArray[np.uint64]:
        """A hash of each document's band, (n,)."""
        keys = np.zeros(int(self._ends[-1]), dtype=np.uint64)
        for path, start, end in zip(self._paths, self._ends[:-1], self._ends[1:], strict=True):
            rows = np.array(_load(path)[band]) if end > start else np.empty((0, 0), np.uint32)
            for slot in rows.T.astype(np.uint64):
                keys[start:end] = _mix(keys[start:end] + slot)
        return keys

    def agreement(self, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """The share of slots in which the two documents of each pair (m, 2) agree: (m,)."""
        wanted, place = np.unique(pairs, return_inverse=True)
        found = np.concatenate([self._read(wanted[chunk]) for chunk in _runs(wanted, self._ends)])
        left, right = found[place.reshape(pairs.shape)[:, 0]], found[place.reshape(pairs.shape)[:, 1]]
        share: NDArray[np.float64] = (left == right).mean(axis=1)
        return share

    def _read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Signatures of documents of one unit, (n, num_perm)."""
        unit = int(np.searchsorted(self._ends, numbers[0], side="right")) - 1
        bands = _load(self._paths[unit])[:, numbers - self._ends[unit], :]
        return np.ascontiguousarray(bands.swapaxes(0, 1)).reshape(len(numbers), -1)


def _runs(numbers: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[slice]:
    """Ascending numbers cut where a unit ends."""
    cuts = np.searchsorted(numbers, ends)
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        if end > start:
            yield slice(start, end)


def _mark_near(verdicts: NDArray[np.uint8], held: NDArray[np.bool_], signatures: _Signatures, near: NearConfig) -> None:
    alive = np.flatnonzero(verdicts == _KEPT)
    for band in range(near.num_perm // near.rows):
        keys = signatures.band_keys(band)[alive]
        order = np.lexsort((~held[alive], keys))  # in a bucket the held-out ones first, else as the documents come
        changes = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
        first = np.zeros(len(order), dtype=np.int64)  # where each one's bucket begins
        first[changes] = changes
        first = np.maximum.accumulate(first)
        members = np.flatnonzero(first != np.arange(len(order)))
        for begin in range(0, len(members), _CHECK_ROWS // (2 + len(_LAGS))):
            chunk = members[begin : begin + _CHECK_ROWS // (2 + len(_LAGS))]
            _mark_bucketed(verdicts, alive[order], first, chunk, signatures, near.threshold)


def _mark_bucketed(
    verdicts: NDArray[np.uint8],
    documents: NDArray[np.int64],
    first: NDArray[np.int64],
    chunk: NDArray[np.int64],
    signatures: _Signatures,
    threshold: float,
) -> None:
    """Compare the documents at the places of chunk with some before them in their buckets."""
    chunk = chunk[verdicts[documents[chunk]] == _KEPT]
    others = np.stack([first[chunk], *(np.maximum(chunk - lag, first[chunk]) for lag in _LAGS)])  # (1 + lags, m)
    pairs = np.unique(np.stack([documents[others], np.broadcast_to(documents[chunk], others.shape)], -1).reshape(-1, 2),
                      axis=0)  # fmt: skip
    if len(pairs):
        close = signatures.agreement(pairs) >= threshold
        verdicts[pairs[close, 1]] = _NEAR_DUPLICATE


# -- files -------------------------------------------------------------------------------------------------------------


def _path(prefix: Path, kind: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{kind}.npy")


def _load(path: Path) -> NDArray[Any]:
    """An array that save wrote, mapped. Only numbers are read: an array of objects would be a pickle."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise CleanError(
            f"{path} is damaged ({error}); delete {path.parents[1]}, which launcher/prepare.py makes again"
        ) from None


def save(path: Path, array: NDArray[Any]) -> None:
    """Whole or absent: under a staging name, on disk, then renamed."""
    staging = path.with_name(path.name + ".tmp")
    with open(staging, "wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)
