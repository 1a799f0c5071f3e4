"""Sources: what is listed, how it is cut, what is read, and what is refused."""

import os
import platform
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data.sources import (
    Document,
    EmbeddedConfig,
    File,
    Skipped,
    Source,
    SourceConfig,
    SourceError,
    TextConfig,
    documents,
    open_source,
)


def read_all(source, shard_bytes=10**9):
    return [document for unit in source.units(shard_bytes) for document in documents(unit)]


def text_source(*paths):
    return open_source(TextConfig(paths=[str(path) for path in paths]))


def test_embedded_is_the_library_of_this_python():
    source = open_source(EmbeddedConfig())
    names = [file.name for file in source.files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "test/test_json/__init__.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name or not name.endswith(".py")]
    assert source.n_bytes == sum(Path(file.path).stat().st_size for file in source.files) > 20e6
    assert source.describe() == {
        "kind": "embedded",
        "documents": len(names),
        "bytes": source.n_bytes,
        "python": platform.python_version(),
    }
    assert open_source(EmbeddedConfig()) == source


def test_embedded_skips_what_is_not_utf8_and_says_so():
    found = read_all(open_source(EmbeddedConfig()))
    reasons = {document.reason for document in found if isinstance(document, Skipped)}
    assert reasons == {"empty", "undecodable"}  # Python tests its own decoding with such files
    by_name = {document.name: document for document in found}
    assert by_name["json/decoder.py"].text == Path(sys.modules["json.decoder"].__file__).read_bytes().decode()
    assert len(found) == len(open_source(EmbeddedConfig()).files)


def test_embedded_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SourceError, match=r"has no \.py files: .*use another Python, or data.source.kind=text"):
        open_source(EmbeddedConfig())


def test_text_takes_files_and_globs_once_each_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    source = text_source(tmp_path / "**/*.txt", tmp_path / "b.txt", tmp_path / "odd[1].txt", tmp_path / "deep/*")
    assert [document.name for document in read_all(source)] == [
        str(tmp_path / name) for name in ("a.txt", "b.txt", "deep/d.md", "deep/er/c.txt", "odd[1].txt")
    ]
    assert read_all(source)[0] == Document(str(tmp_path / "a.txt"), "text of a.txt\r\n")  # ends of lines as they are


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any), shard_bytes=st.integers(1, 2000))
def test_units_hold_every_document_once_in_order(sizes, shard_bytes):
    files = tuple(File(str(number), str(number), size) for number, size in enumerate(sizes))
    source = Source("text", files, False, "")
    units = source.units(shard_bytes)
    assert tuple(file for unit in units for file in unit.files) == files
    assert [unit.number for unit in units] == list(range(len(units)))
    assert all(unit.files for unit in units)
    wanted = source.n_bytes / max(1, round(source.n_bytes / shard_bytes))
    assert all(unit.n_bytes <= wanted + max(sizes) for unit in units)


def test_units_of_the_library_are_even():
    units = open_source(EmbeddedConfig()).units(8 * 2**20)
    assert len(units) == round(sum(unit.n_bytes for unit in units) / 2**23)
    assert max(unit.n_bytes for unit in units) < 1.2 * min(unit.n_bytes for unit in units)


def test_fingerprint_notices_size_time_and_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = text_source(path).fingerprint
    assert text_source(path).fingerprint == first
    os.utime(path, ns=(1, 1))
    touched = text_source(path).fingerprint
    path.write_text("onee")
    os.utime(path, ns=(1, 1))
    longer = text_source(path).fingerprint
    path.rename(tmp_path / "b.txt")
    assert len({first, touched, longer, text_source(tmp_path / "b.txt").fingerprint}) == 4


def test_empty_file_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert read_all(text_source(tmp_path / "*")) == [
        Skipped(str(tmp_path / "a.txt"), "empty"),
        Document(str(tmp_path / "b.txt"), "b"),
    ]


def test_refusals_when_listing(tmp_path):
    with pytest.raises(SourceError, match=r"'.*none\*' matches no file \(from /"):
        text_source(tmp_path / "none*")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        SourceError, match=r"folder is not a file; name files, or all in a folder as .*folder/\*\*/\*.txt"
    ):
        text_source(tmp_path / "folder")
    with pytest.raises(SourceError, match="match folders only; name files"):
        text_source(tmp_path / "fold*")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"link cannot be read: No such file or directory; repair it or leave it out"):
        text_source(tmp_path / "link")
    (tmp_path / "empty").write_text("")
    with pytest.raises(SourceError, match=r"all 1 files of data.source are empty, the first is .*empty"):
        text_source(tmp_path / "empty")


def test_refusals_when_reading(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("schön\n".encode() + "schön".encode("latin-1"))
    with pytest.raises(SourceError, match=r"a.txt: byte 10 \(0xF6\) is not UTF-8 .*iconv -f latin1 -t utf-8"):
        read_all(text_source(path))
    path.write_bytes(b"cut \xe4\xb8")
    with pytest.raises(SourceError, match=r"a.txt: byte 4 \(0xE4\) is not UTF-8 \(unexpected end of data\)"):
        read_all(text_source(path))
    path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00")
    with pytest.raises(SourceError, match=r"a.txt is compressed with gzip; unpack it first"):
        read_all(text_source(path))
    source = text_source(path)
    path.write_bytes(b"more text than before")
    with pytest.raises(SourceError, match=r"a.txt had 8 bytes when it was listed and has 21 now"):
        read_all(source)
    path.unlink()
    with pytest.raises(SourceError, match=r"a.txt cannot be read: No such file or directory; repair it"):
        read_all(source)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "text"},
        {"kind": "text", "paths": []},
        {"kind": "text", "paths": "a.txt"},
        {"kind": "embedded", "paths": ["a"]},
        {"kind": "parquet", "paths": ["a"]},
        {"paths": ["a"]},
    ],
)
def test_config_refuses(values):
    with pytest.raises(ValidationError):
        TypeAdapter(SourceConfig).validate_python(values)
