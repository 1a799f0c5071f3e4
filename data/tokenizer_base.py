"""What every tokenizer offers, whatever library made it."""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.bulk_encode import BulkEncoder, Ids
from data.errors import DataError

CONFIG_FILE = "tokenizer_config.json"


class TokenizerError(DataError):
    """A tokenizer that cannot be trained or loaded, or a text that has no UTF-8 form."""


class TokenizerBase(ABC):
    """Text to ids and back. A subclass sets what is declared here and its bulk encoder."""

    folder: Path
    fingerprint: str  # 16 hexadecimal digits: of all that the ids depend on
    vocab_size: int  # ids are in range(vocab_size)
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    cls_id: int | None  # what stands before the text of a row of a masked model, [CLS]
    mask_id: int | None  # what stands in the place of a hidden token, [MASK]
    added_tokens: tuple[str, ...] = ()  # that it was given after it was made; the last ids
    _bulk: BulkEncoder
    _unknown_ids: NDArray[np.int32]

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of text, (n,); no control token is added, and text that looks like one ("</s>") stays text.

        Raises TokenizerError for a lone surrogate, which UTF-8 cannot hold.
        """

    def save(self, folder: str | Path) -> None:
        """Write this tokenizer to a new folder."""
        write_folder(Path(folder), self.files())

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What save writes, by name."""

    def refuse_known(self, tokens: Sequence[str], known: Mapping[str, int]) -> None:
        """Raise TokenizerError for the first of `tokens` that is one of `known` already."""
        if twice := next((token for token in tokens if token in known), None):
            raise TokenizerError(
                f"data.tokenizer.add_tokens: {twice!r} is a token of {self.folder} already, id {known[twice]}; leave it out"
            )

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @property
    def sep_id(self) -> int:
        """What stands after a text of a masked model, [SEP]: as in a corpus, what ends a document."""
        return self.eos_id

    @property
    def bulk(self) -> str:
        """What encode_batch uses, for a log line: "gigatoken 0.10.0", or "the reference: ..." with the reason."""
        return self._bulk.describe()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """encode for each text, by a faster library where there is one that gives the same ids (data/bulk_encode.py).

        Raises what encode raises, and BulkEncodeError when ids that were proved equal differ later.
        """
        return self._bulk.encode(texts)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of ids; control tokens have none. Raises TokenizerError for an id outside range(vocab_size)."""
        array = np.asarray(ids)
        if not array.size:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenizerError(f"ids are {array.dtype} of shape {array.shape}; expected one dimension of integers")
        if not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise TokenizerError(f"ids from {array.min()} to {array.max()}; expected ids in range({self.vocab_size})")
        return self._decode(array.tolist())

    def unknowns(self, ids: Sequence[int] | NDArray[np.integer]) -> int:
        """How many of ids stand for what the vocabulary lacks: single bytes of a fallback, or the unknown token."""
        return int(np.isin(np.asarray(ids, dtype=np.int32), self._unknown_ids).sum())


def surrogate_error(text: str, error: UnicodeEncodeError, begin: int = 0) -> TokenizerError:
    """What to raise for a text without a UTF-8 form. begin: characters of the document before text."""
    return TokenizerError(
        f"character {begin + error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, not"
        " UTF-8; repair the text, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16')"
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TokenizerError when it is none."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path} is damaged ({error!r}); restore the folder or train again") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is damaged (it holds no JSON object); restore the folder or train again")
    return config


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files under a staging name, on disk, then renamed: the folder is whole or absent."""
    staging = folder.with_name(folder.name + ".tmp")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    for name, content in files.items():
        with open(staging / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    os.rename(staging, folder)
