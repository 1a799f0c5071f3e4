"""What predicted labels are worth: accuracy, precision, recall and F1, the confusion matrix, entities by seqeval's rules.

All of it comes from counts that ranks add up, so that each example counts once at any world size.

L labels
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


class Score(NamedTuple):
    """Of one label or kind of entity. What divides by zero is 0."""

    precision: float
    recall: float
    f1: float
    support: int  # how many there are in truth


def score_of(right: float, predicted: float, true: float) -> Score:
    """right: of those predicted, how many are true."""
    return Score(
        right / predicted if predicted else 0.0,
        right / true if true else 0.0,
        2 * right / (predicted + true) if predicted + true else 0.0,
        int(true),
    )


# -- labels --------------------------------------------------------------------------------------------------------------


def confusion_of(true: Sequence[int], predicted: Sequence[int], n_labels: int) -> Counts:
    """(L, L): how often a label (row) was taken for one (column)."""
    flat = np.asarray(true, dtype=np.int64) * n_labels + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=n_labels * n_labels).reshape(n_labels, n_labels)


def by_label(confusion: Counts) -> list[Score]:
    right, predicted, true = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    return [score_of(*map(float, of_label)) for of_label in zip(right, predicted, true, strict=True)]


def macro_f1(confusion: Counts) -> float:
    """The mean F1 of the labels that occur, in truth or as predicted."""
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
    found = [score.f1 for score, there in zip(by_label(confusion), occurs, strict=True) if there]
    return sum(found) / len(found) if found else 0.0


def accuracy(confusion: Counts) -> float:
    return float(confusion.diagonal().sum() / max(1, confusion.sum()))


# -- entities ------------------------------------------------------------------------------------------------------------


class Entity(NamedTuple):
    kind: str
    first: int  # word
    last: int  # word, part of it


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sentence, as seqeval (and conlleval) reads them without its strict mode.

    Tags are O or a prefix and a kind, such as B-PER. B and S begin an entity always, I and E where none of their kind is
    open; E and S end it. A tag without a kind is of kind "_".
    """
    before, kind_before, first = "O", "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        ended = before in "ES" or (before in "BI" and prefix in "BSO") or kind_before != kind
        if ended and before != "O":
            yield Entity(kind_before, first, at - 1)
        began = prefix in "BS" or (before in "ESO" and prefix in "EI")
        if began or (prefix != "O" and kind_before != kind):
            first = at
        before, kind_before = prefix, kind


def kinds_of(tags: Sequence[str]) -> list[str]:
    """The kinds of entities that a tag set can name; empty where it has no O or other tags than those of entities."""
    if "O" not in tags or not all(tag == "O" or (tag[0] in "BIES" and tag[1:2] == "-" and tag[2:]) for tag in tags):
        return []
    return sorted({tag[2:] for tag in tags if tag != "O"})


def entity_counts(true: Sequence[str], predicted: Sequence[str], kinds: Sequence[str]) -> Counts:
    """(kinds, 3) of one sentence: right, predicted and true ones. Right is one of the same kind and the same words."""
    found = np.zeros((len(kinds), 3), dtype=np.int64)
    number = {kind: at for at, kind in enumerate(kinds)}
    ours, theirs = set(entities(predicted)), set(entities(true))
    for column, group in enumerate((ours & theirs, ours, theirs)):
        for entity in group:
            found[number[entity.kind], column] += 1
    return found


def by_kind(counts: Counts) -> list[Score]:
    return [score_of(*map(float, row)) for row in counts]


def all_kinds(counts: Counts) -> Score:
    """Micro average: over all entities."""
    return score_of(*map(float, counts.sum(axis=0)))
