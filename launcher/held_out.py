"""Loss on text that was not trained on: summed over batches, and put together from the sources of a corpus.

The train loop's evaluation and launcher/evaluate.py share this, so that they give the same numbers.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from data.corpus import Corpus
from data.loader import IGNORE

Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens, targets, documents: (B, T)


class Sums(NamedTuple):
    """Over some batches."""

    nats: float
    targets: int


def sum_losses(
    model: Callable[..., Tensor],
    batches: Iterable[Batch],
    device: torch.device | str,
    before_each: Callable[[], None] = lambda: None,
) -> Sums:
    """model: gives the summed loss of (tokens, targets[, documents]).    before_each: is called once a batch."""
    nats, targets_seen = 0.0, 0
    for tokens, targets, documents in batches:
        before_each()
        packed = () if documents is None else (documents.to(device),)
        nats += model(tokens.to(device), targets.to(device), *packed).item()
        targets_seen += int((targets != IGNORE).sum())
    return Sums(nats, targets_seen)


def combine(
    losses: dict[str, float], shares: dict[str, float], valid: dict[str, Corpus], masked: bool = False
) -> dict[str, float]:
    """What is logged of held-out losses (nats a token, by source): their mean, perplexity, bits a byte, and each source.

    shares: of the sources in the training mixture; the mean is with these weights, an estimate of the training loss on
    unseen text. Bits a byte are there where the bytes of all sources are known; masked: losses are of hidden tokens
    alone, which do not add up to those of a text.
    """
    total = sum(shares[name] for name in losses)
    weights = {name: shares[name] / total if total else 1 / len(losses) for name in losses}
    loss = sum(weights[name] * losses[name] for name in losses)
    bytes_per_token = sum(weights[name] * valid[name].bytes_per_token for name in losses)
    values = {"loss/valid": loss, "loss/valid_perplexity": perplexity(loss)}
    if not masked and all(corpus.n_bytes for corpus in valid.values()):
        values["loss/valid_bits_per_byte"] = bits_per_byte(loss, bytes_per_token)
    if len(losses) > 1:
        values |= {f"loss/valid_{name}": of_source for name, of_source in losses.items()}
    return values


def score_names(valid: dict[str, Corpus], masked: bool) -> list[str]:
    """The keys of what combine gives."""
    return list(combine(dict.fromkeys(valid, 1.0), dict.fromkeys(valid, 1.0), valid, masked)) if valid else []


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    return loss / math.log(2) / bytes_per_token
