"""Tokenizers: the folder's kind decides which library reads it; SentencePiece's are trained here and lose nothing.

A SentencePiece folder holds tokenizer.model (SentencePiece's own file) and tokenizer_config.json (ours: kind,
vocab_size, fingerprint, how it was trained). decode(encode(text)) == text for every text that UTF-8 can hold: no
normalisation, no prefix space, no space removed; what the vocabulary lacks is written as bytes. Newlines are ordinary
characters, so that pieces such as ":\\n" are learned: on Python source and 8192 pieces this gives 7 % more bytes a token
than a newline symbol, and pieces that may mix scripts another 12 %.
"""

import heapq
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import sentencepiece
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from data.bulk_encode import Bulk, BulkEncoder, Encoder, Gigatoken, Ids, Unsupported
from data.hf_tokenizer import ADDED, JSON_FILE, HuggingFaceTokenizer
from data.tokenizer_base import (
    CONFIG_FILE,
    TokenizerBase,
    TokenizerError,
    as_json,
    read_config,
    surrogate_error,
    write_folder,
)

__all__ = [
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "load_tokenizer",
    "train",
]

MODEL_FILE = "tokenizer.model"

_SPACE_MARK = "\u2581"  # SentencePiece's stand-in for a space; in a text of its own it must go through its bytes
_RESERVED = re.compile("[\u2581\u2585]")  # training text with U+2585 is left out, U+2581 is taken for a space
_ENCODE_CHARS = 2**20  # longer runs are encoded in stretches, some 200 bytes of memory a character
_TRAIN_THREADS = 4  # fixed: unigram's sums, so its pieces, depend on it; the model file records it


class TokenizerConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which tokenizer a corpus is prepared with: one trained on the corpus, or an existing one."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"  # huggingface: a folder with tokenizer.json; path
    model_type: Literal["bpe", "unigram", "char"] = "bpe"  # of SentencePiece
    # exactly this many ids: with 256 bytes and 3 control tokens, or with the added tokens of Hugging Face's
    vocab_size: Annotated[int, Field(ge=260, le=2**20)] = 8192
    # UTF-8 bytes of text to train on at most, drawn evenly; unigram needs some 6 s and BPE 0.3 s a MiB
    train_bytes: Annotated[int, Field(ge=2**16)] = 16 * 2**20
    # share of the training text's characters that get a piece of their own; the rarer ones are written as bytes
    character_coverage: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9995
    split_digits: bool = True  # every digit a token of its own
    path: str | None = None  # folder of an existing tokenizer to use; nothing is trained then
    eos_token: str | None = None  # huggingface: the token that ends a document, where its own config names none
    mask_token: str | None = None  # to train SentencePiece with, for masked models: a token that no text has, "[MASK]"
    # tokens that the one at path gets besides, each found wherever a text has it, such as <tool>; vocab_size counts them
    add_tokens: list[Annotated[str, Field(min_length=1)]] | None = None
    bulk: Bulk = "auto"  # auto: encode with gigatoken where its ids are proved equal; reference: never

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "huggingface" and self.path is None:
            raise ValueError("kind huggingface needs path, the folder with its tokenizer.json; nothing is trained")
        if self.add_tokens and self.path is None:
            raise ValueError(f"add_tokens={self.add_tokens} is for an existing tokenizer, path; one is trained here")
        added = self.add_tokens or []
        wrong = [token for token in added if token != token.strip() or _SPACE_MARK in token or added.count(token) > 1]
        if wrong:
            raise ValueError(
                f"add_tokens has {wrong[0]!r}; expected each token once, without spaces around it and without U+2581"
            )
        if self.kind != "huggingface" and self.eos_token is not None:
            raise ValueError(f"eos_token={self.eos_token!r} is for kind huggingface; a SentencePiece model has </s>")
        if self.mask_token is not None and self.path is not None:
            raise ValueError(
                f"mask_token={self.mask_token!r} is to train a tokenizer with, and path={self.path} has one already: leave "
                "it out; whether that one has a token for masks is in its own files"
            )
        if self.mask_token is not None and not re.fullmatch(r"\S{3,}", self.mask_token):
            raise ValueError(
                f"mask_token={self.mask_token!r}; expected three characters or more, without spaces, as [MASK]"
            )
        return self


class Tokenizer(Protocol):
    """What a tokenizer of either kind offers; data/tokenizer_base.py says what each part does."""

    folder: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    cls_id: int | None
    mask_id: int | None
    added_tokens: tuple[str, ...]

    @property
    def sep_id(self) -> int: ...
    @property
    def bulk(self) -> str: ...
    def encode(self, text: str) -> Ids: ...
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...
    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str: ...
    def unknowns(self, ids: Sequence[int] | NDArray[np.integer]) -> int: ...
    def save(self, folder: str | Path) -> None: ...
    def grown(self, tokens: Sequence[str], bulk: Bulk = "auto") -> "Tokenizer": ...

    @staticmethod
    def load(folder: str | Path, bulk: Bulk = "auto") -> "Tokenizer":
        """load_tokenizer of a folder that says itself what ends a document."""
        return load_tokenizer(folder, bulk)


def load_tokenizer(folder: str | Path, bulk: Bulk = "auto", eos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a folder: one that train or save wrote, or a plain Hugging Face one with tokenizer.json.

    eos_token: for a Hugging Face folder, the token that ends a document; None for the one that its config names.
    Raises TokenizerError when the folder or a file is missing or broken, or the tokenizer is not the one written.
    """
    folder = Path(folder)
    config = folder / CONFIG_FILE
    kind = read_config(config).get("kind") if config.is_file() else None
    if kind == "huggingface" or (kind is None and (folder / JSON_FILE).is_file()):
        return HuggingFaceTokenizer.load(folder, bulk, eos_token)
    if kind not in (None, "sentencepiece"):
        raise TokenizerError(f"{config} has kind {kind!r}; 'sentencepiece' and 'huggingface' can be loaded")
    if eos_token is not None:
        raise TokenizerError(
            f"data.tokenizer.eos_token={eos_token!r}, but {folder} holds no Hugging Face tokenizer; leave it out"
        )
    return SentencePieceTokenizer.load(folder, bulk)


def open_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """The existing tokenizer that cfg.path names. Raises TokenizerError, also when it is of another kind than said."""
    assert cfg.path is not None, "only called for an existing tokenizer"
    tokenizer = load_tokenizer(cfg.path, cfg.bulk, cfg.eos_token)
    if (kind := "huggingface" if isinstance(tokenizer, HuggingFaceTokenizer) else "sentencepiece") != cfg.kind:
        raise TokenizerError(
            f"data.tokenizer.kind={cfg.kind}, but {cfg.path} holds a {kind} tokenizer; say kind: {kind}"
        )
    return tokenizer.grown(cfg.add_tokens, cfg.bulk) if cfg.add_tokens else tokenizer


class SentencePieceTokenizer(TokenizerBase):
    """A SentencePiece model. Made by load or train."""

    def __init__(self, folder: Path, payload: bytes, config: dict[str, Any], bulk: Bulk) -> None:
        """payload: of tokenizer.model.    config: of tokenizer_config.json."""
        self.folder = folder
        self.model_type = config["training"]["model_type"]
        self.fingerprint = config["fingerprint"]  # xxh3-64 of tokenizer.model
        self.added_tokens = tuple(config.get(ADDED, ()))
        self._payload, self._config = payload, config
        self._processor = processor = _processor(payload)
        self.vocab_size = processor.get_piece_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
        self.cls_id = self.bos_id if self.bos_id >= 0 else None
        mask_token = config["training"].get("mask_token")
        self.mask_id = None if mask_token is None else processor.piece_to_id(mask_token)
        self.unk_id = processor.unk_id()  # never in a text, as what has no piece is written as bytes
        self._unknown_ids = np.array(
            [processor.unk_id(), *(i for i in range(self.vocab_size) if processor.is_byte(i))], dtype=np.int32
        )
        self._space_mark_ids = np.array(
            [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()], dtype=np.int32
        )
        self._bulk = BulkEncoder(self._encode_all, self._build_bulk, bulk)

    @classmethod
    def load(cls, folder: str | Path, bulk: Bulk = "auto") -> "SentencePieceTokenizer":
        """Raises TokenizerError when the folder or a file is missing or broken, or the model is not the one written."""
        folder = Path(folder)
        model, config = folder / MODEL_FILE, folder / CONFIG_FILE
        for file in (model, config):
            if not file.is_file():
                raise TokenizerError(
                    f"{file} does not exist; a tokenizer folder holds {MODEL_FILE} and {CONFIG_FILE}, as "
                    f"launcher/prepare.py writes them to CORPUS/tokenizer, or a Hugging Face tokenizer's {JSON_FILE}"
                )
        recorded = read_config(config)
        try:
            fingerprint, vocab_size = recorded["fingerprint"], recorded["vocab_size"]
            _ = recorded["training"]["model_type"]
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"{config} is damaged ({error!r}); restore the folder or train again") from None
        payload = model.read_bytes()
        if (found := xxhash.xxh3_64_hexdigest(payload)) != fingerprint:
            raise TokenizerError(
                f"{model} has fingerprint {found}, {CONFIG_FILE} says {fingerprint}: it was changed or damaged; "
                "restore the folder or train again"
            )
        tokenizer = cls(folder, payload, recorded, bulk)
        if tokenizer.vocab_size != vocab_size:
            raise TokenizerError(
                f"{model} has {tokenizer.vocab_size} pieces, {CONFIG_FILE} says {vocab_size!r}; restore the folder"
            )
        return tokenizer

    def encode(self, text: str) -> Ids:
        parts = self._cut(text)
        if len(parts) == 1:
            return self._encode_part(text)
        encoded, begin = [], 0
        for part in parts:
            encoded.append(self._encode_part(part, begin))
            begin += len(part)
        return np.concatenate(encoded)

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._payload, CONFIG_FILE: as_json(self._config)}

    def grown(self, tokens: Sequence[str], bulk: Bulk = "auto") -> "SentencePieceTokenizer":
        """This one with more pieces, each found wherever a text has it. Raises TokenizerError for one that is there."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # which loads protobuf

        pieces = [token.replace(" ", _SPACE_MARK) for token in tokens]
        self.refuse_known(pieces, {piece: i for i, piece in enumerate(self.pieces())})
        model = ModelProto.FromString(self._payload)
        for piece in pieces:
            model.pieces.add(piece=piece, score=0.0, type=ModelProto.SentencePiece.USER_DEFINED)
        payload = model.SerializeToString(deterministic=True)
        config = self._config | {
            "vocab_size": self.vocab_size + len(pieces),
            "fingerprint": xxhash.xxh3_64_hexdigest(payload),
            ADDED: [*self.added_tokens, *tokens],
        }
        return SentencePieceTokenizer(self.folder, payload, config, bulk)

    def pieces(self) -> list[str]:
        """The piece of each id, U+2581 for a space."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def as_bpe_json(self, space: str = _SPACE_MARK) -> str:
        """A tokenizer.json of the tokenizers library with the same pieces and merges, for a bpe or a char model.

        space: how its pieces write a space. With U+2581 one in a text would be taken for a space, so it must be kept
        from it; with a space it is a character like any other.
        """
        assert self.model_type in ("bpe", "char"), self.model_type
        return _bpe_as_json(self._processor, space, self.added_tokens)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def _encode_part(self, part: str, begin: int = 0) -> Ids:
        if part == _SPACE_MARK:
            return self._space_mark_ids
        try:
            payload = part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise surrogate_error(part, error, begin) from None
        ids: Ids = self._processor.encode_as_numpy(payload)
        return ids

    def _encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """encode for each text. SentencePiece takes a list of them in one call: 1.4 times as fast for short ones."""

        def encode(parts: Sequence[str]) -> list[Ids]:
            payloads = [part.encode("utf-8") for part in parts]
            ids: list[Ids] = self._processor.encode_as_numpy(payloads, num_threads=1)
            return ids

        try:
            return self._by_parts(texts, encode)
        except UnicodeEncodeError:
            return [self.encode(text) for text in texts]  # which says what is wrong

    def _build_bulk(self) -> Encoder:
        if self.model_type != "bpe":
            raise Unsupported(f"it has no SentencePiece {self.model_type} models")
        if self.added_tokens:
            raise Unsupported("tokens were added to the vocabulary")
        return partial(self._by_parts, encode=Gigatoken(self.as_bpe_json()))

    def _by_parts(self, texts: Sequence[str], encode: Encoder) -> list[Ids]:
        """encode for the parts of the texts, put together again."""
        if all(len(text) <= _ENCODE_CHARS and _SPACE_MARK not in text for text in texts):
            return encode(texts)
        cuts = [self._cut(text) for text in texts]
        encoded = iter(encode([part for parts in cuts for part in parts]))
        ids = []
        for parts in cuts:
            found = islice(encoded, len(parts))
            whole = [self._space_mark_ids if part == _SPACE_MARK else part_ids
                     for part, part_ids in zip(parts, found, strict=True)]  # fmt: skip
            ids.append(whole[0] if len(whole) == 1 else np.concatenate(whole))
        return ids

    @staticmethod
    def _cut(text: str) -> list[str]:
        """The parts of text that are encoded one by one: itself, if it is not too long and has no space mark in it."""
        if len(text) <= _ENCODE_CHARS and _SPACE_MARK not in text:
            return [text]
        parts: list[str] = []
        for number, run in enumerate(text.split(_SPACE_MARK)):
            if number:
                parts.append(_SPACE_MARK)
            parts += [run[start : start + _ENCODE_CHARS] for start in range(0, len(run), _ENCODE_CHARS)]
        return parts


def _bpe_as_json(processor: Any, space: str, added: Sequence[str] = ()) -> str:
    """A SentencePiece BPE model in the form of a Hugging Face tokenizer.json.

    SentencePiece merges the neighbours whose joined piece has the highest score, the leftmost of equal ones; in the
    other form each pair of parts has a rank of its own. So all the ways to part a piece follow one another, and of two
    that can compete for the same middle part ("ab" + "aba" and "aba" + "ba" for "ababa") the leftmost comes first.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    first_added = len(pieces) - len(added)
    normal = {
        piece
        for i, piece in enumerate(pieces[:first_added])
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i))
    }
    ranked = sorted(range(len(pieces)), key=processor.get_score, reverse=True)
    merges = [pair for i in ranked if pieces[i] in normal for pair in _partings(pieces[i], normal)]
    model = {
        "type": "BPE",
        "unk_token": pieces[processor.unk_id()],
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {piece.replace(_SPACE_MARK, space): i for i, piece in enumerate(pieces)},
        "merges": [[part.replace(_SPACE_MARK, space) for part in pair] for pair in merges],
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokens = [{"id": i, "content": token, **plain} for i, token in enumerate(added, first_added)]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": space} if space != " " else None
    return json.dumps({"version": "1.0", "added_tokens": tokens, "normalizer": normalizer, "model": model})


def _partings(piece: str, normal: set[str]) -> list[tuple[str, str]]:
    """The ways to part piece into two of the normal pieces, those first that win over another from the left."""
    n = len(piece)

    def order(cut: int) -> tuple[int, bool]:
        short, long = min(cut, n - cut), max(cut, n - cut)
        short_wins = piece.startswith(piece[short:]) and not piece.startswith(piece[long:])
        return short, (cut == short) != short_wins

    cuts = [cut for cut in range(1, n) if piece[:cut] in normal and piece[cut:] in normal]
    return [(piece[:cut], piece[cut:]) for cut in sorted(cuts, key=order)]


def train(
    texts: Sequence[tuple[Iterable[str], int]], folder: str | Path, cfg: TokenizerConfig
) -> SentencePieceTokenizer:
    """Train on a sample of several streams and write the tokenizer folder. The same texts give the same bytes.

    texts: (stream, bytes): at most so many bytes of a stream, UTF-8, make up its share of the sample. The bytes of all
    add up to cfg.train_bytes. Each stream is read once and never held whole: stretches of some 4,096 characters are
    drawn from all of it with equal chance. A stream with less text than its share gives all of it, and no other more.
    Raises TokenizerError when folder exists, or the texts do not allow for the vocabulary asked for.
    """
    if (total := sum(limit for _, limit in texts)) != cfg.train_bytes:
        raise TokenizerError(
            f"the streams' shares add up to {total} bytes, train_bytes is {cfg.train_bytes}; make them equal"
        )
    folder = Path(folder)
    if folder.exists():
        raise TokenizerError(f"{folder} exists; a tokenizer is never overwritten: delete it or choose another folder")
    sample = [stretch for stream, limit in texts for stretch in _draw(stream, limit)]
    if not sample:
        raise TokenizerError("there is no text to train a tokenizer on; check data.sources")
    payload = _train_model(sample, cfg)
    config = {
        "kind": cfg.kind,
        "vocab_size": cfg.vocab_size,
        "fingerprint": xxhash.xxh3_64_hexdigest(payload),
        "training": {
            **cfg.model_dump(include={"model_type", "train_bytes", "character_coverage", "split_digits"}),
            **({} if cfg.mask_token is None else {"mask_token": cfg.mask_token}),
            "sampled_bytes": sum(len(stretch.encode()) for stretch in sample),
            "sentencepiece": sentencepiece.__version__,
        },
    }
    write_folder(folder, {MODEL_FILE: payload, CONFIG_FILE: as_json(config)})
    return SentencePieceTokenizer.load(folder, cfg.bulk)


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
            control_symbols=[] if cfg.mask_token is None else [cfg.mask_token],
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
    payload = b"".join(collected)
    if (found := _processor(payload).get_piece_size()) != cfg.vocab_size:  # a char model takes what there is, silently
        raise TokenizerError(_explain(f"Vocabulary size too high, <= {found}", cfg))
    return payload


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
