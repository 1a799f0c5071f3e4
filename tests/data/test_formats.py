"""Formats: what is read of each, that cutting changes nothing, and that no damage goes unnamed or costs much memory."""

import gzip
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data import columns, formats
from data import files as files_module
from data.files import LineReader, Long, count_lines
from data.sources import Bad, Document, Limits, Skipped, SourceConfig, SourceError, documents, open_source

POEMS = Path(__file__).parents[3] / "shared" / "data" / "poetry-zh.jsonl.gz"
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def make_source(kind, path, limit=2**20, **fields):
    fields = fields or ({} if kind == "text" else {"field": "text"})
    place = {"path": str(path)} if kind == "dataset" else {"paths": [str(path)]}
    return open_source(
        TypeAdapter(SourceConfig).validate_python({"kind": kind, **place, **fields}), Limits(max_document_bytes=limit)
    )


def read(kind, path, limit=2**20, shard_bytes=10**9, **fields):
    source = make_source(kind, path, limit, **fields)
    return [document for unit in source.units(shard_bytes) for document in documents(unit)]


def read_lines(tmp_path, payload, ending="", **options):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACK[ending](payload))
    return read("jsonl", path, **options)


def texts(found):
    return [document.text for document in found if isinstance(document, Document)]


def only_bad(found):
    bad = [document for document in found if isinstance(document, Bad)]
    assert len(bad) == 1, bad
    return bad[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of lines of 64 bytes, so that small files have many."""
    monkeypatch.setattr(files_module, "CHUNK", 64)
    monkeypatch.setattr(formats, "CHUNK", 64)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACK)
def test_text_is_the_file(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](b"\xef\xbb\xbf" + "two lines\r\nschön, 詩\n".encode()))
    assert read("text", path) == [Document(str(path), "two lines\r\nschön, 詩\n")]
    path.write_bytes(PACK[ending](b"") if ending else b"x")
    if ending:
        assert read("text", path) == [Skipped(str(path), "empty")]


def test_empty_text_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert read("text", tmp_path / "*", 5) == [
        Skipped(f"{tmp_path}/a.txt", "empty"),
        Document(f"{tmp_path}/b.txt", "b"),
    ]


@pytest.mark.parametrize(
    ("payload", "reason", "message"),
    [
        (
            "schön\n".encode() + "schön".encode("latin-1"),
            "utf8",
            r"line 2, byte 10: 0xF6 is not UTF-8 .*iconv -f latin1",
        ),
        (b"cut \xe4\xb8", "utf8", r"line 1, byte 4: 0xE4 is not UTF-8 \(unexpected end of data\)"),
        (b"\xef\xbb\xbfab\xff", "utf8", r"line 1, byte 5: 0xFF"),
        ("text".encode("utf-16"), "utf8", r"line 1, byte 0: 0xFF is not UTF-8 .*iconv -f utf-16"),
        (b"one\ntwo\n\0\0\0", "nul", r"line 3, byte 8: the text has a NUL \(U\+0000\) as its character 8; remove it"),
        (b"\xed\xa0\x80", "utf8", "0xED is not UTF-8"),
        (b"x" * 1025, "too_long", r"the text is longer than 1024 bytes; cut it up or raise data.max_document_bytes"),
    ],
)
@pytest.mark.parametrize("ending", PACK)
@pytest.mark.fault(45)
def test_bad_text(tmp_path, payload, reason, message, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](payload))
    (bad,) = read("text", path, 1024)
    assert (bad.name, bad.reason) == (str(path), reason)
    assert bad.message.startswith(str(path))
    assert re.search(message, bad.message), bad.message


def test_text_of_the_largest_size_is_taken(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1024)
    assert len(texts(read("text", tmp_path / "a.txt", 1024))[0]) == 1024


# -- JSON lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACK)
def test_json_lines(tmp_path, ending):
    found = read_lines(tmp_path, b'{"text": "a"}\n{"x": 1, "text": "\\u8a69 \\ud83d\\ude00"}\n', ending)
    assert texts(found) == ["a", "詩 \U0001f600"]
    at = ["@0", "@14"] if not ending else [":1", ":2"]
    assert [document.name for document in found] == [f"{tmp_path}/a.jsonl{ending}{place}" for place in at]


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        (b'\xef\xbb\xbf{"text": "mark"}\n', ["mark"]),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'\n\n{"text": "a"}\n  \t\n\r\n{"text": "b"}\n\n', ["a", "b"]),
        (b'{"text": "no end"}', ["no end"]),
        (b'{"n": NaN, "m": -Infinity, "text": "a"}\n', ["a"]),
        (b'{"text": "a", "text": "the last counts"}\n', ["the last counts"]),
        (b' {"text": "a"} \n', ["a"]),
    ],
)
def test_what_is_let_pass(tmp_path, payload, wanted):
    found = read_lines(tmp_path, payload)
    assert texts(found) == wanted
    assert len(found) == len(wanted)


def test_fields_and_templates(tmp_path):
    line = b'{"meta": {"title": "T {text}"}, "title": "T", "text": "x", "a.b": "y", "c-d": "z"}\n'
    assert texts(read_lines(tmp_path, line, field="meta.title")) == ["T {text}"]
    assert texts(read_lines(tmp_path, line, template="{{{title}}}\n\n{text}{text} {c-d}")) == ["{T}\n\nxx z"]
    assert read_lines(tmp_path, b'{"text": ""}\n') == [Skipped(f"{tmp_path}/a.jsonl@0", "empty")]


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "cut', "json", "is not JSON: ends in the middle of a JSON value; expected an object a line, got '"),
        (b'{"text": ', "json", "ends in the middle of a JSON value"),
        (b'{"text": "a"} {"text": "b"}', "json", r"Extra data at its character 14"),
        (
            b"{'text': 'a'}",
            "json",
            r"Expecting property name enclosed in double quotes at its character 1; expected an",
        ),
        (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "json", "is not JSON: Exceeds the limit"),
        (b'["a"]', "json", r'is a list; expected an object a line as \{"text": ...\}; repair it or delete it'),
        (b'"a"', "json", "is a string; expected an object"),
        (b"3", "json", "is a number; expected an object"),
        (b"null", "json", "is null; expected an object"),
        (b"true", "json", "is true or false; expected an object"),
        (
            b'{"txt": "a"}',
            "field",
            r"there is no field 'text' \(there is 'txt'\); repair it or delete it, or correct f",
        ),
        (b"{}", "field", r"there is no field 'text' \(there is none at all\)"),
        (b'{"text": null}', "field", "the field 'text' is null; expected a string"),
        (b'{"text": 3}', "field", "the field 'text' is a number; expected a string"),
        (b'{"text": ["a"]}', "field", "the field 'text' is a list; expected a string"),
        (b'{"text": {"a": "b"}}', "field", "the field 'text' is an object; expected a string"),
        (b'{"text": "a\\u0000b"}', "nul", r"the text has a NUL \(U\+0000\) as its character 1; remove it"),
        (b'{"text": "a\0b"}', "nul", "has NUL bytes from its byte 11 on, as a torn write leaves; repair"),
        (b"\0" * 100, "nul", "has NUL bytes from its byte 0 on"),
        (b'{"text": "a\tb"}', "json", "Invalid control character"),
        (b'\xef\xbb\xbf{"text": "a"}', "json", "is not JSON"),
        (b'{"text": "sch\xf6n"}', "utf8", r"0xF6 at byte 30 is not UTF-8 .*convert the file with iconv"),
        (b'{"text": "\xed\xa0\x80"}', "utf8", "0xED at byte 27 is not UTF-8"),
        (b'{"text": "a \\ud800"}', "surrogate", r"\\ud800 is half a character without its other half; repair it"),
        (b'{"text": "\\uDC00\\ud83d"}', "surrogate", r"\\udc00 is half a character"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "too_long", "the line is longer than 4096 bytes; cut it up or raise"),
        (b'{"text": ' + b"[" * 1_000_000, "json", "nested too deep to be read; repair it or delete it"),
        (b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000, "json", "nested too deep to be read"),
    ],
)
@pytest.mark.parametrize("ending", PACK)
@pytest.mark.fault(44, 45)
def test_bad_lines(tmp_path, line, reason, message, ending):
    limit = 4096 if reason == "too_long" else 2**24
    found = read_lines(tmp_path, GOOD + line + b"\n" + GOOD, ending, limit=limit)
    assert texts(found) == ["good", "good"]
    bad = found[1]
    assert bad.reason == reason
    unpacked = "unpacked " if ending else ""
    assert bad.message.startswith(f"{tmp_path}/a.jsonl{ending}, line 2, {unpacked}byte 17: ")
    assert re.search(message, bad.message), bad.message
    assert len(bad.message) < 1000
    assert bad.name == f"{tmp_path}/a.jsonl{ending}" + (":2" if ending else "@17")


@pytest.mark.fault(44)
def test_nested_fields_that_are_missing(tmp_path):
    bad = only_bad(read_lines(tmp_path, b'{"meta": "x"}\n', field="meta.text"))
    assert "there is no field 'meta.text' (there is a string)" in bad.message
    bad = only_bad(read_lines(tmp_path, b'{"meta": {"a": 1}}\n', field="meta.text"))
    assert "there is no field 'meta.text' (there is 'a')" in bad.message


def test_a_template_repeats_no_text_beyond_the_limit(tmp_path):
    bad = only_bad(read_lines(tmp_path, b'{"text": "' + b"x" * 600 + b'"}\n', limit=1024, template="{text}{text}"))
    assert bad.reason == "too_long"


@pytest.mark.fault(44)
def test_line_numbers_of_bad_lines_in_later_units(tmp_path):
    lines = [b'{"text": "good"}\n' if number != 700 else b"bad\n" for number in range(1000)]
    found = read_lines(tmp_path, b"".join(lines), shard_bytes=1500)
    assert f"a.jsonl, line 701, byte {700 * 17}: is not JSON" in only_bad(found).message


def test_lines_are_not_counted_beyond_some_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "COUNTED", 1000)
    monkeypatch.setattr(formats, "COUNTED", 1000)
    found = read_lines(tmp_path, GOOD * 100 + b"bad\n", shard_bytes=500)
    message = only_bad(found).message
    assert "a.jsonl, byte 1700 (more than 1000 bytes into it lines are not counted): is not JSON" in message
    assert count_lines(str(tmp_path / "a.jsonl"), {}, 500) == 29


LINES = st.lists(
    st.one_of(
        st.text(max_size=80).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
        st.text(max_size=80).map(lambda text: json.dumps({"text": text}).encode()),
        st.sampled_from([b"", b"bad", b" \r", b'{"text": "\\ud800"}', b'{"text": "' + b"x" * 300 + b'"}', b"\xff"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, ends=st.booleans(), shard_bytes=st.integers(20, 3000), ending=st.sampled_from(list(PACK)))
def test_cutting_changes_nothing(lines, ends, shard_bytes, ending, tmp_path_factory):
    payload = b"\n".join(lines) + (b"\n" if ends else b"")
    if not payload:
        return
    path = tmp_path_factory.mktemp("a") / f"a.jsonl{ending}"
    path.write_bytes(PACK[ending](payload))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "CHUNK", 64)
        patch.setattr(formats, "CHUNK", 64)
        whole = read("jsonl", path, 250)
        pieces = read("jsonl", path, 250, shard_bytes)
    plain = read("jsonl", path, 250)  # in one block
    assert whole == plain
    key = (lambda found: found) if ending else None
    assert sorted(pieces, key=key) == sorted(whole, key=key) if ending else pieces == whole
    assert len(whole) == sum(not (line.isspace() or not line) for line in payload.split(b"\n"))


@given(
    payload=st.lists(st.sampled_from([b"\n", b"a", b"bcdefgh", b"0123456789" * 5])).map(b"".join),
    cuts=st.sets(st.integers(1, 400)),
    step=st.integers(1, 70),
    limit=st.integers(1, 60),
)
def test_line_reader(payload, cuts, step, limit):
    """Every line once, in the stretch in which it begins, whole up to the limit, however the stream comes.

    A longer one is whole, too, or (where it goes on in another read) said to be so.
    """
    ends = [0, *sorted(cuts)]
    parts = [payload[start:stop] for start, stop in zip(ends, [*ends[1:], None], strict=True)]
    reader = LineReader(filter(None, parts), 0, limit)
    found = []
    for block in reader.blocks((start, start + step) for start in range(0, len(payload) + 1, step)):
        assert block.lines_before == payload.count(b"\n", 0, block.offset)
        if isinstance(block, Long):
            found.append((block.offset, None))
            continue
        at = block.offset
        for line in block.payload.splitlines(keepends=True):
            found.append((at, line.rstrip(b"\n")))
            at += len(line)
    wanted = payload.split(b"\n")
    wanted = wanted[:-1] if payload.endswith(b"\n") or not payload else wanted
    assert len(found) == len(wanted)
    at = 0
    for got, line in zip(found, wanted, strict=True):
        assert got in ([(at, line)] if len(line) <= limit else [(at, line), (at, None)])
        at += len(line) + 1


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_long_line_is_not_read_again_by_every_unit_it_goes_through(tmp_path, monkeypatch, small_blocks, ending):
    payload = GOOD * 3 + b'{"text": "' + b"x" * 100_000 + b'"}\n' + GOOD * 3 + ending.encode()
    (tmp_path / "a.jsonl").write_bytes(payload)
    n_read, chunks = 0, files_module.chunks

    def counted(*arguments):
        nonlocal n_read
        for part in chunks(*arguments):
            n_read += len(part)
            yield part

    monkeypatch.setattr(files_module, "chunks", counted)
    found = read("jsonl", tmp_path / "a.jsonl", 2000, shard_bytes=1000)
    assert texts(found) == ["good"] * 6
    assert only_bad(found).message.startswith(
        f"{tmp_path}/a.jsonl, line 4, byte 51: the line is longer than 2000 bytes"
    )
    assert n_read < 2.5 * len(payload)  # by the unit in which it begins, and by those that it goes through


def test_few_packed_files_are_striped_and_many_are_not(tmp_path, small_blocks):
    for number in range(10):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(GOOD * 100))
    assert [file.atoms for file in make_source("jsonl", tmp_path / "0*").files] == [8]
    assert [file.atoms for file in make_source("jsonl", tmp_path / "[012]*").files] == [3, 3, 3]
    assert {file.atoms for file in make_source("jsonl", tmp_path / "*").files} == {1}
    source = make_source("jsonl", tmp_path / "0*")
    assert abs(source.n_bytes - 1700) < 100
    units = source.units(200)
    assert len(units) == 8
    found = [list(documents(unit)) for unit in units]
    assert all(len(documents) > 5 for documents in found)
    assert sorted(int(document.name.rpartition(":")[2]) for part in found for document in part) == list(range(1, 101))


@pytest.mark.parametrize("n", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.fault(49)
def test_empty_documents_without_number(tmp_path, n):
    found = read_lines(tmp_path, b'{"text": ""}\n' * n)
    assert len(found) == n
    assert {document.reason for document in found} == {"empty"}


@pytest.mark.skipif(not POEMS.exists(), reason=f"{POEMS} is not there")
def test_poems_read_as_json_reads_them(tmp_path):
    with gzip.open(POEMS, "rt", encoding="utf-8") as stream:
        wanted = sorted(json.loads(line)["text"] for line in stream)
    assert sorted(texts(read("jsonl", POEMS, shard_bytes=4 * 2**20))) == wanted


# -- packed files ------------------------------------------------------------------------------------------------------

LONG = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(3000))


def damaged(payload, at):
    return payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.fault(46)
def test_cut_packed_file(tmp_path, small_blocks, ending, shard_bytes):
    packed = PACK[ending](LONG)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    found = read("jsonl", path, shard_bytes=shard_bytes)
    assert only_bad(found).reason == "compressed"
    message = only_bad(found).message
    n = len(texts(found))
    assert f"a.jsonl{ending}, line {n + 1}, unpacked byte " in message
    assert "the packed file is cut short; the rest of it is lost; fetch or pack the file again" in message
    wanted = [json.loads(line)["text"] for line in LONG.splitlines()][:n]
    assert n > 500
    assert sorted(texts(found)) == sorted(wanted)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.fault(44, 46)
def test_damage_is_the_same_for_any_cutting(tmp_path, small_blocks, ending):
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(LONG) if ending == ".zst" else gzip.compress(LONG)
    path = tmp_path / f"a.jsonl{ending}"
    for at in (len(packed) // 3, len(packed) - (6 if ending == ".gz" else 2), len(packed) * 2 // 3):
        path.write_bytes(damaged(packed, at))
        whole = read("jsonl", path)
        lost = only_bad([document for document in whole if getattr(document, "reason", "") == "compressed"])
        assert "the packed file is damaged (" in lost.message
        assert ("what was read of it before may be wrong, too" in lost.message) == ("check" in lost.message)
        assert sorted(map(str, read("jsonl", path, shard_bytes=40_000))) == sorted(map(str, whole))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.fault(46)
def test_several_members_zeros_and_garbage(tmp_path, ending):
    pack = PACK[ending]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(GOOD) + pack(b"") + pack(b'{"text": "second"}') + bytes(70_000))
    assert texts(read("jsonl", path)) == ["good", "second"]
    assert len(read("jsonl", path)) == 2
    path.write_bytes(pack(GOOD + b'{"text": "whole"}') + b"garbage")
    found = read("jsonl", path)
    assert texts(found) == ["good", "whole"]
    assert (
        "line 2, unpacked byte 34: the packed file is followed by 0x67617262, which is not" in only_bad(found).message
    )
    path.with_suffix("").with_suffix(".txt" + ending).write_bytes(pack(b"text") + b"garbage")
    (bad,) = read("text", tmp_path / f"a.txt{ending}")
    assert "a.txt" + ending + ", unpacked byte 4: the packed file is followed by" in bad.message


def test_zstd_that_begins_with_a_skippable_frame(tmp_path):
    frame = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    (tmp_path / "a.jsonl").write_bytes(frame + PACK[".zst"](GOOD))
    assert texts(read("jsonl", tmp_path / "a.jsonl")) == ["good"]


@pytest.mark.fault(46)
def test_contents_decide_and_names_that_promise_too_much_are_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(GOOD))
    (tmp_path / "b.gz").write_bytes(PACK[".zst"](GOOD))
    (tmp_path / "c.jsonl.gz").write_bytes(GOOD)
    (tmp_path / "d.zst").write_bytes(b"")
    found = read("jsonl", tmp_path / "*", shard_bytes=5)
    assert [document.name for document in found[:2]] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.gz:1"]
    assert [document.reason for document in found[2:]] == ["compressed", "compressed"]
    assert "c.jsonl.gz is named as gzip and begins with 0x7b227465; expected 0x1f8b; pack it again" in found[2].message
    assert "d.zst is named as zstd and is empty; expected 0x28b52ffd; pack it again or" in found[3].message
    assert found[2].message.endswith("nothing of it is read")


BOMB = """
import resource, sys
from data.sources import *
from data.sources import JsonlConfig, TextConfig
kind, path = sys.argv[1:]
cfg = JsonlConfig(paths=[path], field="text") if kind == "jsonl" else TextConfig(paths=[path])
source = open_source(cfg, Limits(max_document_bytes=2**20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [document for unit in source.units(2**40) for document in documents(unit)]
print([document.reason if hasattr(document, "reason") else document.text for document in found])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["jsonl", "text"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.fault(46)
def test_a_bomb_costs_little_memory(tmp_path, kind, ending):
    """Half a gigabyte of zeros between two good lines; the limit is 1 MiB."""
    packer = zlib.compressobj(1, wbits=31) if ending == ".gz" else zstandard.ZstdCompressor(level=1).compressobj()
    with open(tmp_path / f"a{ending}", "wb") as stream:
        for part in (GOOD, *([bytes(2**24)] * 32), b"\n", GOOD):
            stream.write(packer.compress(part))
        stream.write(packer.flush())
    command = [sys.executable, "-c", BOMB, kind, str(tmp_path / f"a{ending}")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    reasons, grown_mib = done.stdout.splitlines()
    assert reasons == ("['good', 'too_long', 'good']" if kind == "jsonl" else "['too_long']")
    assert int(grown_mib) < 110  # the most is what zstd makes of 1 KiB, twice


# -- parquet, Arrow, datasets ------------------------------------------------------------------------------------------

WORDS = [f"詩 number {number} " + "x" * (number % 50) for number in range(1000)]


def write_parquet(path, table=None, row_group_size=100, **options):
    table = table if table is not None else pa.table({"text": WORDS, "n": range(1000)})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


def write_arrow(path, table=None, rows=100, stream=True):
    table = table if table is not None else pa.table({"text": WORDS, "n": range(len(WORDS))})
    writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with writer(path, table.schema) as out:
        out.write_table(table, max_chunksize=rows)
    return path


WRITERS = {
    "parquet": write_parquet,
    "stream": write_arrow,
    "file": lambda path, table=None: write_arrow(path, table, stream=False),
}


def kind_of(writer):
    return "parquet" if writer == "parquet" else "arrow"


@pytest.mark.parametrize("writer", WRITERS)
def test_rows_are_documents_however_they_are_cut(tmp_path, writer):
    path = WRITERS[writer](str(tmp_path / "a"))
    found = read(kind_of(writer), path)
    assert found == [Document(f"{path}:{row}", text) for row, text in enumerate(WORDS)]
    source = make_source(kind_of(writer), path)
    assert source.files[0].atoms == 10
    assert [len(source.units(source.n_bytes // count)) for count in (1, 3, 10, 100)] == [1, 3, 10, 10]
    assert read(kind_of(writer), path, shard_bytes=source.n_bytes // 7) == found


TYPES = {
    "large": pa.array(WORDS, pa.large_string()),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "nested": pa.array([{"title": "t", "deep": {"er": text}} for text in WORDS]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("column", TYPES)
@pytest.mark.fault(47)
def test_types_of_columns(tmp_path, writer, column):
    path = WRITERS[writer](str(tmp_path / "a"), pa.table({"text": TYPES[column], "n": range(1000)}))
    assert texts(read(kind_of(writer), path, field="text.deep.er" if column == "nested" else "text")) == WORDS


@pytest.mark.parametrize("writer", WRITERS)
def test_templates_over_columns(tmp_path, writer):
    path = WRITERS[writer](str(tmp_path / "a"), pa.table({"b": ["x", ""], "a": ["1", "2"]}))
    assert texts(read(kind_of(writer), path, template="{a}: {b}{a}")) == ["1: x1", "2: 2"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.fault(47)
def test_bad_rows(tmp_path, writer):
    table = pa.table({"text": ["good", None, "", "a\0b", "x" * 2000, "good"]})
    path = WRITERS[writer](str(tmp_path / "a"), table)
    found = read(kind_of(writer), path, 1024)
    assert [getattr(document, "reason", "good") for document in found] == [
        "good",
        "field",
        "empty",
        "nul",
        "too_long",
        "good",
    ]
    assert found[1].message.startswith(f"{path}, row 1: the field 'text' is null; expected a string; repair it")
    assert "row 3: the text has a NUL (U+0000) as its character 1" in found[3].message
    assert "row 4: the text is longer than 1024 bytes" in found[4].message


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.fault(45)
def test_rows_that_are_not_utf8(tmp_path, writer):
    wrong = pa.array([b"good", b"sch\xf6n", b"good"]).view(pa.string())
    path = WRITERS[writer](str(tmp_path / "a"), pa.table({"text": wrong}))
    found = read(kind_of(writer), path)
    assert texts(found) == ["good", "good"]
    assert found[1].reason == "utf8"
    assert f"{path}, row 1: 0xF6 at byte 3 of its text is not UTF-8" in found[1].message


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.fault(47)
def test_schemas_that_drift(tmp_path, writer):
    tables = [
        {"text": ["good"]},
        {"txt": ["other"], "n": [1]},
        {"text": [3]},
        {"text": [b"bytes"]},
        {"text": [["list"]]},
        {"n": [1], "text": ["good"]},
    ]
    for number, table in enumerate(tables):
        WRITERS[writer](str(tmp_path / str(number)), pa.table(table))
    for shard_bytes in (1, 10**9):
        found = read(kind_of(writer), tmp_path / "*", shard_bytes=shard_bytes)
        assert [getattr(document, "reason", "good") for document in found] == ["good", *["field"] * 4, "good"]
        assert f"{tmp_path}/1: has 0 columns 'text'; expected one, and there are: 'txt', 'n'; correct field or" in (
            found[1].message
        )
        assert f"{tmp_path}/2: its column 'text' is of type int64; expected strings" in found[2].message
        assert "is of type binary" in found[3].message
        assert "is of type list" in found[4].message


@pytest.mark.parametrize("writer", WRITERS)
def test_a_wrong_file_is_named_once_however_it_is_cut(tmp_path, writer):
    path = WRITERS[writer](str(tmp_path / "a"))
    assert len(read(kind_of(writer), path, field="none", shard_bytes=100)) == 1
    assert "'n' is of type int64" in only_bad(read(kind_of(writer), path, field="n")).message
    assert "has 0 columns 'text.deep'" in only_bad(read(kind_of(writer), path, field="text.deep")).message


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.fault(47, 50)
def test_no_rows(tmp_path, writer):
    path = WRITERS[writer](str(tmp_path / "a"), pa.table({"text": pa.array([], pa.string())}))
    with pytest.raises(SourceError, match=r"there is no text in .*a; name files with text"):
        make_source(kind_of(writer), path)
    WRITERS[writer](str(tmp_path / "b"), pa.table({"text": ["good"]}))
    assert texts(read(kind_of(writer), tmp_path / "*")) == ["good"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("payload", [b"", b"PAR1", b"text", b"ARROW1", bytes(range(155, 255))])
@pytest.mark.fault(47)
def test_not_of_the_format(tmp_path, writer, payload):
    WRITERS[writer](str(tmp_path / "a"), pa.table({"text": ["good"]}))
    (tmp_path / "b").write_bytes(payload)
    found = read(kind_of(writer), tmp_path / "*")
    assert texts(found) == ["good"]
    bad = only_bad(found)
    assert bad.reason == kind_of(writer)
    assert (
        f"{tmp_path}/b is no whole {'parquet file' if writer == 'parquet' else 'Arrow file or stream'} (" in bad.message
    )
    assert bad.message.endswith("; fetch or write it again; nothing of it is read")


@pytest.mark.fault(47)
def test_parquet_without_its_footer(tmp_path):
    path = write_parquet(str(tmp_path / "a"))
    payload = Path(path).read_bytes()
    Path(path).write_bytes(payload[:-1000])
    bad = only_bad(read("parquet", path))
    assert "is no whole parquet file (Parquet magic bytes not found in footer" in bad.message


@pytest.mark.parametrize("compression", ["none", "zstd"])  # only a checksum sees the damage in what is not packed
@pytest.mark.fault(47)
def test_parquet_with_a_corrupt_page(tmp_path, compression):
    path = write_parquet(str(tmp_path / "a"), compression=compression, write_page_checksum=True)
    whole = read("parquet", path)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    at = column.dictionary_page_offset + column.total_compressed_size // 2
    Path(path).write_bytes(damaged(Path(path).read_bytes(), at))
    for shard_bytes in (10**9, 4000):
        found = read("parquet", path, shard_bytes=shard_bytes)
        bad = only_bad(found)
        assert bad.reason == "parquet"
        assert f"{path}, row group 3, row 300: cannot be read (" in bad.message
        assert "rows 300 to 399 are lost; fetch or write the file again" in bad.message
        assert [document for document in found if document != bad] == whole[:300] + whole[400:]


@pytest.mark.parametrize("writer", ["stream", "file"])
@pytest.mark.fault(47)
def test_arrow_with_a_damaged_batch(tmp_path, writer):
    path = WRITERS[writer](str(tmp_path / "a"))
    whole = read("arrow", path)
    payload = Path(path).read_bytes()
    ends = [0, *(sum(len(text.encode()) for text in WORDS[300 : 300 + n]) for n in (1, 2, 3))]
    at = [found.start() for found in re.finditer(re.escape(struct.pack("<4i", *ends)), payload)][2]  # from 100 on alike
    at += 8
    Path(path).write_bytes(payload[:at] + struct.pack("<i", 2**30) + payload[at + 4 :])
    found = read("arrow", path)
    bad = only_bad(found)
    assert f"{path}, record batch 3, row 300: cannot be read (" in bad.message
    assert "the batch is lost; fetch or write the file again" in bad.message
    assert texts(found) == texts(whole[:300] + whole[400:])
    assert read("arrow", path, shard_bytes=20_000) == found


@pytest.mark.fault(47)
def test_arrow_stream_that_is_cut(tmp_path):
    path = write_arrow(str(tmp_path / "a"))
    payload = Path(path).read_bytes()
    Path(path).write_bytes(payload[: len(payload) // 2])
    found = read("arrow", path)
    bad = only_bad(found)
    n = len(texts(found))
    assert f"record batch {n // 100}, row {n}: cannot be read (" in bad.message
    assert "it and, in a stream, all after it is lost" in bad.message
    assert 0 < n < 1000
    assert read("arrow", path, shard_bytes=5000) == found


@pytest.mark.parametrize("writer", WRITERS)
def test_columns_at_urls(tmp_path, writer):
    import fsspec

    system = fsspec.filesystem("memory")
    url = f"memory:///{tmp_path.name}"
    system.pipe(f"{url}/a", Path(WRITERS[writer](str(tmp_path / "a"))).read_bytes())
    assert read(kind_of(writer), f"{url}/*", shard_bytes=10_000) == [
        Document(f"{url}/a:{row}", text) for row, text in enumerate(WORDS)
    ]


def test_errors_of_disk_and_network_are_not_taken_for_damage():
    for error in (OSError(5, "Input/output error"), TimeoutError("slow"), ConnectionError("gone")):
        with pytest.raises(type(error)):
            columns._damage(error)
    assert columns._damage(OSError("Corrupt snappy compressed data.\nmore")) == "Corrupt snappy compressed data"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of save_to_disk with two splits, and one with one."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns.load.cache_clear()
    train = datasets.Dataset.from_dict({"text": WORDS, "n": list(range(1000))})
    both = datasets.DatasetDict({"train": train, "test": train.select(range(10, 0, -1))})
    both.save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    yield tmp_path
    columns.load.cache_clear()


def test_saved_datasets(saved):
    path = saved / "both"
    found = read("dataset", path)
    assert found == [Document(f"{path}:{row}", text) for row, text in enumerate(WORDS)]
    assert read("dataset", path, shard_bytes=5000) == found
    assert len(make_source("dataset", path).units(5000)) > 5
    assert make_source("dataset", path).describe()["rows"] == 1000
    assert texts(read("dataset", path, field="text", split="test")) == WORDS[10:0:-1]
    assert texts(read("dataset", saved / "one", template="<{text}>")) == [f"<{text}>" for text in WORDS]
    fingerprint = make_source("dataset", path).fingerprint
    columns.load.cache_clear()
    assert make_source("dataset", path).fingerprint == fingerprint


def test_a_folder_of_data_files_as_dataset(saved):
    (saved / "files").mkdir()
    (saved / "files" / "train.jsonl").write_bytes(GOOD * 3)
    source = make_source("dataset", saved / "files")
    assert texts(read("dataset", saved / "files")) == ["good"] * 3
    columns.load.cache_clear()
    assert make_source("dataset", saved / "files").fingerprint == source.fingerprint


def test_datasets_refused(saved):
    import datasets

    with pytest.raises(SourceError, match=r"has no split 'valid'; it has 'train', 'test'"):
        make_source("dataset", saved / "both", field="text", split="valid")
    with pytest.raises(
        SourceError, match=r"has 0 columns 'txt'; expected one, and there are: 'text', 'n'; correct field"
    ):
        make_source("dataset", saved / "both", field="txt")
    with pytest.raises(SourceError, match=r"its column 'n' is of type int64; expected strings"):
        make_source("dataset", saved / "both", field="n")
    train = datasets.Dataset.from_dict({"text": ["a"]}, split="train")
    train.save_to_disk(saved / "named")
    with pytest.raises(SourceError, match=r"is the split 'train', not 'test'; correct split"):
        make_source("dataset", saved / "named", field="text", split="test")
    source = make_source("dataset", saved / "named")
    columns.load.cache_clear()
    datasets.Dataset.from_dict({"text": ["b", "c"]}, split="train").save_to_disk(saved / "other")
    os.rename(saved / "named", saved / "gone")
    os.rename(saved / "other", saved / "named")
    with pytest.raises(
        SourceError, match=r"is not what it was when it was listed; name its revision, delete the unfin"
    ):
        list(documents(source.units(10**9)[0]))


@pytest.mark.slow
def test_a_dataset_of_the_hub_without_network(tmp_path):
    """Starts a Python of its own: the library reads the variable when it is imported."""
    code = "from data.sources import *; from data.sources import DatasetConfig\n"
    code += "open_source(DatasetConfig(path='no-such/dataset', field='text'), Limits())"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True
    )
    assert "SourceError: source 'dataset': dataset 'no-such/dataset' (config None, split 'train') cannot be loaded" in (
        done.stderr
    )
    assert "where there is no network load it once where there is one, with HF_HOME set to" in done.stderr
