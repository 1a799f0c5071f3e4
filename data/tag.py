"""Tagged words as rows: each word is encoded by itself, after the text between words, so that it has tokens of its own.

transformers does the same where it is given words (is_split_into_words). The tag is the target of the word's first
token, or of its last: a decoder has then read all of it.
"""

from collections.abc import Sequence

import numpy as np

from data.classify import refuse_long
from data.examples import Sentence
from data.loader import IGNORE
from data.row_loader import Row, RowSet
from data.task import TagTask
from data.tokenizer import Tokenizer


def encode_sentences(sentences: Sequence[Sentence], tokenizer: Tokenizer, seq_len: int, cfg: TagTask) -> RowSet:
    """A row each. Tags are in the set. Raises RecordError for a sentence that is too long.

    Words without a token in this tokenizer, and words behind a cut, have no target; they are counted in the notes.
    """
    number = {tag: at for at, tag in enumerate(cfg.labels)}
    pieces = _pieces(sentences, tokenizer, cfg.join)
    spelled = [[pieces[word] for word in _spelled(sentence, cfg.join)] for sentence in sentences]
    refuse_long([s.where for s in sentences], [sum(map(len, words)) for words in spelled], seq_len, cfg.too_long)
    found = RowSet([], [], seq_len)
    cut = lost = silent = 0
    for sentence, words in zip(sentences, spelled, strict=True):
        tokens = np.concatenate(words).astype(np.int64)
        targets = np.full(len(tokens), IGNORE, dtype=np.int64)
        end = 0
        for word, tag in zip(words, sentence.tags, strict=True):
            begin, end = end, end + len(word)
            at = begin if cfg.word_token == "first" else end - 1
            silent += not len(word)
            lost += bool(len(word)) and at >= seq_len
            if len(word) and at < seq_len:
                targets[at] = number[tag]
        cut += len(tokens) > seq_len
        if (targets[:seq_len] != IGNORE).any():
            found.rows.append(Row(tokens[:seq_len], targets[:seq_len]))
            found.where.append(sentence.where)
    if cut:
        found.notes.append(
            f"{cut} of {len(sentences)} sentences are cut at {seq_len} tokens; {lost} words have no target"
        )
    if silent:
        found.notes.append(f"{silent} words have no token in the run's tokenizer and are neither trained on nor scored")
    return found


def _spelled(sentence: Sentence, join: str) -> list[str]:
    """The words, each but the first with what is between words before it."""
    return [word if not at else join + word for at, word in enumerate(sentence.words)]


def _pieces(sentences: Sequence[Sentence], tokenizer: Tokenizer, join: str) -> dict[str, np.ndarray]:
    """The tokens of each different word."""
    words = sorted({word for sentence in sentences for word in _spelled(sentence, join)})
    return dict(zip(words, tokenizer.encode_batch(words), strict=True))
