"""What a fine-tuned model makes of held-out examples, counted: numbers that add up over ranks, and scores of them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import IGNORE
from data.row_loader import Batch, RowSet, eval_rows
from launcher.held_out import bits_per_byte, perplexity, sum_losses
from launcher.scores import (
    Counts,
    accuracy,
    all_kinds,
    by_kind,
    by_label,
    confusion_of,
    entity_counts,
    kinds_of,
    macro_f1,
)
from launcher.task_config import ChatTask, ClassifyTask, PreferenceTask, TagTask
from launcher.task_examples import Task
from launcher.task_report import confusion_table, score_table
from model.preference import margins


class PairTally(NamedTuple):
    """What was counted on some pairs of answers; counts of ranks add up."""

    nats: float
    pairs: int
    preferred: int  # the chosen answer, more than by the reference
    margin: float  # nats

    def flatten(self) -> list[float]:
        return [float(value) for value in self]

    def unflatten(self, flat: list[float]) -> "PairTally":
        return PairTally(flat[0], round(flat[1]), round(flat[2]), flat[3])

    def values(self, task: Task, rows: RowSet) -> dict[str, float]:
        n = max(1, self.pairs)
        return {"loss/valid": self.nats / n, "valid/preferred": self.preferred / n, "valid/margin": self.margin / n}

    def text(self, task: Task) -> str:
        return ""


class Tally(NamedTuple):
    """What was counted on some rows; counts of ranks add up."""

    nats: float
    targets: int
    confusion: Counts  # (L, L) rows true, columns predicted; (0, 0) of conversations
    entities: Counts  # (kinds, 3) right, predicted, true; (0, 3) where tags name no entities

    def flatten(self) -> list[float]:
        return [self.nats, float(self.targets), *map(float, self.confusion.ravel()), *map(float, self.entities.ravel())]

    def unflatten(self, flat: list[float]) -> "Tally":
        """The tally of the same shapes with these numbers."""
        counts = np.rint(flat[2:]).astype(np.int64)
        n = self.confusion.size
        return Tally(
            flat[0],
            round(flat[1]),
            counts[:n].reshape(self.confusion.shape),
            counts[n:].reshape(self.entities.shape),
        )

    def values(self, task: Task, rows: RowSet) -> dict[str, float]:
        loss = self.nats / max(1, self.targets)
        if isinstance(task, ChatTask):
            of_text = bits_per_byte(loss, rows.n_bytes / max(1, self.targets))
            return {"loss/valid": loss, "loss/valid_perplexity": perplexity(loss), "loss/valid_bits_per_byte": of_text}
        assert isinstance(task, ClassifyTask | TagTask)
        found = {"loss/valid": loss, "valid/accuracy": accuracy(self.confusion)}
        if len(self.entities):
            kinds, micro = kinds_of(task.labels), all_kinds(self.entities)
            found |= {f"valid/entity_{name}": getattr(micro, name) for name in ("precision", "recall", "f1")}
            scores = zip(kinds, by_kind(self.entities), strict=True)
            return found | {f"valid/entity_f1_{kind}": score.f1 for kind, score in scores}
        found["valid/f1"] = macro_f1(self.confusion)
        scores = zip(task.labels, by_label(self.confusion), strict=True)
        return found | {f"valid/f1_{label}": score.f1 for label, score in scores}

    def text(self, task: Task) -> str:
        """Tables for people; "" of conversations."""
        if isinstance(task, ChatTask):
            return ""
        assert isinstance(task, ClassifyTask | TagTask)
        tables = [score_table("label", dict(zip(task.labels, by_label(self.confusion), strict=True)))]
        if len(self.entities):
            scores = dict(zip(kinds_of(task.labels), by_kind(self.entities), strict=True))
            tables.insert(0, score_table("entity", {**scores, "all": all_kinds(self.entities)}))
        return "\n\n".join([*tables, confusion_table(task.labels, self.confusion)])


def count(
    model: Callable[..., Tensor],
    task: Task,
    rows: RowSet,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    device: torch.device | str,
    enter: Callable[[str], None] = lambda phase: None,
) -> Tally | PairTally:
    """One rank's part. model: Transformer.forward or like it; of conversations it is asked for the summed loss, of pairs for
    log-probabilities, else for logits.

    Every rank makes the same number of forward passes.
    """
    batches = eval_rows(rows, batch_size, dp_rank, dp_size)
    if isinstance(task, PreferenceTask):
        return _count_pairs(model, task, rows, batches, device, enter)
    nothing = np.zeros((0, 3), dtype=np.int64)
    if isinstance(task, ChatTask):
        sums = sum_losses(model, (batch for _, batch in batches), device, lambda: enter("evaluation"))
        return Tally(sums.nats, sums.targets, np.zeros((0, 0), dtype=np.int64), nothing)
    kinds = kinds_of(task.labels) if isinstance(task, TagTask) else []
    nats, true, predicted, entities = 0.0, list[int](), list[int](), np.zeros((len(kinds), 3), dtype=np.int64)
    for log_probs, labels in label_log_probs(model, batches, device, enter):
        nats -= log_probs.gather(1, labels.unsqueeze(1)).double().sum().item()
        theirs, ours = labels.tolist(), log_probs.argmax(dim=-1).tolist()
        true.extend(theirs)
        predicted.extend(ours)
        if kinds and theirs:
            entities += entity_counts([task.labels[at] for at in theirs], [task.labels[at] for at in ours], kinds)
    return Tally(nats, len(true), confusion_of(true, predicted, len(task.labels)), entities)


def label_log_probs(
    model: Callable[..., Tensor],
    batches: Iterator[tuple[list[int], Batch]],
    device: torch.device | str,
    enter: Callable[[str], None] = lambda phase: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Row by row, what a model makes of the places that have a label: log-probabilities (n, L), fp32, and labels (n,).

    model: as count takes it.    batches: of eval_rows.
    """
    for _, (tokens, targets, documents) in batches:
        enter("evaluation")
        logits = model(tokens.to(device), None, None if documents is None else documents.to(device))
        log_probs = torch.log_softmax(logits.float(), dim=-1).cpu()  # (B, T, L)
        for row, row_targets in zip(log_probs, targets, strict=True):
            counted = row_targets != IGNORE
            yield row[counted], row_targets[counted]


def _count_pairs(
    model: Callable[..., Tensor],
    task: PreferenceTask,
    rows: RowSet,
    batches: Iterator[tuple[list[int], Batch]],
    device: torch.device | str,
    enter: Callable[[str], None],
) -> PairTally:
    assert rows.reference is not None
    found = PairTally(0.0, 0, 0, 0.0)
    for numbers, batch in batches:
        enter("evaluation")
        pairs = model(*(part.to(device) for part in batch if part is not None)).cpu()[: len(numbers)]
        more = margins(pairs, rows.reference[numbers]).double()
        found = PairTally(
            found.nats - F.logsigmoid(task.beta * more).sum().item(),
            found.pairs + len(numbers),
            found.preferred + int((more > 0).sum()),
            found.margin + more.sum().item(),
        )
    return found
