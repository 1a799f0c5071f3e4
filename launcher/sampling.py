"""Continue a prompt by sampling from a model, one token at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


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
    seed: int = 0,
    device: torch.device | str = "cpu",
    stop_at_eos: bool = True,
) -> list[int]:
    """The prompt and up to n_tokens more; ends early at eos_id if asked to.

    logits_of: maps tokens (1, T) to logits (1, T, V), T at most seq_len; older context is dropped.
    vocab_size: ids the tokenizer knows; padded rows of the model beyond it are never drawn.
    temperature: 0 takes the most likely token.    top_k: 0 keeps all.
    The same seed gives the same tokens on every rank.
    """
    if n_tokens < 1 or not 0 <= temperature < math.inf or top_k < 0:
        raise ValueError(
            f"n_tokens={n_tokens}, temperature={temperature}, top_k={top_k}; expected at least 1, 0 and 0, and finite"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt) or [eos_id]  # a document begins after the end of another
    for _ in range(n_tokens):
        context = torch.tensor([ids[-seq_len:]], device=device)
        logits = logits_of(context)[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            if 0 < top_k < vocab_size:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
            scaled = (logits.double() - logits.max()) / temperature  # the largest is 0, however small the temperature
            ids.append(int(torch.multinomial(scaled.softmax(-1), 1, generator=generator)))
        if stop_at_eos and ids[-1] == eos_id:
            break
    return ids
