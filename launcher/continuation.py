"""Continue prompts with a model in memory: with a cache of keys and values, prompts of one length as a batch.

Every prompt gets what it would get alone: rows of a batch have equally many tokens, so that nothing is padded, and each
draws from a generator of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from launcher.sampling import check_options, draw
from model.cache import KVCache, next_logits
from model.network import Network
from model.transformer import Transformer


@dataclass(frozen=True)
class Options:
    """How prompts are continued. Raises ValueError for what cannot be."""

    n_tokens: int = 100  # at most
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0  # of every prompt, whatever stands beside it
    stop: tuple[str, ...] = ()  # a continuation ends before the first of these
    stop_ids: frozenset[int] = frozenset()  # and with one of these tokens, or the one that ends a document
    cache: bool = True

    def __post_init__(self) -> None:
        check_options(self.n_tokens, self.temperature, self.top_k, self.top_p)
        if "" in self.stop:
            raise ValueError("a stop string is empty, and every text begins with it; leave it out")


class Row:
    """One prompt as it is continued."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], options: Options) -> None:
        self.ids = list(prompt) or [tokenizer.eos_id]  # a document begins after the end of another
        self.prompt_text = tokenizer.decode(self.ids)
        self.n_prompt = len(self.ids)
        self.text = ""  # the continuation, as far as it is known
        self.finished = False
        self._tokenizer, self._options = tokenizer, options
        self._generator = torch.Generator().manual_seed(options.seed)

    def extend(self, logits: Tensor) -> None:
        """Draw the next token from logits (V,)."""
        options = self._options
        drawn = draw(
            logits[: self._tokenizer.vocab_size], options.temperature, options.top_k, options.top_p, self._generator
        )
        self.ids.append(drawn)
        self.text = self._tokenizer.decode(self.ids)[len(self.prompt_text) :]
        ended = drawn == self._tokenizer.eos_id or drawn in options.stop_ids
        self.finished = ended or len(self.ids) - self.n_prompt >= options.n_tokens
        ends = [self.text.find(stop) for stop in options.stop if stop in self.text]
        if ends:
            self.text, self.finished = self.text[: min(ends)], True

    @property
    def settled(self) -> str:
        """What of the continuation no later token can change: not half a character, nor what may begin a stop string."""
        if self.finished:
            return self.text
        held = self.text.rstrip("\ufffd")
        longest = max(
            (n for stop in self._options.stop for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0
        )
        return held[: len(held) - longest]


def continue_prompts(
    model: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: Options,
    on_text: Callable[[int, str], None] = lambda number, text: None,
) -> list[Row]:
    """A finished row for each prompt. on_text: is given (number of the prompt, more of its settled text) as it comes."""
    assert isinstance(model, Transformer), "others were refused before"
    rows = [Row(tokenizer, prompt, options) for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[row.n_prompt].append(number)
    told = [0] * len(rows)

    def tell(number: int) -> None:
        text = rows[number].settled
        if len(text) > told[number]:
            on_text(number, text[told[number] :])
            told[number] = len(text)

    with torch.inference_mode():
        for numbers in by_length.values():
            _continue_batch(model, rows, numbers, options, tell)
    return rows


def _continue_batch(
    model: Transformer, rows: list[Row], numbers: list[int], options: Options, tell: Callable[[int], None]
) -> None:
    """Continue the rows with these numbers, which are of one length, to their ends."""
    longest, weight = model.cfg.seq_len, model.head.weight
    cache = None
    if options.cache:
        cache = KVCache(model.cfg, len(numbers), min(longest, rows[numbers[0]].n_prompt + options.n_tokens), weight)
    while numbers:
        full = cache is None or cache.length == longest  # older context is dropped: every position is another one then
        known = 0 if full or cache is None else cache.length
        context = [rows[number].ids[-longest:][known:] for number in numbers]
        logits = next_logits(model, torch.tensor(context, device=weight.device), None if full else cache)
        going_on = []
        for place, number in enumerate(numbers):
            rows[number].extend(logits[place])
            tell(number)
            if not rows[number].finished:
                going_on.append(place)
        if cache is not None and len(going_on) < len(numbers):
            cache.keep(going_on)
        numbers = [numbers[place] for place in going_on]
