"""Token shards: the layout byte by byte, a round trip of any documents, and every refusal."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.shards import Shard, ShardError, ShardWriter, token_dtype

# Written by hand from the layout's description, with no help from data.shards. Documents [1, 2, 3], [] and [65535].
HAND_BIN = struct.pack("<4H", 1, 2, 3, 65535)
HAND_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)  # version
    + struct.pack("<B", 8)  # uint16
    + struct.pack("<Q", 3)  # sequences
    + struct.pack("<Q", 4)  # documents and the end
    + struct.pack("<3i", 3, 0, 1)  # lengths in tokens
    + struct.pack("<3q", 0, 6, 6)  # where they begin, in bytes
    + struct.pack("<4q", 0, 1, 2, 3)  # documents
)


def write_pair(folder, idx, bin_=HAND_BIN):
    (folder / "s.idx").write_bytes(idx)
    (folder / "s.bin").write_bytes(bin_)
    return folder / "s"


def patched(offset, fmt, value):
    return HAND_IDX[:offset] + struct.pack(fmt, value) + HAND_IDX[offset + struct.calcsize(fmt) :]


def test_writer_gives_the_layout_byte_by_byte(tmp_path):
    with ShardWriter(tmp_path / "s", np.uint16) as writer:
        for document in ([1, 2, 3], [], [65535]):
            writer.add(np.array(document, dtype=np.int64))
    assert (tmp_path / "s.bin").read_bytes() == HAND_BIN
    assert (tmp_path / "s.idx").read_bytes() == HAND_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_reader_reads_a_pair_written_by_hand(tmp_path):
    shard = Shard(write_pair(tmp_path, HAND_IDX))
    assert (shard.n_tokens, shard.n_documents, shard.dtype) == (4, 3, np.uint16)
    assert shard.read(1, 3).tolist() == [2, 3, 65535]
    assert [shard.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [65535]]
    assert shard.document_at(np.array([0, 2, 3])).tolist() == [0, 0, 2]  # document 1 is empty and holds no token
    assert shard.document_at(3) == 2


def test_reader_reads_documents_of_several_sequences(tmp_path):
    """Megatron-LM's --split-sentences: two documents, of sentences [5, 6], [7] and of [8, 9, 10]."""
    idx = HAND_IDX[:17] + struct.pack("<BQQ", 4, 3, 3) + struct.pack("<3i", 2, 1, 3) + struct.pack("<3q", 0, 8, 12)
    shard = Shard(write_pair(tmp_path, idx + struct.pack("<3q", 0, 2, 3), struct.pack("<6i", 5, 6, 7, 8, 9, 10)))
    assert (shard.n_tokens, shard.n_documents, shard.n_sequences) == (6, 2, 3)
    assert [shard.document(i).tolist() for i in range(2)] == [[5, 6, 7], [8, 9, 10]]
    assert shard.document_at(np.arange(6)).tolist() == [0, 0, 0, 1, 1, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=12),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_any_documents_come_back(tmp_path, documents, dtype):
    with ShardWriter(tmp_path / "s", dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    shard = Shard(tmp_path / "s")
    flat = [token for document in documents for token in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert (shard.n_tokens, shard.n_documents) == (len(flat), len(documents))
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents
    assert shard.read(0, len(flat)).tolist() == flat
    assert shard.document_at(np.arange(len(flat))).tolist() == owners


def test_written_says_what_is_on_disk(tmp_path):
    writer = ShardWriter(tmp_path / "s", np.int32)
    writer.add(np.array([7, 8]))
    written = writer.close()
    assert written[:4] == (2, 1, (tmp_path / "s.bin").stat().st_size, (tmp_path / "s.idx").stat().st_size)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, np.uint16), (65536, np.uint16), (65537, np.int32), (2**31, np.int32)]
)
def test_token_dtype(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("vocab_size", [0, 2**31 + 1])
def test_token_dtype_refuses(vocab_size):
    with pytest.raises(ShardError, match=f"vocab_size={vocab_size}; expected 1 to"):
        token_dtype(vocab_size)


def test_an_error_leaves_nothing_behind(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "s", np.uint16) as writer:
            writer.add(np.array([1]))
            assert [path.name for path in tmp_path.iterdir()] == ["s.bin.tmp"]
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.array([[1, 2]]), "1-D array of integers, not int64 of shape"),
        (np.array([1.0]), "not float64"),
        (np.array([1, 65536]), "ids from 1 to 65536 do not fit uint16"),
        (np.array([-1]), "ids from -1 to -1 do not fit"),
        (np.broadcast_to(np.int64(1), 2**31), "2147483648 tokens exceeds"),
    ],
)
def test_writer_refuses(tmp_path, ids, match):
    with pytest.raises(ShardError, match=match), ShardWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(ids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
def test_writer_refuses_a_dtype_that_holds_no_tokens(tmp_path, dtype):
    with pytest.raises(ShardError, match=f"dtype {np.dtype(dtype)} cannot hold tokens"):
        ShardWriter(tmp_path / "s", dtype)


@pytest.mark.parametrize(
    ("idx", "match"),
    [
        (b"TNTIDX\x00\x00\x00" + HAND_IDX[9:], "begins with b'TNTIDX.*it is not an index"),
        (b"", "it is not an index"),
        (HAND_IDX[:20], "is cut off: 20 bytes, the header alone has 34"),
        (patched(9, "<Q", 2), "version 2; only version 1"),
        (patched(17, "<B", 9), "dtype code 9; known are"),
        (patched(17, "<B", 7), "holds float32; tokens are integers"),
        (HAND_IDX[:-1], "is cut off: 101 bytes, expected 102 for 3 sequences and 3 documents"),
        (HAND_IDX + bytes(3), "too long .*105 bytes, expected 102"),
        (patched(26, "<Q", 0)[:-32], "document count 0"),
        (patched(70, "<q", 1), "documents run from sequence 1 to 3, expected 0 to 3"),
        (patched(94, "<q", 2), "documents run from sequence 0 to 2, expected 0 to 3"),
        (patched(46, "<q", 2), "first sequence is at byte 2, expected 0"),
        (patched(17, "<B", 4), "s.bin has 8 bytes, its index says 10"),
    ],
)
def test_reader_refuses_a_wrong_index(tmp_path, idx, match):
    with pytest.raises(ShardError, match=match):
        Shard(write_pair(tmp_path, idx))


@pytest.mark.parametrize("bin_", [HAND_BIN[:-1], HAND_BIN + b"\0\0", b""])
def test_reader_refuses_a_bin_of_another_size(tmp_path, bin_):
    with pytest.raises(ShardError, match=rf"s.bin has {len(bin_)} bytes, its index says 8"):
        Shard(write_pair(tmp_path, HAND_IDX, bin_))


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_reader_refuses_half_a_pair(tmp_path, ending):
    write_pair(tmp_path, HAND_IDX)
    (tmp_path / f"s.{ending}").unlink()
    with pytest.raises(ShardError, match=rf"s\.{ending} does not exist; a shard is the pair"):
        Shard(tmp_path / "s")


def test_reader_refuses_places_outside(tmp_path):
    shard = Shard(write_pair(tmp_path, HAND_IDX))
    for start, count in ((0, 5), (-1, 2), (2, -1)):
        with pytest.raises(ShardError, match=f"tokens {start} to .*which has 4"):
            shard.read(start, count)
    for i in (-1, 3):
        with pytest.raises(ShardError, match=f"document {i} asked of .*which has 3"):
            shard.document(i)
    for position in (-1, 4):
        with pytest.raises(ShardError, match=f"token positions {position} to {position} .*which has 4"):
            shard.document_at(position)
