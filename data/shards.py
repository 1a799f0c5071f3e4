"""Token shards in the .bin/.idx layout that Megatron-LM's preprocessing writes (MMIDIDX), read and written.

PREFIX.bin   the tokens of all documents, one after the other, nothing else
PREFIX.idx   little-endian: magic (9 bytes), version uint64 = 1, dtype code uint8, S sequence count uint64, D + 1
             document count uint64; then lengths in tokens int32 (S), byte pointers into the .bin int64 (S), and the
             first sequence of each document int64 (D + 1: starts at 0, ends with S).

Megatron-LM may split a document into several sequences (sentences); we write one sequence a document and read both.
"""

import os
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequence count, document count
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
LOOK_EVERY_S = 1.0  # between looks whether a mapped file was changed
MAX_DOCUMENT_TOKENS = 2**31 - 1  # a length is an int32

_LENGTH, _POINTER = np.dtype("<i4"), np.dtype("<i8")


class ShardError(DataError):
    """A shard that cannot be what its index says, or a document that the layout cannot hold."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (vocab_size <= 65536), else int32, as Megatron-LM's readers expect.

    Megatron-LM itself changes over at 65500; it reads the type from the index, so that both are read by both.
    """
    if not 1 <= vocab_size <= 2**31:
        raise ShardError(f"vocab_size={vocab_size}; expected 1 to 2**31, what an int32 token can name")
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class WrittenShard(NamedTuple):
    """What a closed ShardWriter left on disk; hashes are xxh3-64 in hexadecimal."""

    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str


class ShardWriter:
    """Writes PREFIX.bin and PREFIX.idx, document by document, under .tmp names until close().

    As a context manager it closes on success and removes the partial files on an error. The tokens go straight to disk;
    12 bytes a document are held for the index.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        codes = {name: code for code, name in DTYPE_CODES.items()}
        if self._dtype.kind not in "iu" or self._dtype.name not in codes:
            raise ShardError(f"dtype {np.dtype(dtype)} cannot hold tokens in this layout; use token_dtype(vocab_size)")
        self._code = codes[self._dtype.name]
        self._limits = np.iinfo(self._dtype)
        self._lengths = bytearray()  # int32 a document
        self._pointers = bytearray()  # int64 a document
        self._documents = 0
        self._bin_bytes = 0
        self._bin_hash = xxhash.xxh3_64()
        self._tmp_bin, self._tmp_idx = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
        self._bin = open(self._tmp_bin, "wb")  # noqa: SIM115 - open until close() or discard()

    def add(self, ids: np.ndarray) -> None:
        """Append one document; ids: 1-D integers that fit the shard's dtype. Raises ShardError otherwise."""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ShardError(f"a document must be a 1-D array of integers, not {ids.dtype} of shape {ids.shape}")
        if ids.size > MAX_DOCUMENT_TOKENS:
            raise ShardError(
                f"a document of {ids.size} tokens exceeds 2**31 - 1, the layout's limit; split the document"
            )
        if ids.size and not self._limits.min <= int(ids.min()) <= int(ids.max()) <= self._limits.max:
            raise ShardError(
                f"ids from {ids.min()} to {ids.max()} do not fit {self._dtype.name} of {self._prefix}; "
                "use token_dtype(vocab_size)"
            )
        payload = ids.astype(self._dtype).tobytes()
        self._bin.write(payload)
        self._bin_hash.update(payload)
        self._lengths += struct.pack("<i", ids.size)
        self._pointers += struct.pack("<q", self._bin_bytes)
        self._bin_bytes += len(payload)
        self._documents += 1

    def close(self) -> WrittenShard:
        """Write the index, fsync both files, give them their names; the .idx last, so that it proves a whole pair."""
        header = HEADER.pack(MAGIC, VERSION, self._code, self._documents, self._documents + 1)
        index = b"".join(
            [header, self._lengths, self._pointers, np.arange(self._documents + 1, dtype=_POINTER).tobytes()]
        )
        with open(self._tmp_idx, "wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        os.replace(self._tmp_bin, bin_path(self._prefix))
        os.replace(self._tmp_idx, idx_path(self._prefix))
        return WrittenShard(
            tokens=self._bin_bytes // self._dtype.itemsize,
            documents=self._documents,
            bin_bytes=self._bin_bytes,
            idx_bytes=len(index),
            bin_xxh3=self._bin_hash.hexdigest(),
            idx_xxh3=xxhash.xxh3_64_hexdigest(index),
        )

    def discard(self) -> None:
        """Remove what was written so far."""
        self._bin.close()
        self._tmp_bin.unlink(missing_ok=True)
        self._tmp_idx.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif not self._bin.closed:
            self.close()


class Shard:
    """One .bin/.idx pair, mapped into memory: opening reads the header and the last entries of the index, no tokens.

    Raises ShardError for a missing file, a wrong magic, version or dtype, an index of the wrong length, and a .bin
    whose size is not what the index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        path = idx_path(prefix)
        for file in (path, bin_path(prefix)):
            if not file.is_file():
                raise ShardError(f"{file} does not exist; a shard is the pair {self.prefix.name}.bin and .idx")
        state = self._stat()
        (bin_bytes, _), (idx_bytes, _) = state
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise ShardError(
                f"{path} begins with {header[:9]!r}, not {MAGIC!r}; it is not an index in Megatron-LM's MMIDIDX layout"
            )
        if len(header) < HEADER.size:
            raise ShardError(f"{path} is cut off: {idx_bytes} bytes, the header alone has {HEADER.size}; copy it again")
        _, version, code, self.n_sequences, document_count = HEADER.unpack(header)
        if version != VERSION:
            raise ShardError(f"{path} has version {version}; only version {VERSION} of MMIDIDX is known")
        if code not in DTYPE_CODES:
            raise ShardError(f"{path} has dtype code {code}; known are {DTYPE_CODES}")
        self.dtype = np.dtype(DTYPE_CODES[code]).newbyteorder("<")
        if self.dtype.kind not in "iu":
            raise ShardError(f"{path} holds {self.dtype.name}; tokens are integers, so this is another kind of data")
        self.n_documents = document_count - 1
        expected = HEADER.size + self.n_sequences * (_LENGTH.itemsize + _POINTER.itemsize) + document_count * 8
        if idx_bytes != expected:
            what = "is cut off" if idx_bytes < expected else "is too long (multimodal indices are not supported)"
            raise ShardError(
                f"{path} {what}: {idx_bytes} bytes, expected {expected} for {self.n_sequences} sequences and "
                f"{self.n_documents} documents; copy or prepare it again"
            )
        if document_count < 1:
            raise ShardError(f"{path} has document count 0; expected at least 1, the entry that ends the last document")
        self._state, self._looked = state, time.monotonic()
        # plain arrays over the maps: np.memmap's own slices take ten times as long
        self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        lengths_at = HEADER.size
        pointers_at = lengths_at + self.n_sequences * _LENGTH.itemsize
        documents_at = pointers_at + self.n_sequences * _POINTER.itemsize
        self._lengths = self._bytes[lengths_at:pointers_at].view(_LENGTH)
        self._pointers = self._bytes[pointers_at:documents_at].view(_POINTER)
        self._documents = self._bytes[documents_at:].view(_POINTER)
        tokens_end = self._check_ends(path)
        if bin_bytes != tokens_end:
            raise ShardError(
                f"{bin_path(prefix)} has {bin_bytes} bytes, its index says {tokens_end}; the two do not belong "
                "together or one is cut off: copy or prepare both again"
            )
        self.n_tokens = bin_bytes // self.dtype.itemsize
        # an empty file cannot be mapped
        self._tokens: np.ndarray = (
            np.asarray(np.memmap(bin_path(prefix), dtype=self.dtype, mode="r"))
            if bin_bytes
            else np.empty(0, self.dtype)
        )

    @property
    def changed_ns(self) -> int:
        """When .bin or .idx was last written, ns since 1970."""
        return max(changed_ns for _, changed_ns in self._state)

    def check_unchanged(self) -> None:
        """Raise ShardError when a file is not what was mapped; looks once in LOOK_EVERY_S. One that is gone still reads.

        What a map shows of a file that was rewritten is the new content, and of one that was cut a SIGBUS.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            found = self._stat()
        except FileNotFoundError:
            return  # removed or renamed: the map keeps the content
        if found != self._state:
            raise ShardError(
                f"{self.prefix}.bin or .idx was changed while it is read: (bytes, time of change in ns) were "
                f"{self._state}, are {found}. Nothing may write to a corpus in use: restore the shard (launcher/prepare.py "
                "makes a deleted one again), and go on from the last checkpoint"
            )

    def _stat(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(bytes, time of the last change in ns) of .bin and .idx."""
        found = [os.stat(f"{self.prefix}{suffix}") for suffix in (".bin", ".idx")]
        return (found[0].st_size, found[0].st_mtime_ns), (found[1].st_size, found[1].st_mtime_ns)

    def _check_ends(self, path: Path) -> int:
        """First and last entries of the index against each other, O(1). Returns the size that the .bin must have."""
        first, last = int(self._documents[0]), int(self._documents[-1])
        if first != 0 or last != self.n_sequences:
            raise ShardError(
                f"{path}: documents run from sequence {first} to {last}, expected 0 to {self.n_sequences}; "
                "it is damaged"
            )
        if self.n_sequences == 0:
            return 0
        if int(self._pointers[0]) != 0:
            raise ShardError(
                f"{path}: the first sequence is at byte {int(self._pointers[0])}, expected 0; it is damaged"
            )
        return int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count of the shard, (count,) in the shard's dtype; a view of the mapped file.

        Raises ShardError outside the shard.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise ShardError(f"tokens {start} to {start + count} asked of {self.prefix}, which has {self.n_tokens}")
        return self._tokens[start : start + count]

    def read_rows(
        self, starts: NDArray[np.int64], count: int, out: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Tokens start to start + count for each of starts (n,), to the rows of out (m, count) at places (n,).

        Raises ShardError outside the shard.
        """
        if starts.size and not 0 <= int(starts.min()) <= int(starts.max()) <= self.n_tokens - count:
            raise ShardError(
                f"tokens {starts.min()} to {starts.max() + count} asked of {self.prefix}, which has {self.n_tokens}"
            )
        size = self.dtype.itemsize
        every: np.ndarray = np.ndarray(
            (self.n_tokens - count + 1, count), self.dtype, self._tokens, strides=(size, size)
        )
        out[places] = every[
            starts
        ]  # a row for each token that could be the first: nothing is copied but those asked for

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, all its sequences joined; raises ShardError outside range(n_documents)."""
        if not 0 <= i < self.n_documents:
            raise ShardError(f"document {i} asked of {self.prefix}, which has {self.n_documents}")
        start, end = self.token_span(i)
        return self.read(start, end - start)

    def token_span(self, i: int) -> tuple[int, int]:
        """(first token, one past the last) of document i."""
        start, end = (self._token_at(int(self._documents[j])) for j in (i, i + 1))
        return start, end

    def document_numbers(self, start: int, count: int) -> NDArray[np.int64]:
        """The document that holds each of the tokens start to start + count: (count,). Raises as document_at."""
        first, last = (self.document_at(position) for position in (start, start + count - 1))
        assert isinstance(first, int)
        assert isinstance(last, int)
        starts = np.array([self.token_span(document)[0] for document in range(first + 1, last + 1)], dtype=np.int64)
        # as many documents further as have begun; an empty one begins where the next does and is passed over
        return first + np.searchsorted(starts, np.arange(start, start + count), side="right")

    def lengths(self, first: int, stop: int) -> NDArray[np.int64]:
        """Tokens of documents first to stop, (n,); fewer where the shard ends before."""
        sequences = self._documents[first : stop + 1]
        low, high = int(sequences[0]), int(sequences[-1])
        starts = self._pointers[low : high + 1] // self.dtype.itemsize  # one too few at the shard's end
        if high == self.n_sequences:
            starts = np.append(starts, self.n_tokens)
        return np.diff(starts[sequences - low])

    def _token_at(self, sequence: int) -> int:
        if sequence == self.n_sequences:
            return self.n_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_at(self, token_position: ArrayLike | int) -> np.ndarray | int:
        """The document that holds the token at each position; int for an int, else int64 of the same shape.

        Raises ShardError for a position outside range(n_tokens).
        """
        positions = np.asarray(token_position, dtype=np.int64)
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.n_tokens:
            raise ShardError(
                f"token positions {positions.min()} to {positions.max()} asked of {self.prefix}, "
                f"which has {self.n_tokens}"
            )
        sequences = _last_not_above(self._pointers, positions * self.dtype.itemsize)
        documents = _last_not_above(self._documents, sequences)
        return int(documents) if isinstance(token_position, int) else documents


def _last_not_above(ascending: np.ndarray, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """searchsorted(ascending, values, side="right") - 1 for ascending[0] <= values, in O(log n) reads a value.

    The index lies at odd addresses (its header has 34 bytes), and np.searchsorted copies an unaligned array whole.
    Of equal entries it takes the last: an empty sequence begins where the next one does and holds no token.
    """
    low = np.zeros(values.shape, dtype=np.int64)
    high = np.full(values.shape, len(ascending), dtype=np.int64)  # ascending[low] <= value < ascending[high]
    while (open_ := high - low > 1).any():
        middle = np.where(open_, (low + high) // 2, low)
        below = ascending[middle] <= values
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low
