"""Labelled examples: texts with a label, sentences with a tag for each word; their labels, and what is held out of them.

What is malformed ends the run before anything is allocated, with file and line.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import xxhash

from data.records import RecordError, read_records
from data.task import ClassifyTask, Column, Format, TagTask

_FIRST = 20  # labels named in a message


class Example(NamedTuple):
    """A text and its label."""

    where: str
    text: str  # "": to be left out
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


def read_examples(cfg: ClassifyTask, paths: list[str]) -> list[Example]:
    """Raises RecordError for a text or label that is empty or of another type, and for a label that is not in the set."""
    found = []
    for where, (text, label) in read_records(paths, lambda fmt: [cfg.text, cfg.label], cfg.format, cfg.formats):
        empty = text is None or (isinstance(text, str) and not text.strip())
        text = "" if empty and cfg.empty == "leave_out" else _filled(text, "text", where)
        found.append(Example(where, text, _label(label, where)))
    check_labels([(example.where, [example.label]) for example in found], cfg.labels)
    return found


def read_sentences(cfg: TagTask, paths: list[str]) -> list[Sentence]:
    """Raises RecordError where words and tags are not two lists of one length, one is empty, or a tag not in the set."""

    def columns(fmt: Format) -> list[Column]:
        words, tags = (0, -1) if fmt == "conll" else ("tokens", "tags")
        return [words if cfg.words is None else cfg.words, tags if cfg.tags is None else cfg.tags]

    found = []
    for where, (words, tags) in read_records(paths, columns, cfg.format, cfg.formats):
        for name, values in (("words", words), ("tags", tags)):
            if not isinstance(values, list) or not values:
                raise RecordError(f"{where}: its {name} are {_shown(values)}; expected a list with something in it")
        if len(words) != len(tags):
            raise RecordError(f"{where}: {len(words)} words and {len(tags)} tags; expected a tag for each word")
        tags = [_label(tag, where) for tag in tags]
        found.append(Sentence(where, [_filled(word, "word", where) for word in words], tags))
    check_labels([(sentence.where, sentence.tags) for sentence in found], cfg.labels)
    return found


def _filled(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: its {what} is {_shown(value)}; expected a string")
    if not value.strip():
        raise RecordError(
            f"{where}: its {what} is empty; fill it in or take the example out, or say task.empty: leave_out"
        )
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


def check_labels(named: Sequence[tuple[str, Sequence[str]]], labels: Sequence[str]) -> None:
    """Raise RecordError for the first label that is not in the set. named: where, and its labels."""
    known = set(labels)
    for where, found in named:
        if unknown := next((label for label in found if label not in known), None):
            there = sorted({label for _, others in named for label in others})
            raise RecordError(
                f"{where}: the label {unknown!r} is not in task.labels, {_list(labels)}; correct it, or the set: the files "
                f"have {_list(there)}"
            )


def _list(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:_FIRST])) + (", ..." if len(labels) > _FIRST else "")


def shares(labels: Iterable[str]) -> str:
    """How often each label is there, in words."""
    counts = Counter(labels)
    total = counts.total()
    shown = [f"{label} {count / total:.1%}" for label, count in counts.most_common(_FIRST)]
    return ", ".join(shown) + (", ..." if len(counts) > _FIRST else "")


# -- what is held out ----------------------------------------------------------------------------------------------------


def hold_out(examples: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(the rest, about `fraction` of the examples): by a hash of the text, so that copies stay together."""
    bound = int(fraction * 2**64)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for example in examples:
        lot = xxhash.xxh3_64_intdigest(f"{seed}/{example.identity}".encode("utf-8", "surrogatepass"))
        parts[lot < bound].append(example)
    return parts
