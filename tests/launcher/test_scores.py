"""Scores against hand-computed cases, and against what seqeval 1.2.2 gave for the same tags (it is no dependency)."""

import numpy as np
import pytest

from launcher.scores import (
    Entity,
    accuracy,
    all_kinds,
    by_kind,
    by_label,
    confusion_of,
    entities,
    entity_counts,
    kinds_of,
    macro_f1,
)


def test_confusion_accuracy_and_f1():
    confusion = confusion_of([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1], 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert accuracy(confusion) == pytest.approx(3 / 6)
    scores = by_label(confusion)
    assert scores[0] == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
    assert scores[1] == pytest.approx((1 / 3, 1 / 2, 2 / 5, 2))
    assert scores[2] == (0.0, 0.0, 0.0, 1)
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)  # label 3 occurs nowhere
    assert macro_f1(np.zeros((2, 2), dtype=np.int64)) == accuracy(np.zeros((2, 2), dtype=np.int64)) == 0.0


# tags, and what seqeval.metrics.sequence_labeling.get_entities of seqeval 1.2.2 says of them
SEQEVAL = [
    ("O B-PER I-PER O B-LOC", [("PER", 1, 2), ("LOC", 4, 4)]),
    ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),  # an entity needs no B
    ("B-PER I-LOC I-LOC B-LOC", [("PER", 0, 0), ("LOC", 1, 2), ("LOC", 3, 3)]),  # another kind begins another
    ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
    ("S-PER B-LOC I-LOC E-LOC O E-LOC", [("PER", 0, 0), ("LOC", 1, 3), ("LOC", 5, 5)]),
    ("B-PER E-PER I-PER E-PER", [("PER", 0, 1), ("PER", 2, 3)]),
    ("O O", []),
]


@pytest.mark.parametrize(("tags", "expected"), SEQEVAL)
def test_entities_are_seqevals(tags, expected):
    assert list(entities(tags.split())) == [Entity(*of) for of in expected]


def test_entity_scores_are_seqevals():
    """seqeval's classification_report of these gives LOC 0.5000 1.0000 0.6667 1, PER 0.5000 0.5000 0.5000 2, micro
    0.5000 0.6667 0.5714 3."""
    true = ["B-PER I-PER O B-LOC", "O B-PER O"]
    predicted = ["B-PER I-PER B-LOC B-LOC", "O B-PER I-PER"]
    kinds = kinds_of(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    assert kinds == ["LOC", "PER"]
    counts = sum(entity_counts(t.split(), p.split(), kinds) for t, p in zip(true, predicted, strict=True))
    assert by_kind(counts)[0] == pytest.approx((0.5, 1.0, 2 / 3, 1))
    assert by_kind(counts)[1] == pytest.approx((0.5, 0.5, 0.5, 2))
    assert all_kinds(counts) == pytest.approx((0.5, 2 / 3, 4 / 7, 3))


@pytest.mark.parametrize("tags", [["NOUN", "VERB"], ["O", "NOUN"], ["B-PER", "I-PER"], ["O", "B-"]])
def test_tags_that_name_no_entities(tags):
    assert kinds_of(tags) == []
