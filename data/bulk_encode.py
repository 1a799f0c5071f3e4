"""Bulk encoding with a faster library, gigatoken, behind a proof that its ids are the tokenizer's own.

The proof. In every process (for every BulkEncoder), the first 2**17 characters of the documents are encoded by the
reference too and compared before any ids are given out; where one id differs, the reference encodes from then on, and a
log line says where. After that an excerpt of 1,024 characters of every batch is compared, the document and the place in
it another one each time; a difference there is an error, as the documents before it may have wrong ids on disk by then.

One thread: prepare runs a process a core. Batches of about 1 MB are best: a call costs some 0.1 ms whatever its size.
"""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

log = logging.getLogger(__name__)

Bulk = Literal["auto", "reference"]
Ids = NDArray[np.int32]

INSTALL = "pip install 'longhaul[fast]'"
_PROOF_CHARS = 2**17
_EXCERPT_CHARS = 1024
_STRIDE = 1_000_003  # from one excerpt's place to the next one's: a prime, so that no length of text divides it
_RENEW_BYTES = 2**27  # the library keeps each new word for good: some 4 bytes a byte of Chinese, 2 of Python source


class BulkEncodeError(DataError):
    """The faster library gave other ids than the reference after it was proved to give the same."""


class Unsupported(Exception):
    """Why the faster library cannot encode for a tokenizer. Never reaches the user: the reference does the work."""


class Encoder(Protocol):
    """Ids of whole texts. A fast one raises UnicodeEncodeError for a text that UTF-8 cannot hold."""

    def __call__(self, texts: Sequence[str], /) -> list[Ids]: ...


class BulkEncoder:
    """Encodes batches the fastest way whose ids are the reference's."""

    def __init__(self, reference: Encoder, build: Callable[[], Encoder], bulk: Bulk) -> None:
        """reference: raises what is right for a bad text.    build: makes the fast encoder, or raises Unsupported."""
        self._reference = reference
        self._build = build
        self._fast: Encoder | None = None
        self._why_not = "data.tokenizer.bulk=reference asks for it" if bulk == "reference" else ""
        self._unproved = _PROOF_CHARS  # characters still to compare before ids are given out
        self._n_batches = 0

    def describe(self) -> str:
        self._start()
        return f"the reference: {self._why_not}" if self._why_not else f"gigatoken {_version()}"

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The reference's ids of each text, (n,) int32; the arrays may share memory."""
        self._start()
        if self._fast is None or not texts:
            return self._reference(texts)
        try:
            if self._unproved:
                self._prove(texts)
            else:
                self._compare(self._excerpt(texts))
            if not self._why_not:
                return self._fast(texts)
        except UnicodeEncodeError:
            pass  # the reference finds the text and says what is wrong with it
        return self._reference(texts)

    def _start(self) -> None:
        """Make the fast encoder when it is first needed: it imports the library."""
        if self._fast is None and not self._why_not:
            try:
                self._fast = self._build()
            except Unsupported as reason:
                self._fall_back(str(reason), logging.INFO)

    def _fall_back(self, reason: str, level: int) -> None:
        self._fast, self._why_not = None, reason
        log.log(level, "bulk encoding by the reference tokenizer, not by gigatoken: %s", reason)

    def _prove(self, texts: Sequence[str]) -> None:
        excerpts = []
        for text in texts:
            excerpts.append(text[: self._unproved])
            self._unproved -= len(excerpts[-1])
            if not self._unproved:
                break
        if difference := self._difference(excerpts):
            self._fall_back(difference, logging.WARNING)

    def _excerpt(self, texts: Sequence[str]) -> str:
        place = self._n_batches * _STRIDE
        self._n_batches += 1
        text = texts[place % len(texts)]
        start = place % max(len(text) - _EXCERPT_CHARS + 1, 1)
        return text[start : start + _EXCERPT_CHARS]

    def _compare(self, excerpt: str) -> None:
        if difference := self._difference([excerpt]):
            raise BulkEncodeError(
                f"gigatoken gave other ids than the reference tokenizer after {_PROOF_CHARS} equal characters: "
                f"{difference}. Set data.tokenizer.bulk=reference, delete what was prepared and prepare it again"
            )

    def _difference(self, texts: list[str]) -> str:
        """Where the fast encoder's ids of texts first differ from the reference's, in words; "" for nowhere."""
        assert self._fast is not None
        for text, expected, found in zip(texts, self._reference(texts), self._fast(texts), strict=True):
            if not np.array_equal(expected, found):
                n = min(len(expected), len(found))
                first = next((i for i in range(n) if expected[i] != found[i]), n)
                return (
                    f"ids differ from token {first} on, {found[first : first + 4].tolist()} instead of "
                    f"{expected[first : first + 4].tolist()}, in a text that begins {text[:60]!r}"
                )
        return ""


class Gigatoken:
    """The library with one tokenizer, on one thread. Made anew now and then, so that its memory stays bounded."""

    def __init__(self, tokenizer_json: str) -> None:
        """tokenizer_json: a Hugging Face tokenizer. Raises Unsupported where the library is missing or refuses it."""
        try:
            import gigatoken
        except ImportError as error:
            raise Unsupported(f"it cannot be imported ({error}); {INSTALL}") from None
        self._make = lambda: gigatoken.Tokenizer.from_json(tokenizer_json)
        try:
            self._tokenizer: Any = self._make()
        except Exception as error:  # a plain RuntimeError or ValueError for whatever it does not know
            raise Unsupported(f"it does not support this tokenizer ({_first_line(error)})") from None
        self._n_bytes = 0

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        payloads = [text.encode("utf-8") for text in texts]
        self._n_bytes += sum(map(len, payloads))
        if self._n_bytes > _RENEW_BYTES:
            self._tokenizer, self._n_bytes = self._make(), 0
        rows = self._tokenizer.encode_batch(payloads, parallel=False).layout
        offsets, ids = rows.offsets.data.tolist(), rows.content.data.view(np.int32)
        return [ids[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]


def without_special_tokens(tokenizer_json: str) -> str:
    """The tokenizer without the tokens that a text must not be able to write, so that "<|endoftext|>" stays text."""
    tree = json.loads(tokenizer_json)
    tree["added_tokens"] = [token for token in tree.get("added_tokens") or [] if not token["special"]]
    tree["post_processor"] = tree["truncation"] = tree["padding"] = None
    return json.dumps(tree, ensure_ascii=False)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _version() -> str:
    from importlib.metadata import version

    return version("gigatoken")
