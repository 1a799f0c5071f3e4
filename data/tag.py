"""Tagged words as rows: each word is encoded by itself, after the text between words, so that it has tokens of its own.

transformers does the same where it is given words (is_split_into_words). The tag is the target of the word's first
token, or of its last: a decoder has then read all of it.
"""

from collections.abc import Sequence

import numpy as np

from data.classify import NO_FRAME, Frame, Placed, refuse_long
from data.examples import Sentence
from data.loader import IGNORE
from data.row_loader import RowSet
from data.task import TagTask, WordToken
from data.tokenizer import Tokenizer


def place_words(
    sentences: Sequence[Sequence[str]],
    where: Sequence[str],
    tokenizer: Tokenizer,
    seq_len: int,
    too_long: str,
    join: str,
    word_token: WordToken,
    frame: Frame = NO_FRAME,
) -> list[Placed]:
    """A tag for each word. Raises RecordError for a sentence that is too long and not to be cut."""
    spelled = [_spelled(words, join) for words in sentences]
    different = sorted({word for words in spelled for word in words})
    pieces = dict(zip(different, tokenizer.encode_batch(different), strict=True))
    lengths = [[len(pieces[word]) for word in words] for words in spelled]
    room = seq_len - frame.size
    refuse_long(where, [sum(of) + frame.size for of in lengths], seq_len, too_long)
    placed = []
    for words, of in zip(spelled, lengths, strict=True):
        tokens = np.concatenate([pieces[word] for word in words])
        ends, counts = np.cumsum(of), np.array(of)
        at = ends - counts if word_token == "first" else ends - 1
        at = np.where((counts == 0) | (at >= room), -1, at + len(frame.before))
        placed.append(Placed(frame.around(tokens[:room]), at, len(tokens) > room, frame is not NO_FRAME))
    return placed


def encode_sentences(
    sentences: Sequence[Sentence], tokenizer: Tokenizer, seq_len: int, cfg: TagTask, frame: Frame = NO_FRAME
) -> RowSet:
    """A row each. Tags are in the set. Raises as place_words.

    Words without a token in this tokenizer, and words behind a cut, have no target; they are counted in the notes.
    """
    number = {tag: at for at, tag in enumerate(cfg.labels)}
    where = [sentence.where for sentence in sentences]
    words = [sentence.words for sentence in sentences]
    placed = place_words(words, where, tokenizer, seq_len, cfg.too_long, cfg.join, cfg.word_token, frame)
    found = RowSet([], [], seq_len)
    cut = lost = silent = 0
    for sentence, of in zip(sentences, placed, strict=True):
        row = of.row([number[tag] for tag in sentence.tags])
        without = int((of.at < 0).sum())
        cut, lost, silent = cut + of.is_cut, lost + without * of.is_cut, silent + without * (not of.is_cut)
        if (row.targets != IGNORE).any():
            found.rows.append(row)
            found.where.append(sentence.where)
    if cut:
        found.notes.append(
            f"{cut} of {len(sentences)} sentences are cut at {seq_len} tokens; {lost} words have no target"
        )
    if silent:
        found.notes.append(f"{silent} words have no token in the run's tokenizer and are neither trained on nor scored")
    return found


def _spelled(words: Sequence[str], join: str) -> list[str]:
    """The words, each but the first with what is between words before it."""
    return [word if not at else join + word for at, word in enumerate(words)]
