"""Rows of a masked language model: which tokens are hidden, as a function of the sample's number (arXiv:1810.04805).

A row of the corpus becomes `[CLS] tokens`: its last token gives way to [CLS], which stands for what begins a text. [SEP] is
what ends a document in the corpus anyway. The target of a hidden token is the token itself; nothing else has a target.
[CLS], [SEP] and padding are never hidden. Each epoch hides other tokens, as its samples have other numbers; held-out
windows hide the same at every evaluation.

T seq_len, n rows
"""

import unicodedata
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from data.errors import DataError
from data.hf_tokenizer import HuggingFaceTokenizer
from data.tokenizer import SentencePieceTokenizer, Tokenizer
from data.tokenizer_base import CONFIG_FILE

IGNORE = -100  # a target that counts for nothing, as torch's cross-entropy has it

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class MaskingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a masked language model has to foretell. The rest of the hidden tokens, a tenth, stays as it is."""

    share: Share = 0.15  # of the tokens are hidden
    whole_words: bool = False  # all tokens of a word together, or none; a Chinese character is a word
    as_mask: Annotated[float, Field(ge=0, le=1)] = 0.8  # of the hidden ones become [MASK]
    as_random: Annotated[float, Field(ge=0, le=1)] = 0.1  # and so many another token, any

    @model_validator(mode="after")
    def _shares_of_one(self) -> Self:
        if self.as_mask + self.as_random > 1:
            raise ValueError(
                f"as_mask={self.as_mask} and as_random={self.as_random} are more than 1 together; lower one"
            )
        return self


class MaskingError(DataError):
    """A tokenizer that has no token for what is hidden, or for what begins a text."""


def masking_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Of [MASK] and of [CLS]. Raises MaskingError."""
    if tokenizer.mask_id is not None and tokenizer.cls_id is not None:
        return tokenizer.mask_id, tokenizer.cls_id
    lacks, name = "a token that begins a text", "cls_token"
    if tokenizer.mask_id is None:
        lacks, name = "a token for masks", "mask_token"
    if isinstance(tokenizer, HuggingFaceTokenizer):
        lacks += f" ({tokenizer.folder / CONFIG_FILE} names no {name})"
    raise MaskingError(
        f"the tokenizer of {tokenizer.folder} lacks {lacks}, which a masked model needs: prepare the corpus with "
        'data.tokenizer.mask_token="[MASK]", or with a Hugging Face tokenizer whose config names mask_token and cls_token'
    )


class Masker:
    """Hides tokens of rows, the same ones for the same key whoever asks."""

    def __init__(self, cfg: MaskingConfig, tokenizer: Tokenizer, seed: int) -> None:
        """seed: of the run's data. Raises MaskingError."""
        self.mask_id, self.cls_id = masking_ids(tokenizer)
        self._cfg, self._seed = cfg, seed
        special = {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id} - {None}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            special |= tokenizer.special_ids
        self._plain = np.ones(tokenizer.vocab_size, dtype=np.bool_)
        self._plain[sorted(i for i in special if i is not None)] = False
        self._choice = np.flatnonzero(self._plain)  # ids that a hidden token may become
        if cfg.whole_words:
            self._goes_on, self._is_open = word_edges(tokenizer)

    def hide(
        self, rows: IntArray, documents: NDArray[np.int32] | None, keys: Sequence[str]
    ) -> tuple[IntArray, IntArray, NDArray[np.int32] | None]:
        """rows: (n, T + 1) of the corpus; documents: (n, T) or None; keys: what each row's choice depends on.

        Returns tokens and targets (n, T), targets IGNORE where nothing is hidden, and documents (n, T).
        """
        tokens = np.concatenate([np.full_like(rows[:, :1], self.cls_id), rows[:, :-2]], axis=1)
        if documents is not None:
            documents = np.concatenate([documents[:, :1], documents[:, :-1]], axis=1)
        targets = np.full_like(tokens, IGNORE)
        for row, key in enumerate(keys):
            random = np.random.Generator(np.random.SFC64(xxhash.xxh3_128_intdigest(key.encode())))
            hidden = self._choose(tokens[row], random)
            targets[row, hidden] = tokens[row, hidden]
            lots, others = random.random(len(hidden)), random.choice(self._choice, len(hidden))
            to_random = (lots >= self._cfg.as_mask) & (lots < self._cfg.as_mask + self._cfg.as_random)
            tokens[row, hidden[lots < self._cfg.as_mask]] = self.mask_id
            tokens[row, hidden[to_random]] = others[to_random]
        return tokens, targets, documents

    def key(self, sample: int) -> str:
        """Of a sample of the run."""
        return f"{self._seed}/masking/{sample}"

    @staticmethod
    def held_out_key(window: int) -> str:
        """Of a held-out window: of no seed, so that runs compare."""
        return f"held-out/masking/{window}"

    def _choose(self, tokens: IntArray, random: np.random.Generator) -> IntArray:
        """Places of a row (T,) to hide: words in the order of their lots, until the share is reached.

        The word that crosses the share is taken with the chance that makes the mean number of tokens the share's. One
        word is always taken.
        """
        places = np.flatnonzero(self._plain[tokens])
        if not len(places):
            return places
        begins = np.ones(len(places), dtype=np.bool_)
        if self._cfg.whole_words:
            here, before = tokens[places[1:]], tokens[places[1:] - 1]
            begins[1:] = ~((np.diff(places) == 1) & self._goes_on[here] & self._is_open[before])
        first = np.flatnonzero(begins)
        lengths = np.diff(np.append(first, len(places)))
        order = random.permutation(len(first))
        until = np.cumsum(lengths[order])
        wanted = self._cfg.share * len(places)
        whole = int(np.searchsorted(until, wanted, side="right"))  # words that fit
        left = wanted - (until[whole - 1] if whole else 0)
        crosses = whole < len(order) and random.random() * lengths[order[whole]] < left
        taken = np.zeros(len(first), dtype=np.bool_)
        taken[order[: max(1, whole + crosses)]] = True
        return places[np.repeat(taken, lengths)]


# -- words --------------------------------------------------------------------------------------------------------------


def word_edges(tokenizer: Tokenizer) -> tuple[BoolArray, BoolArray]:
    """By id (V,): whether a token may go on with a word, and whether a word may go on after it.

    Two neighbours are of one word where the first is open and the second goes on: letters and digits, but Chinese and
    Japanese characters, of which each is a word; of a WordPiece tokenizer what begins with its ##.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        texts = [_byte(piece) or piece.replace("\u2581", " ") for piece in tokenizer.pieces()]
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
        pieces, prefix = tokenizer.pieces(), tokenizer.word_prefix
        if prefix is not None:
            goes_on = np.array([piece.startswith(prefix) for piece in pieces], dtype=np.bool_)
            return goes_on, np.ones(len(pieces), dtype=np.bool_)
        texts = [_byte(piece) or piece for piece in pieces]
    goes_on = np.array([_in_word(text[:1]) for text in texts], dtype=np.bool_)
    return goes_on, np.array([_in_word(text[-1:]) for text in texts], dtype=np.bool_)


def _byte(piece: str) -> str:
    """For a piece that stands for one byte, text with the same edges: the bytes of a character stay together."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        byte = int(piece[3:5], 16)
        return chr(byte) if byte < 0x80 else " \ufffd" if byte >= 0xC0 else "\ufffd"
    return ""


def _in_word(character: str) -> bool:
    if character == "\ufffd":  # a part of one
        return True
    return bool(character) and (unicodedata.category(character)[0] in "LMN") and not _is_word(character)


_WORDS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


def _is_word(character: str) -> bool:
    """Whether it is one of a script that has no spaces."""
    return any(first <= ord(character) <= last for first, last in _WORDS)
