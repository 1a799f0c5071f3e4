"""SentencePiece tokenizers that lose nothing: decode(encode(text)) == text for every text that UTF-8 can hold.

A tokenizer folder holds tokenizer.model (SentencePiece's own file) and tokenizer_config.json (ours: kind, vocab_size,
fingerprint, how it was trained). No normalisation, no prefix space, no space removed; what the vocabulary lacks is
written as bytes. Newlines are ordinary characters, so that pieces such as ":\\n" are learned: on Python source and 8192
pieces this gives 7 % more bytes a token than a newline symbol, and pieces that may mix scripts another 12 %.
"""

import heapq
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import sentencepiece
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data.errors import DataError

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"

_SPACE_MARK = "\u2581"  # SentencePiece's stand-in for a space; in a text of its own it must go through its bytes
_RESERVED = re.compile("[\u2581\u2585]")  # training text with U+2585 is left out, U+2581 is taken for a space
_ENCODE_CHARS = 2**20  # longer runs are encoded in stretches, some 200 bytes of memory a character
_TRAIN_THREADS = 4  # fixed: unigram's sums, so its pieces, depend on it; the model file records it


class TokenizerError(DataError):
    """A tokenizer that cannot be trained or loaded, or a text that has no UTF-8 form."""


class TokenizerConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which tokenizer a corpus is prepared with: one trained on the corpus, or an existing one."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    model_type: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260, le=2**20)] = 8192  # with 256 bytes and 3 control tokens; exactly this many
    # UTF-8 bytes of text to train on at most, drawn evenly; unigram needs some 6 s and BPE 0.3 s a MiB
    train_bytes: Annotated[int, Field(ge=2**16)] = 16 * 2**20
    # share of the training text's characters that get a piece of their own; the rarer ones are written as bytes
    character_coverage: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9995
    split_digits: bool = True  # every digit a token of its own
    path: str | None = None  # folder of an existing tokenizer to use; nothing is trained then


class Tokenizer:
    """Text to ids and back. Made by Tokenizer.load or train."""

    def __init__(self, folder: Path, processor: Any, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint  # xxh3-64 of tokenizer.model, in hexadecimal
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        self.pad_id: int | None = processor.pad_id() if processor.pad_id() >= 0 else None
        self._space_mark_ids = np.array(
            [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()], dtype=np.int32
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Raises TokenizerError when the folder or a file is missing or broken, or the model is not the one written."""
        folder = Path(folder)
        model, config = folder / MODEL_FILE, folder / CONFIG_FILE
        for file in (model, config):
            if not file.is_file():
                raise TokenizerError(
                    f"{file} does not exist; a tokenizer folder holds {MODEL_FILE} and {CONFIG_FILE}, as "
                    "launcher/prepare.py writes them to CORPUS/tokenizer"
                )
        try:
            recorded = json.loads(config.read_bytes())
            kind, fingerprint, vocab_size = recorded["kind"], recorded["fingerprint"], recorded["vocab_size"]
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{config} is damaged ({error!r}); restore the folder or train again") from None
        if kind != "sentencepiece":
            raise TokenizerError(f"{config} has kind {kind!r}; only 'sentencepiece' can be loaded")
        payload = model.read_bytes()
        if (found := xxhash.xxh3_64_hexdigest(payload)) != fingerprint:
            raise TokenizerError(
                f"{model} has fingerprint {found}, {CONFIG_FILE} says {fingerprint}: it was changed or damaged; "
                "restore the folder or train again"
            )
        tokenizer = cls(folder, _processor(payload), fingerprint)
        if tokenizer.vocab_size != vocab_size:
            raise TokenizerError(
                f"{model} has {tokenizer.vocab_size} pieces, {CONFIG_FILE} says {vocab_size!r}; restore the folder"
            )
        return tokenizer

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of text, (n,); no control token is added, and text that looks like one ("</s>") stays text.

        Raises TokenizerError for a lone surrogate, which UTF-8 cannot hold.
        """
        if len(text) <= _ENCODE_CHARS and _SPACE_MARK not in text:
            return self._encode_stretch(text)
        parts: list[NDArray[np.int32]] = []
        begin = 0
        for number, run in enumerate(text.split(_SPACE_MARK)):
            if number:
                parts.append(self._space_mark_ids)
            for start in range(0, len(run), _ENCODE_CHARS):
                parts.append(self._encode_stretch(run[start : start + _ENCODE_CHARS], begin + start))
            begin += len(run) + 1
        return np.concatenate(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """encode for each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of ids; control tokens have none. Raises TokenizerError for an id outside range(vocab_size)."""
        array = np.asarray(ids)
        if not array.size:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenizerError(f"ids are {array.dtype} of shape {array.shape}; expected one dimension of integers")
        if not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise TokenizerError(f"ids from {array.min()} to {array.max()}; expected ids in range({self.vocab_size})")
        text: str = self._processor.decode(array.tolist())
        return text

    def save(self, folder: str | Path) -> None:
        """Copy this tokenizer to a new folder."""
        _write_folder(
            Path(folder), (self.folder / MODEL_FILE).read_bytes(), json.loads((self.folder / CONFIG_FILE).read_bytes())
        )

    def _encode_stretch(self, text: str, begin: int = 0) -> NDArray[np.int32]:
        try:
            payload = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {begin + error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, not"
                " UTF-8; repair the text, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16')"
            ) from None
        ids: NDArray[np.int32] = self._processor.encode_as_numpy(payload)
        return ids


def train(texts: Iterable[str], folder: str | Path, cfg: TokenizerConfig) -> Tokenizer:
    """Train on at most cfg.train_bytes of texts and write the tokenizer folder. The same texts give the same bytes.

    texts is read once and never held whole: stretches of some 4,096 characters are drawn from all of it with equal
    chance.
    Raises TokenizerError when folder exists, or the texts do not allow for the vocabulary asked for.
    """
    folder = Path(folder)
    if folder.exists():
        raise TokenizerError(f"{folder} exists; a tokenizer is never overwritten: delete it or choose another folder")
    sample = _draw(texts, cfg.train_bytes)
    if not sample:
        raise TokenizerError("there is no text to train a tokenizer on; check data.source")
    payload = _train_model(sample, cfg)
    config = {
        "kind": cfg.kind,
        "vocab_size": cfg.vocab_size,
        "fingerprint": xxhash.xxh3_64_hexdigest(payload),
        "training": {
            **cfg.model_dump(exclude={"kind", "vocab_size", "path"}),
            "sampled_bytes": sum(len(stretch.encode()) for stretch in sample),
            "sentencepiece": sentencepiece.__version__,
        },
    }
    _write_folder(folder, payload, config)
    return Tokenizer.load(folder)


def _draw(texts: Iterable[str], limit: int) -> list[str]:
    """Stretches of the texts, limit bytes at most, each with the same chance and in the order that they came in.

    A stretch's lot is a hash of its number, and the lowest lots that fit are kept: one pass, memory for the kept alone.
    """
    kept: list[tuple[int, int, bytes]] = []  # (minus the lot, number, stretch): the highest lot is first to go
    total = 0
    for number, stretch in enumerate(stretch for text in texts for stretch in _stretches(text)):
        payload = stretch.encode("utf-8")
        lot = xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"))
        heapq.heappush(kept, (-lot, number, payload))
        total += len(payload)
        while total > limit:
            total -= len(heapq.heappop(kept)[2])
    return [payload.decode("utf-8") for _, _, payload in sorted(kept, key=lambda entry: entry[1])]


def _stretches(text: str, size: int = 4096) -> Iterator[str]:
    """The text cut after the first newline past size characters, or at twice the size."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + size, start + 2 * size)
        end = newline + 1 if newline >= 0 else start + 2 * size
        yield text[start:end]
        start = end


def _train_model(sample: list[str], cfg: TokenizerConfig) -> bytes:
    collected: list[bytes] = []

    class Sink:
        write = staticmethod(collected.append)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in sample for part in _RESERVED.split(text) if part),
            model_writer=Sink,
            model_type=cfg.model_type,
            vocab_size=cfg.vocab_size,
            character_coverage=cfg.character_coverage,
            split_digits=cfg.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=2**16,  # above any stretch: a longer one would be left out
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=_TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), cfg)) from error
    return b"".join(collected)


def _explain(message: str, cfg: TokenizerConfig) -> str:
    """SentencePiece's two refusals that a config can cause, with the way out; anything else as it came."""
    asked = f"data.tokenizer.vocab_size={cfg.vocab_size}"
    if found := re.search(r"Vocabulary size (?:is )?too high.*?<= (\d+)", message):
        return f"{asked} is more than this text allows; use at most {found[1]}, or more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{asked} is too small for the text's characters; use more than {found[1]}, or lower "
            f"data.tokenizer.character_coverage={cfg.character_coverage}"
        )
    return f"SentencePiece could not train with {cfg}: {message}"


def _processor(payload: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=payload)


def _write_folder(folder: Path, payload: bytes, config: dict[str, Any]) -> None:
    """Both files under a staging name, on disk, then renamed: the folder is whole or absent."""
    staging = folder.with_name(folder.name + ".tmp")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    for name, content in ((MODEL_FILE, payload), (CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())):
        with open(staging / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    os.rename(staging, folder)
