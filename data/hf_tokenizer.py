"""Hugging Face fast tokenizers: any folder with a tokenizer.json.

transformers reads the folder, so that the vocabulary is the one it would use; the ids come from the tokenizers library
underneath, without truncation, padding or template, and a special token's name in a text stays text. A saved copy adds
our fields (kind, fingerprint, vocab_size) to tokenizer_config.json and stays a folder that transformers reads.

Whether decode gives the text back is up to the tokenizer (byte-level BPE: yes; WordPiece: no).
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.bulk_encode import Bulk, BulkEncoder, Encoder, Gigatoken, Ids, Unsupported, without_special_tokens
from data.tokenizer_base import (
    CONFIG_FILE,
    TokenizerBase,
    TokenizerError,
    as_json,
    read_config,
    surrogate_error,
)

JSON_FILE = "tokenizer.json"
_KIND = "huggingface"
# what a copy takes along besides the two that it needs
ADDED = "added"  # field of ours in a config: the tokens that it was given
_ALSO = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt")


class HuggingFaceTokenizer(TokenizerBase):
    """A tokenizer.json with the special tokens of its folder's config. Made by load."""

    def __init__(self, folder: Path, fast: Any, eos_token: str, bulk: Bulk) -> None:
        """fast: transformers.PreTrainedTokenizerFast.    eos_token: a token of its vocabulary."""
        self.folder = folder
        self.eos_token = eos_token
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # to the library: to be encoded as text
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # their number, unless the ids have gaps
        self.eos_id = vocab[eos_token]
        self.bos_id = vocab.get(fast.bos_token)
        self.pad_id = vocab.get(fast.pad_token)
        self.cls_id = vocab.get(fast.cls_token, self.bos_id)
        self.mask_id = vocab.get(fast.mask_token)
        unknown = [vocab[fast.unk_token]] if fast.unk_token in vocab else []
        self._unknown_ids = np.array(unknown + _byte_tokens(self._backend, vocab), dtype=np.int32)
        self.special_tokens = sorted(token.content for token in fast.added_tokens_decoder.values() if token.special)
        self.special_ids = frozenset(vocab[token] for token in self.special_tokens)
        self._fast = fast
        self._content = _read_files(folder)
        self.added_tokens = tuple(json.loads(self._content.get(CONFIG_FILE, b"{}")).get(ADDED, ()))
        self.fingerprint = self._fingerprint(fast)
        self._bulk = BulkEncoder(self._encode_all, self._build_bulk, bulk)

    @classmethod
    def load(cls, folder: str | Path, bulk: Bulk = "auto", eos_token: str | None = None) -> "HuggingFaceTokenizer":
        """eos_token: the token that ends a document; None for the one that the folder names.

        Raises TokenizerError when the folder is not one of a fast tokenizer, would run code of its own, names no token
        that ends a document, or is a copy that was changed.
        """
        folder = Path(folder)
        if not (folder / JSON_FILE).is_file():
            raise TokenizerError(
                f"{folder / JSON_FILE} does not exist; only fast tokenizers can be used. transformers can write one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
            )
        config = read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        _refuse_remote_code(folder, config)
        fast = _read(folder)
        tokenizer = cls(folder, fast, _eos_token(folder, fast, eos_token), bulk)
        for key, found in (("fingerprint", tokenizer.fingerprint), ("vocab_size", tokenizer.vocab_size)):
            if config.get("kind") == _KIND and config.get(key) != found:
                raise TokenizerError(
                    f"{folder} has {key} {found}, its {CONFIG_FILE} says {config.get(key)}: it was changed or damaged, "
                    f"or eos_token is another one; restore the folder, or delete {key} there to take it as it is"
                )
        return tokenizer

    def encode(self, text: str) -> Ids:
        try:  # a batch of one: the batch call leaves offsets out, and starts no threads for one text
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise surrogate_error(text, error) from None
            raise
        return np.array(encoding.ids, dtype=np.int32)

    # -- its chat template ---------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)

    def render_chat(self, messages: list[dict[str, str]], asks: bool) -> str:
        """Messages by the folder's own template. asks: with what comes before the next answer. Raises what that raises."""
        text: str = self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return text

    def encode_with_special(self, text: str) -> NDArray[np.int64]:
        """The ids of text, with special tokens where their names stand: for what a template wrote."""
        self._backend.encode_special_tokens = False
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        finally:
            self._backend.encode_special_tokens = True

    def before_text(self) -> list[int]:
        """The ids that the folder's own template puts before a text; encode, and so a run, leaves them out."""
        text = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a").ids
        places = (n for n in range(len(whole)) if whole[n : n + len(text)] == text)
        return list(whole[: next(places, 0)])

    def pieces(self) -> list[str]:
        """The text of each id, with a space where a word begins, or as the model writes it where it has a word_prefix.

        U+FFFD for a part of a character.
        """
        pieces = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        if "ByteLevel" in _types(self._backend, "pre_tokenizer") | _types(self._backend, "decoder"):
            to_byte = {char: byte for byte, char in enumerate(_byte_characters())}
            return [
                bytes(to_byte[char] for char in piece).decode("utf-8", "replace")
                if all(char in to_byte for char in piece)
                else piece
                for piece in pieces
            ]
        return [piece.replace("\u2581", " ") for piece in pieces]

    @property
    def word_prefix(self) -> str | None:
        """What a piece begins with that goes on with a word, "##" of most WordPiece models; None of other models."""
        return getattr(self._backend.model, "continuing_subword_prefix", None) or None

    def grown(self, tokens: Sequence[str], bulk: Bulk = "auto") -> "HuggingFaceTokenizer":
        """This one with more tokens, each found wherever a text has it. Raises TokenizerError for one that is there."""
        self.refuse_known(tokens, self._backend.get_vocab(with_added_tokens=True))
        tree = json.loads(self._content[JSON_FILE])
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tree["added_tokens"] += [
            {"id": i, "content": token, **plain} for i, token in enumerate(tokens, self.vocab_size)
        ]
        config = json.loads(self.files()[CONFIG_FILE]) | {ADDED: [*self.added_tokens, *tokens]}
        for key in ("kind", "fingerprint", "vocab_size"):
            del config[key]  # of the one that it grows from
        files = self._content | {JSON_FILE: as_json(tree), CONFIG_FILE: as_json(config)}
        with tempfile.TemporaryDirectory() as folder:  # transformers reads nothing else
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            found = HuggingFaceTokenizer.load(folder, bulk, self.eos_token)
        found.folder = self.folder
        return found

    def files(self) -> dict[str, bytes]:
        """What save writes, by name."""
        ours = {
            "kind": _KIND,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eos_token": self.eos_token,
        }
        config = json.loads(self._content.get(CONFIG_FILE, b"{}"))
        return self._content | {CONFIG_FILE: as_json(config | ours)}

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def _encode_all(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]  # not in one call, which would start a thread a core

    def _build_bulk(self) -> Encoder:
        if self.added_tokens:
            raise Unsupported("tokens were added to the vocabulary")
        return Gigatoken(without_special_tokens(self._backend.to_str()))

    def _fingerprint(self, fast: Any) -> str:
        """Of tokenizer.json, and of what the config adds to it."""
        settings = {
            "ids": [self.eos_id, self.bos_id, self.pad_id, self.vocab_size],
            "add_prefix_space": fast.init_kwargs.get("add_prefix_space"),
        }
        return xxhash.xxh3_64_hexdigest(self._content[JSON_FILE] + json.dumps(settings).encode())


def _types(backend: Any, part: str) -> set[str]:
    """The types of a part of a tokenizer.json, which may be a sequence of others."""
    tree = json.loads(backend.to_str())[part] or {}
    inner = tree.get("pretokenizers") or tree.get("decoders") or []
    return {tree.get("type"), *(each["type"] for each in inner)}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it shows, else one from U+0100 on."""
    shows = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shows else chr(next(hidden)) for byte in range(256)]


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    model_config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    for name, content in ((CONFIG_FILE, config), ("config.json", model_config)):
        asks = content.get("auto_map")
        if isinstance(asks, list) or (isinstance(asks, dict) and "AutoTokenizer" in asks):
            raise TokenizerError(
                f"{folder / name} demands code of its own for the tokenizer (auto_map), which is never run; if "
                f"{JSON_FILE} alone gives the right ids, take AutoTokenizer out of auto_map in a copy of the folder"
            )


def _read_files(folder: Path) -> dict[str, bytes]:
    """Of a folder, by name: what a copy needs and takes along."""
    return {
        name: (folder / name).read_bytes() for name in (JSON_FILE, CONFIG_FILE, *_ALSO) if (folder / name).is_file()
    }


def _read(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # over a second to import, and most runs need no Hugging Face's

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        raise TokenizerError(
            f"{folder} cannot be read as a Hugging Face tokenizer: {error}; restore the folder"
        ) from error


def _eos_token(folder: Path, fast: Any, asked: str | None) -> str:
    token: str | None = asked or fast.eos_token or fast.sep_token  # a BERT's texts end with [SEP]
    special = [token.content for token in fast.added_tokens_decoder.values() if token.special]
    choice = f"one of its own, such as {', '.join(map(repr, special[:8]))}" if special else "one of its vocabulary"
    if token is None:
        raise TokenizerError(
            f"the tokenizer in {folder} names no token that ends a document; set data.tokenizer.eos_token to {choice}"
        )
    if token not in fast.get_vocab():
        raise TokenizerError(f"data.tokenizer.eos_token={token!r} is no token of {folder}; set it to {choice}")
    return token


def _byte_tokens(backend: Any, vocab: dict[str, int]) -> list[int]:
    """The ids of a byte fallback's 256 tokens. A byte-level model has none: there bytes are what it is made of."""
    if not getattr(backend.model, "byte_fallback", False):
        return []
    return [vocab[name] for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in vocab]
