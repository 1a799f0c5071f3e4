"""Labelled texts as rows: the label is the target of the text's last token, where a decoder has read all of it.

So it is pooled by transformers' models for sequence classification, too. Nothing is put before a text or after it.
"""

from collections.abc import Sequence

import numpy as np

from data.examples import Example
from data.loader import IGNORE
from data.records import RecordError
from data.row_loader import Row, RowSet
from data.task import ClassifyTask
from data.tokenizer import Tokenizer


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int, cfg: ClassifyTask) -> RowSet:
    """A row each. Labels are in the set. Raises RecordError for a text without a token, and for one that is too long."""
    number = {label: at for at, label in enumerate(cfg.labels)}
    n_empty = sum(not example.text for example in examples)
    examples = [example for example in examples if example.text]
    rows, cut = [], 0
    every = tokenizer.encode_batch([example.text for example in examples])
    refuse_long([e.where for e in examples], [len(ids) for ids in every], seq_len, cfg.too_long)
    for example, ids in zip(examples, every, strict=True):
        if not len(ids):
            raise RecordError(f"{example.where}: the text {example.text[:40]!r} has no token in the run's tokenizer")
        cut += len(ids) > seq_len
        tokens = ids[:seq_len].astype(np.int64)
        targets = np.full(len(tokens), IGNORE, dtype=np.int64)
        targets[-1] = number[example.label]
        rows.append(Row(tokens, targets))
    notes = [f"{cut} of {len(rows)} texts are cut at {seq_len} tokens"] if cut else []
    notes += [f"{n_empty} empty texts are left out"] if n_empty else []
    return RowSet(rows, [example.where for example in examples], seq_len, notes)


def refuse_long(where: Sequence[str], lengths: Sequence[int], seq_len: int, too_long: str) -> None:
    """Raise RecordError for the first text of more than seq_len tokens, unless they are to be cut."""
    long = [at for at, length in enumerate(lengths) if length > seq_len]
    if not long or too_long == "cut":
        return
    others = f" (and {len(long) - 1} more of {len(lengths)} texts are too long)" if len(long) > 1 else ""
    raise RecordError(
        f"{where[long[0]]}: the text has {lengths[long[0]]} tokens, model.seq_len={seq_len} is the longest{others}; say "
        "task.too_long: cut to leave out their ends, or take a model with a longer context"
    )
