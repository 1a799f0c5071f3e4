"""Labelled examples: texts with a label, sentences with a tag for each word; their labels, and what is held out of them.

What is malformed ends the run before anything is allocated, with file and line.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import xxhash

from data.records import RecordError, read_records
from data.task import Column, Format, TaskConfig

_FIRST = 20  # labels named in a message


class Example(NamedTuple):
    """A text and its label."""

    where: str
    text: str
    label: str

    @property
    def identity(self) -> str:
        """What makes two examples the same text."""
        return self.text


class Sentence(NamedTuple):
    """Words, and a tag for each."""

    where: str
    words: list[str]
    tags: list[str]

    @property
    def identity(self) -> str:
        return "\n".join(self.words)


class _Held(NamedTuple):
    train: list[Any]
    valid: list[Any]


AnyExample = TypeVar("AnyExample", Example, Sentence)


def read_examples(cfg: TaskConfig, paths: list[str]) -> list[Example]:
    """For kind classify. Raises RecordError for a text or label that is empty or of another type."""
    columns = _columns(cfg)
    return [
        Example(record.where, _filled(record.values[0], "text", record.where), _label(record.values[1], record.where))
        for record in read_records(paths, columns, cfg.format, cfg.formats)
    ]


def read_sentences(cfg: TaskConfig, paths: list[str]) -> list[Sentence]:
    """For kind tag. Raises RecordError where words and tags are not two lists of one length, or one is empty."""
    found = []
    for where, (words, tags) in read_records(paths, _columns(cfg), cfg.format, cfg.formats):
        for name, values in (("words", words), ("tags", tags)):
            if not isinstance(values, list) or not values:
                raise RecordError(f"{where}: its {name} are {_shown(values)}; expected a list with something in it")
        if len(words) != len(tags):
            raise RecordError(f"{where}: {len(words)} words and {len(tags)} tags; expected a tag for each word")
        tags = [_label(tag, where) for tag in tags]
        found.append(Sentence(where, [_filled(word, "word", where) for word in words], tags))
    return found


def _columns(cfg: TaskConfig) -> Callable[[Format], list[Column]]:
    def of(fmt: Format) -> list[Column]:
        defaults: tuple[Column, Column] = ("text", "label")
        if cfg.kind == "tag":
            defaults = (0, -1) if fmt == "conll" else ("tokens", "tags")
        return [defaults[0] if cfg.text is None else cfg.text, defaults[1] if cfg.label is None else cfg.label]

    return of


def _filled(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: its {what} is {_shown(value)}; expected a string")
    if not value.strip():
        raise RecordError(f"{where}: its {what} is empty; take the example out, or fill it in")
    return value


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{where}: its label is {_shown(value)}; expected a string or a whole number")
    return value.strip()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# -- labels --------------------------------------------------------------------------------------------------------------


def collect_labels(labels: Iterable[str]) -> list[str]:
    """The different ones, sorted: numbers by their value, O (outside of any entity) first."""

    def key(label: str) -> tuple[bool, bool, int, str]:
        number = label.lstrip("-").isdecimal()
        return label != "O", not number, int(label) if number else 0, label

    return sorted(set(labels), key=key)


def check_labels(named: Iterable[tuple[str, Sequence[str]]], labels: Sequence[str], given: bool) -> None:
    """Raise RecordError for the first label that is not in the set. named: where, and its labels.

    given: whether the set is task.labels, else it is of the training files.
    """
    known = set(labels)
    for where, found in named:
        for label in found:
            if label not in known:
                source = "task.labels" if given else "the training files"
                shown = ", ".join(map(repr, labels[:_FIRST])) + (", ..." if len(labels) > _FIRST else "")
                raise RecordError(
                    f"{where}: the label {label!r} is not in the label set of {source}: {shown}; correct it, or name all "
                    "labels in task.labels"
                )


def shares(labels: Iterable[str]) -> str:
    """How often each label is there, in words."""
    counts = Counter(labels)
    total = counts.total()
    shown = [f"{label} {count / total:.1%}" for label, count in counts.most_common(_FIRST)]
    return ", ".join(shown) + (", ..." if len(counts) > _FIRST else "")


# -- what is held out ----------------------------------------------------------------------------------------------------


def hold_out(examples: Sequence[Any], identity: Callable[[Any], str], fraction: float, seed: int) -> _Held:
    """About `fraction` of the examples, by a hash of what makes two the same, so that copies stay together."""
    bound, held = int(fraction * 2**64), _Held([], [])
    for example in examples:
        lot = xxhash.xxh3_64_intdigest(f"{seed}/{identity(example)}".encode("utf-8", "surrogatepass"))
        (held.valid if lot < bound else held.train).append(example)
    return held
