"""Labelled texts as rows: the label is the target of the text's last token, where a decoder has read all of it.

So it is pooled by transformers' models for sequence classification, too. Nothing is put before a text or after it. For a
masked model [CLS] stands before it and [SEP] after it, and the label is the target of [CLS].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.examples import Example
from data.loader import IGNORE
from data.records import RecordError
from data.row_loader import IntArray, Row, RowSet
from data.task import ClassifyTask
from data.tokenizer import Tokenizer, TokenizerError


class Frame(NamedTuple):
    """What stands around a text of a masked model, as its tokenizer's own template says."""

    before: list[int]
    after: list[int]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: NDArray[np.integer]) -> IntArray:
        return np.concatenate([self.before, ids, self.after]).astype(np.int64)


NO_FRAME = Frame([], [])  # of a decoder


def frame_of(tokenizer: Tokenizer) -> Frame:
    """Raises TokenizerError where the tokenizer has no token for it."""
    if tokenizer.cls_id is None:
        raise TokenizerError(
            f"the tokenizer in {tokenizer.folder} has no token that stands before a text of a masked model; name its "
            "cls_token in tokenizer_config.json"
        )
    return Frame([tokenizer.cls_id], [tokenizer.sep_id])


class Placed(NamedTuple):
    """An example as tokens, and where its labels belong."""

    tokens: IntArray  # (n,) at most seq_len
    at: IntArray  # the token of each label, in their order; -1: none, as it is cut off or has no token
    is_cut: bool
    alone: bool  # whether what fills the row up must be kept from it: a masked model sees what stands behind

    def row(self, labels: Sequence[int]) -> Row:
        """labels: their numbers, one for each place."""
        targets = np.full(len(self.tokens), IGNORE, dtype=np.int64)
        numbers = np.array(labels, dtype=np.int64)
        targets[self.at[self.at >= 0]] = numbers[self.at >= 0]
        return Row(self.tokens, targets, np.zeros(len(targets), dtype=np.int32) if self.alone else None)


def place_texts(
    texts: Sequence[str],
    where: Sequence[str],
    tokenizer: Tokenizer,
    seq_len: int,
    too_long: str,
    frame: Frame = NO_FRAME,
) -> list[Placed]:
    """One label each. Raises RecordError for a text without a token, and for one that is too long and not to be cut."""
    every = tokenizer.encode_batch(texts)
    room = seq_len - frame.size
    refuse_long(where, [len(ids) + frame.size for ids in every], seq_len, too_long)
    for place, text, ids in zip(where, texts, every, strict=True):
        if not len(ids):
            raise RecordError(f"{place}: the text {text[:40]!r} has no token in the run's tokenizer")
    framed = [frame.around(ids[:room]) for ids in every]
    at = [0 if frame.before else len(ids) - 1 for ids in framed]
    return [
        Placed(ids, np.array([place]), len(whole) > room, frame is not NO_FRAME)
        for ids, place, whole in zip(framed, at, every, strict=True)
    ]


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int, cfg: ClassifyTask, frame: Frame = NO_FRAME
) -> RowSet:
    """A row each. Labels are in the set. Raises as place_texts."""
    number = {label: at for at, label in enumerate(cfg.labels)}
    n_empty = sum(not example.text for example in examples)
    examples = [example for example in examples if example.text]
    where = [example.where for example in examples]
    placed = place_texts([example.text for example in examples], where, tokenizer, seq_len, cfg.too_long, frame)
    rows = [of.row([number[example.label]]) for of, example in zip(placed, examples, strict=True)]
    cut = sum(of.is_cut for of in placed)
    notes = [f"{cut} of {len(rows)} texts are cut at {seq_len} tokens"] if cut else []
    notes += [f"{n_empty} empty texts are left out"] if n_empty else []
    return RowSet(rows, where, seq_len, notes)


def refuse_long(where: Sequence[str], lengths: Sequence[int], seq_len: int, too_long: str) -> None:
    """Raise RecordError for the first text of more than seq_len tokens, unless they are to be cut."""
    long = [at for at, length in enumerate(lengths) if length > seq_len]
    if not long or too_long == "cut":
        return
    others = f" (and {len(long) - 1} more of {len(lengths)} texts are too long)" if len(long) > 1 else ""
    raise RecordError(
        f"{where[long[0]]}: the text has {lengths[long[0]]} tokens, model.seq_len={seq_len} is the longest{others}; say "
        "task.too_long: cut (launcher/label.py: --cut) to leave out their ends, or take a model with a longer context"
    )
