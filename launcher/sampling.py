"""Continue a prompt by sampling from a model, one token at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_options(n_tokens: int, temperature: float, top_k: int, top_p: float = 1.0) -> None:
    """Raise ValueError for what cannot be sampled with."""
    if n_tokens < 1 or not 0 <= temperature < math.inf or top_k < 0:
        raise ValueError(
            f"n_tokens={n_tokens}, temperature={temperature}, top_k={top_k}; expected at least 1, 0 and 0, and finite"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected more than 0 and at most 1, which keeps all")


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One of the ids that logits (V,) are of.

    temperature: 0 takes the most likely token.    top_k: draw among the k likeliest, 0 for all.
    top_p: of those, among the likeliest that have this much of the probability together (arXiv:1904.09751), 1 for all.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    scaled = (logits.double() - logits.max()) / temperature  # the largest is 0, however small the temperature
    probabilities = scaled.softmax(-1)
    if top_p < 1:
        descending, ids = probabilities.sort(descending=True, stable=True)
        beyond = descending.cumsum(-1) - descending >= top_p  # the likelier ones have it already; never the first
        probabilities[ids[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def sample(
    logits_of: Callable[[Tensor], Tensor],
    prompt: list[int],
    n_tokens: int,
    *,
    seq_len: int,
    eos_id: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    stop_at_eos: bool = True,
) -> list[int]:
    """The prompt and up to n_tokens more; ends early at eos_id if asked to.

    logits_of: maps tokens (1, T) to logits (1, T, V), T at most seq_len; older context is dropped.
    vocab_size: ids the tokenizer knows; padded rows of the model beyond it are never drawn.
    temperature, top_k, top_p: as draw takes them.
    The same seed gives the same tokens on every rank.
    """
    check_options(n_tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt) or [eos_id]  # a document begins after the end of another
    for _ in range(n_tokens):
        context = torch.tensor([ids[-seq_len:]], device=device)
        ids.append(draw(logits_of(context)[0, -1, :vocab_size], temperature, top_k, top_p, generator))
        if stop_at_eos and ids[-1] == eos_id:
            break
    return ids
