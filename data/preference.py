"""Pairs of answers as rows: a row is a pair, the chosen answer and the rejected one, each after the prompt and by itself.

They are the two documents of the row, which do not see each other; only answers and their ends count.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.chat import ANSWERS, Message, Template, check_messages
from data.loader import IGNORE
from data.records import RecordError, read_records
from data.row_loader import Row, RowSet
from data.task import PreferenceTask


class Pair(NamedTuple):
    """Two conversations that differ in their last answer."""

    where: str
    chosen: list[Message]
    rejected: list[Message]

    @property
    def identity(self) -> str:
        return repr(self.chosen[:-1])  # answers to one prompt stay on one side


def read_pairs(task: PreferenceTask, paths: list[str]) -> list[Pair]:
    """Raises RecordError for a prompt that ends with an answer, an empty text, and two answers that are the same."""
    found, columns = [], [task.prompt, task.chosen, task.rejected]
    for where, (prompt, chosen, rejected) in read_records(paths, lambda fmt: list(columns), task.format, task.formats):
        before: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(before, list):
            raise RecordError(f"{where}: its {task.prompt} is {prompt!r:.60}; expected a string or a list of messages")
        if before and isinstance(before[-1], dict) and before[-1].get("role") == ANSWERS:
            raise RecordError(
                f"{where}: the last message of {task.prompt} is of the {ANSWERS}; expected one of the user"
            )
        if chosen == rejected:
            raise RecordError(f"{where}: {task.chosen} and {task.rejected} are the same; there is nothing to prefer")
        both = [check_messages([*before, {"role": ANSWERS, "content": answer}], where) for answer in (chosen, rejected)]
        found.append(Pair(where, *both))
    return found


def encode_pairs(pairs: Sequence[Pair], template: Template, seq_len: int) -> RowSet:
    """A row each. Raises RecordError for a pair of more than seq_len tokens."""
    rows = []
    for pair in pairs:
        parts = [_answer(template, messages, pair.where) for messages in (pair.chosen, pair.rejected)]
        tokens, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
        if len(tokens) > seq_len:
            raise RecordError(
                f"{pair.where}: the pair has {len(tokens)} tokens, {len(parts[0][0])} chosen and {len(parts[1][0])} "
                f"rejected, and both are read in one row: model.seq_len={seq_len} is the longest; leave it out, or, where "
                "positions are rotary, set model.seq_len higher"
            )
        documents = np.repeat(np.array([0, 1], dtype=np.int32), [len(ids) for ids, _ in parts])
        rows.append(Row(tokens, targets, documents))
    return RowSet(rows, [pair.where for pair in pairs], seq_len)


def _answer(template: Template, messages: list[Message], where: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) of a conversation; of its last answer alone count."""
    parts = template.parts(messages, where)
    ids = np.concatenate([part.ids for part in parts])
    targets = ids.copy()
    targets[: len(ids) - len(parts[-1].ids)] = IGNORE
    return ids[:-1], targets[1:]
