"""A tokenizer as transformers loads it with AutoTokenizer, and the proof that it gives the same ids.

SentencePiece's BPE and char models are written as a tokenizer.json whose pieces have real spaces instead of U+2581: then
a U+2581 in a text is a character like any other, and goes through its bytes as it does here. Unigram models have no
equal: the tokenizers library adds up scores in another precision, so that of two ways of equal score ("\\n\\n" + "\\n" and
"\\n" + "\\n\\n") it may take the other one. Such a model is written as it is, to a folder of its own, where
AutoTokenizer does not take it for something else.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.hf_tokenizer import ADDED, JSON_FILE, HuggingFaceTokenizer
from data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError, load_tokenizer
from data.tokenizer_base import CONFIG_FILE, as_json

SENTENCEPIECE = "sentencepiece"  # folder in which a SentencePiece model lies that has no equal in tokenizer.json
_OURS = ("kind", "fingerprint", "vocab_size", ADDED)  # fields of ours in a tokenizer_config.json
_INPUTS = ["input_ids", "attention_mask"]  # what the models here take; token_type_ids would be refused

# What libraries take for something special, drop or cut in other settings.
ADVERSARIAL = [
    "", " ", "  lead", "trail  ", "a  b   c", "\n", "\n\n\n", "\t", "\r\n", "\0", "\x85", "\u2028", "\ufeff", "\u00a0",
    "\u2581", "a\u2581b", " \u2581 ", "\u2581\u2581", "\u2585", "\ufffd", "\uffff", "\U0010ffff", "<s>", "</s>", "<unk>",
    "<pad>", "x</s>y", "<0x41>", "<0xE2><0x96><0x81>", "<|endoftext|>", "[CLS]", "[MASK]", "e\u0301", "é", "①", "ﬁ", "İ",
    "中文字符没有空格。", "한국어", "עברית", "🧑‍🚀", "007", "3.14159", "٣٤", "isn ' t it , so .", "def f(x):\n\treturn x\n",
    "a" * 1000, "ab" * 500, " " * 300, "\n" * 300, "aba" * 333,
]  # fmt: skip


@dataclass
class Exported:
    """What was written for a run's tokenizer."""

    fast: bool = True  # whether AutoTokenizer loads it
    notes: list[str] = field(default_factory=list)
    proof: dict[str, int] = field(default_factory=dict)  # what was compared


class SpecialIds(NamedTuple):
    """What a Hugging Face config says of a run's tokenizer."""

    bos: int  # what a document begins after: the end of another, as in training
    eos: int
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Padding of a SentencePiece model is its unknown piece: that is in no text, so that its rows mask nothing."""
    other = tokenizer.unk_id if isinstance(tokenizer, SentencePieceTokenizer) else tokenizer.eos_id
    return SpecialIds(tokenizer.eos_id, tokenizer.eos_id, other if tokenizer.pad_id is None else tokenizer.pad_id)


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, seq_len: int, texts: Sequence[str], masked: bool = False
) -> Exported:
    """Write the tokenizer to a folder, and prove its ids on texts and ADVERSARIAL.

    masked: of a masked model: it puts [CLS] before a text and [SEP] after it, and takes the name of its token for masks in
    a text for that token.

    The folder has its config.json already, as that is a part of what AutoTokenizer decides by.
    A SentencePiece model whose ids cannot be proved is written as it is to folder/sentencepiece, and the notes say why.
    Raises TokenizerError where a Hugging Face tokenizer gives other ids through AutoTokenizer than in training.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _write_sentencepiece(tokenizer, folder, seq_len, texts, masked)
    assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
    exported = Exported()
    files = tokenizer.files()
    config = json.loads(files[CONFIG_FILE])
    config = {key: value for key, value in config.items() if key not in _OURS}
    # the class that reads it in a run: the one that a folder names may make something else of the same files
    config |= {"model_max_length": seq_len, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": _INPUTS}
    for name, content in (files | {CONFIG_FILE: as_json(config)}).items():
        (folder / name).write_bytes(content)
    plain = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if masked:
        backend = Backend.from_str(files[JSON_FILE].decode())
        backend.post_processor = _template(backend, tokenizer)
        (folder / JSON_FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")
    elif added := plain("").input_ids:
        tree = json.loads(files[JSON_FILE])
        tree["post_processor"] = None
        (folder / JSON_FILE).write_bytes(as_json(tree))
        exported.notes.append(f"the template that adds the ids {added} to a text is left out: the run trained without")
    if not config.get("split_special_tokens"):
        exported.notes.append(_NAMES_ARE_TOKENS)
    if difference := prove(tokenizer, folder, texts, exported):
        raise TokenizerError(
            f"AutoTokenizer gives other ids than this run's tokenizer: {difference}. A folder that says otherwise is not "
            f"written; mend {tokenizer.folder}, or read the weights where they are with launcher/generate.py"
        )
    return exported


_NAMES_ARE_TOKENS = (
    "the names of special tokens in a text become those tokens, unless AutoTokenizer.from_pretrained is given "
    "split_special_tokens=True; in training they were text"
)


def _template(backend: Backend, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """What stands around a text of a masked model, or around two."""
    assert tokenizer.cls_id is not None
    ids = tokenizer.cls_id, tokenizer.sep_id
    cls, sep = (str(backend.id_to_token(i)) for i in ids)
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=[(cls, ids[0]), (sep, ids[1])]
    )


def _write_sentencepiece(
    tokenizer: SentencePieceTokenizer, folder: Path, seq_len: int, texts: Sequence[str], masked: bool
) -> Exported:
    exported, ids = Exported(), special_ids(tokenizer)
    why = f"SentencePiece {tokenizer.model_type} models have no equal there"
    if tokenizer.model_type in ("bpe", "char"):
        pieces = tokenizer.pieces()
        named = zip(("bos_token", "eos_token", "pad_token", "unk_token"), (*ids, tokenizer.unk_id), strict=True)
        names = {name: pieces[i] for name, i in named}
        begin = tokenizer.bos_id  # <s>, which no text of a run has
        others = [] if begin is None or begin < 0 or begin in (*ids, tokenizer.unk_id) else [pieces[begin]]
        backend = _backend(tokenizer)
        if tokenizer.mask_id is not None:
            names["mask_token"] = pieces[tokenizer.mask_id]
        if masked:
            assert tokenizer.cls_id is not None
            names |= {"cls_token": pieces[tokenizer.cls_id], "sep_token": pieces[tokenizer.sep_id]}
            others = []
            backend.post_processor = _template(backend, tokenizer)
            exported.notes.append(_NAMES_ARE_TOKENS)
        before = set(os.listdir(folder))
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **names,
            additional_special_tokens=others,
            split_special_tokens=not masked,  # "</s>" in a text stays text, as in training
            clean_up_tokenization_spaces=False,
            model_input_names=_INPUTS,
            model_max_length=seq_len,
        ).save_pretrained(folder)
        if not (why := prove(tokenizer, folder, texts, exported, names_are_tokens=masked)):
            return exported
        for name in set(os.listdir(folder)) - before:
            (folder / name).unlink()
    exported.fast = False
    why = why.partition(", in a text")[0]  # no part of the run's text, as the folder may go to others
    exported.notes.append(
        f"no tokenizer.json is proved to give the same ids ({why}); the SentencePiece model itself is in {SENTENCEPIECE}/"
    )
    tokenizer.save(folder / SENTENCEPIECE)
    return exported


def _backend(tokenizer: SentencePieceTokenizer) -> Backend:
    backend = Backend.from_str(tokenizer.as_bpe_json(space=" "))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def prove(
    tokenizer: Tokenizer, folder: Path, texts: Sequence[str], exported: Exported, names_are_tokens: bool = True
) -> str:
    """Where ids or their text first differ between the tokenizer and AutoTokenizer's, in words; "" for nowhere.

    names_are_tokens: whether AutoTokenizer takes the names of special tokens for them, if it is not told otherwise.
    """
    theirs: Any = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, split_special_tokens=True
    )
    if not names_are_tokens:  # then as it is when nobody asks for anything
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if len(theirs) != tokenizer.vocab_size:
        return f"it has {len(theirs)} tokens, the run's {tokenizer.vocab_size}"
    if theirs.eos_token_id != tokenizer.eos_id:
        return f"its eos_token_id is {theirs.eos_token_id}, the run's {tokenizer.eos_id}"
    n_tokens = n_characters = 0
    added = [f"{token}a {token}{token} b{token}\n" for token in tokenizer.added_tokens]
    for text in [*texts, *ADVERSARIAL, *added]:
        expected = tokenizer.encode(text)
        found = theirs(text, verbose=False, add_special_tokens=not names_are_tokens).input_ids
        if expected.tolist() != found:
            n = min(len(expected), len(found))
            first = next((i for i in range(n) if expected[i] != found[i]), n)
            return (
                f"ids differ from token {first} on, {found[first : first + 4]} instead of "
                f"{expected[first : first + 4].tolist()}, in a text that begins {text[:60]!r}"
            )
        if theirs.decode(found, skip_special_tokens=True) != tokenizer.decode(expected):
            return f"the text of equal ids differs, for a text that begins {text[:60]!r}"
        n_tokens, n_characters = n_tokens + len(found), n_characters + len(text)
    exported.proof = {
        "documents": len(texts), "adversarial": len(ADVERSARIAL), "characters": n_characters, "tokens": n_tokens
    }  # fmt: skip
    return ""


def load_exported(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or of one that write_tokenizer wrote. Raises TokenizerError."""
    own = folder / SENTENCEPIECE
    return load_tokenizer(own if own.is_dir() and not (folder / JSON_FILE).is_file() else folder)


def before_text(tokenizer: Tokenizer) -> list[int]:
    """The ids that a Hugging Face tokenizer's own template puts before every text, such as a Llama's beginning."""
    return tokenizer.before_text() if isinstance(tokenizer, HuggingFaceTokenizer) else []


def windows_of(tokenizer: Tokenizer, texts: Sequence[str], length: int, count: int) -> list[np.ndarray]:
    """At most count windows (length,) of the texts as a run reads them, each text followed by the end of a document."""
    stream = np.concatenate([part for text in texts for part in (tokenizer.encode(text), [tokenizer.eos_id])])
    n = min(count, max(1, len(stream) // length))
    return [window.astype(np.int64) for window in np.split(stream[: n * length], n)]
