"""Sources: what is listed, how it is cut, what changes are noticed, and what is refused."""

import os
import pickle
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data import files as files_module
from data.files import File, list_paths, stat
from data.sources import (
    Bad,
    Document,
    EmbeddedConfig,
    JsonlConfig,
    Limits,
    MegatronConfig,
    Skipped,
    SourceConfig,
    SourceError,
    TextConfig,
    cut,
    documents,
    open_source,
)


def read_all(source, shard_bytes=10**9):
    return [document for unit in source.units(shard_bytes) for document in documents(unit)]


def text_source(*paths, **options):
    return open_source(TextConfig(paths=[str(path) for path in paths], **options), Limits())


def test_embedded_is_the_library_of_this_python():
    source = open_source(EmbeddedConfig(), Limits())
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
    assert open_source(EmbeddedConfig(), Limits()) == source


@pytest.mark.fault(45)
def test_embedded_skips_what_is_not_utf8_and_says_so():
    source = open_source(EmbeddedConfig(), Limits())
    found = read_all(source)
    assert {type(document) for document in found} == {Document, Skipped}
    reasons = {document.reason for document in found if isinstance(document, Skipped)}
    assert reasons == {"empty", "undecodable"}  # Python tests its own decoding with such files
    by_name = {document.name: document for document in found}
    assert by_name["json/decoder.py"].text == Path(sys.modules["json.decoder"].__file__).read_bytes().decode()
    assert len(found) == len(source.files)


def test_embedded_skips_what_holds_nul_and_keeps_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a.py").write_bytes(b"a = '\0'")
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfb")
    found = read_all(open_source(EmbeddedConfig(), Limits()))
    assert found == [Skipped("a.py", "undecodable"), Document("b.py", "\ufeffb")]


def test_embedded_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SourceError, match=r"has no \.py files: .*use another Python, or a source of kind text"):
        open_source(EmbeddedConfig(), Limits())


# -- listing -----------------------------------------------------------------------------------------------------------


def write_tree(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"text of {name}\r\n".encode())


def test_text_takes_files_and_globs_once_each_in_order(tmp_path):
    write_tree(tmp_path, "b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", "odd[1].txt", ".hidden/e.txt")
    source = text_source(tmp_path / "**/*.txt", tmp_path / "b.txt", tmp_path / "odd[1].txt", tmp_path / "deep/*")
    assert [document.name for document in read_all(source)] == [
        str(tmp_path / name) for name in ("a.txt", "b.txt", "deep/d.md", "deep/er/c.txt", "odd[1].txt")
    ]
    assert read_all(source)[0] == Document(str(tmp_path / "a.txt"), "text of a.txt\r\n")  # ends of lines as they are
    assert source.describe() == {"kind": "text", "documents": 5, "bytes": source.n_bytes}


@pytest.mark.fault(48)
def test_two_stars_cross_folders_and_links_but_go_round_no_circle(tmp_path, monkeypatch):
    write_tree(tmp_path, "data/x/a.txt", "data/x/y/b.txt", "else/c.txt")
    for name in ("one", "two"):  # two such links make 2^40 paths for who follows them
        (tmp_path / "data/x" / name).symlink_to(tmp_path / "data")
    (tmp_path / "data/linked").symlink_to(tmp_path / "else")
    wanted = ["data/linked/c.txt", "data/x/a.txt", "data/x/y/b.txt"]
    assert list_paths([f"{tmp_path}/data/**/*.txt"], {}) == [f"{tmp_path}/{name}" for name in wanted]
    assert list_paths([f"{tmp_path}/data/**"], {}) == [f"{tmp_path}/{name}" for name in wanted]
    assert list_paths([f"{tmp_path}/d*/**/y/**/*.txt"], {}) == [f"{tmp_path}/data/x/y/b.txt"]
    monkeypatch.chdir(tmp_path)
    assert list_paths(["**/a.txt"], {}) == ["data/x/a.txt"]
    one = f"{tmp_path}/data/x/a.txt"
    assert list_paths(["data/x/a.txt", "./data/x/a.txt", "data/x/../x/*.txt", one, f"file://{one}"], {}) == [
        "./data/x/a.txt"
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_paths(["~/else/*"], {}) == [f"{tmp_path}/else/c.txt"]


@pytest.mark.fault(48, 50)
def test_refusals_when_listing(tmp_path):
    with pytest.raises(SourceError, match=r"source 'text': '.*none\*' matches no file \(from /"):
        text_source(tmp_path / "none*")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        SourceError, match=r"folder is a folder; name files, or all in a folder as .*folder/\*\*/\*.txt"
    ):
        text_source(tmp_path / "folder")
    with pytest.raises(SourceError, match="match(es)? folders only; name files"):
        text_source(tmp_path / "fold*")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(
        SourceError, match=r"link cannot be read: No such file or directory; repair it, or leave it out"
    ):
        text_source(tmp_path / "link")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(SourceError, match=r"circle cannot be read: Too many levels of symbolic links; repair it"):
        text_source(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"pipe is not a file but a pipe, socket or device"):
        text_source(tmp_path / "pipe")
    (tmp_path / "empty").write_text("")
    with pytest.raises(SourceError, match=r"there is no text in .*empty; name files with text"):
        text_source(tmp_path / "empty")
    (tmp_path / "empty2").write_text("")
    with pytest.raises(SourceError, match=r"all 2 files are empty, the first is .*empty; name files with text"):
        text_source(tmp_path / "empty*")


@pytest.mark.parametrize(
    ("head", "packing"), [(b"BZh91AY&SY", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\3\4", "zip"), (b"\4\x22M\x18", "lz4")]
)
def test_packings_that_cannot_be_read(tmp_path, head, packing):
    (tmp_path / "a").write_bytes(head + b"...")
    with pytest.raises(SourceError, match=f"a is packed with {packing}; unpack it, or pack it with gzip or zstd"):
        text_source(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.fault(48)
def test_without_permission(tmp_path):
    write_tree(tmp_path, "shut/a.txt", "b.txt")
    (tmp_path / "b.txt").chmod(0)
    with pytest.raises(SourceError, match=r"b.txt cannot be read: Permission denied"):
        text_source(tmp_path / "b.txt")
    (tmp_path / "shut").chmod(0)
    with pytest.raises(SourceError, match=r"shut cannot be listed: Permission denied; repair it or leave it out"):
        text_source(tmp_path / "**/*.txt")


def test_folder_that_cannot_be_listed(tmp_path):
    error = PermissionError(13, "Permission denied", str(tmp_path / "shut"))
    with pytest.raises(SourceError, match=r"shut cannot be listed: Permission denied; repair it or leave it out"):
        files_module._refuse_folder(error)


# -- remote files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path):
    """A folder of fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    system.makedirs(root)
    yield system, f"memory://{root}"
    system.rm(root, recursive=True)


def test_urls_and_their_globs(memory, tmp_path):
    system, url = memory
    for name in ("b.txt", "deep/a.txt"):
        system.pipe(f"{url}/{name}", f"text of {name}".encode())
    write_tree(tmp_path, "c.txt")
    source = text_source(f"{url}/**/*.txt", f"memory:/{url[9:]}/b.txt", tmp_path / "c.txt")
    assert [document.name for document in read_all(source)] == [
        f"{tmp_path}/c.txt",
        f"{url}/b.txt",
        f"{url}/deep/a.txt",
    ]
    assert read_all(source)[2].text == "text of deep/a.txt"


def test_refusals_of_urls(memory, monkeypatch):
    system, url = memory
    with pytest.raises(SourceError, match=r"'memory://.*none\*' matches no file; correct the path"):
        text_source(f"{url}/none*")
    with pytest.raises(SourceError, match=r"chains file systems, which is not supported"):
        text_source("zip://a.txt::memory://a.zip")
    with pytest.raises(SourceError, match=r"none.txt cannot be read: .*check the address, the network and the cred"):
        text_source(f"{url}/none.txt")
    system.makedirs(f"{url}/folder")
    with pytest.raises(SourceError, match=r"folder is a folder; name files, or all in a folder as .*folder/\*\*"):
        text_source(f"{url}/folder")
    with pytest.raises(SourceError, match=r"nosuch://b/a cannot be listed: ValueError: Protocol not known"):
        text_source("nosuch://b/a")
    monkeypatch.setattr(type(system), "info", lambda self, path: {"type": "file", "size": None})
    with pytest.raises(SourceError, match=r"its server does not say its size; fetch the file and name the local copy"):
        text_source(f"{url}/none.txt")


def test_missing_drivers_are_named_with_what_to_install():
    """In a process of its own, as fsspec remembers drivers that were there."""
    urls = {
        "gs://b/*.txt": "gcsfs",
        "gcs://b/a": "gcsfs",
        "hf://datasets/a/b/*": "huggingface_hub",
        "az://a/b": "adlfs",
        "s3://b/*": "'longhaul[s3]'",
        "https://h/a": "aiohttp requests",
        "oci://b/a": "the package that it names",
    }
    script = f"""
import sys
sys.modules |= dict.fromkeys(["gcsfs", "huggingface_hub", "adlfs", "s3fs", "aiohttp", "ocifs"])
from data.sources import Limits, SourceError, TextConfig, open_source
for url in {list(urls)}:
    try:
        open_source(TextConfig(paths=[url]), Limits())
    except SourceError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stderr == ""
    for line, (url, install) in zip(done.stdout.splitlines(), urls.items(), strict=True):
        protocol = url.partition("://")[0]
        assert line.startswith(f"source 'text': {url}: the driver for {protocol}:// is not installed ("), line
        assert line.endswith(f"); install it with: pip install {install}")


def test_what_a_driver_says_of_another_address_is_not_shown_whole(memory, monkeypatch):
    """Such as where a web server led it to."""
    system, url = memory

    def info(self, path):
        raise ConnectionError("403 of https://store/a?X-Amz-Signature=hunter2 for https://me:hunter2@store")

    monkeypatch.setattr(type(system), "info", info)
    with pytest.raises(
        SourceError, match=r"403 of https://store/a\?\*\*\* for https://\*\*\*@store; check the address"
    ):
        text_source(f"{url}/a.txt")


def test_a_remote_file_that_changes(memory):
    system, url = memory
    system.pipe(f"{url}/a.txt", b"one")
    source = text_source(f"{url}/a.txt")
    system.pipe(f"{url}/a.txt", b"two")
    assert text_source(f"{url}/a.txt").fingerprint != source.fingerprint
    with pytest.raises(SourceError, match=r"a.txt had 3 bytes when it was listed and has another time of change"):
        read_all(source)


def test_options_reach_the_file_system(tmp_path, monkeypatch):
    asked = {}
    system = fsspec.filesystem("memory")
    system.pipe("/options/a.txt", b"a")
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: asked.update(options) or (system, "/options/a.txt"))
    assert len(read_all(text_source("memory://options/a.txt", storage_options={"anon": True, "retries": 3}))) == 1
    assert asked == {"anon": True, "retries": 3}


def test_a_real_s3_server(monkeypatch):
    import gzip

    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        lines = [f'{{"text": "poem {number}"}}\n'.encode() for number in range(100)]
        client.put_object(Bucket="bucket", Key="b.jsonl.gz", Body=gzip.compress(b"".join(lines[60:])))
        client.put_object(Bucket="bucket", Key="a.jsonl.gz", Body=gzip.compress(b"".join(lines[:60])))
        client.put_object(Bucket="bucket", Key="plain.jsonl", Body=b"".join(lines))
        packed = JsonlConfig(paths=["s3://bucket/*.jsonl.gz"], field="text", storage_options={"use_ssl": False})
        found = read_all(open_source(packed, Limits()), 500)
        assert [document.text for document in found] == [f"poem {number}" for number in range(100)]
        assert found[61].name == "s3://bucket/b.jsonl.gz:2"
        plain = open_source(JsonlConfig(paths=["s3://bucket/plain.jsonl"], field="text"), Limits())
        assert len(plain.units(200)) > 5
        assert [document.text for document in read_all(plain, 200)] == [document.text for document in found]
        client.put_object(Bucket="bucket", Key="plain.jsonl", Body=b"".join(reversed(lines)))
        with pytest.raises(SourceError, match=r"s3://bucket/plain.jsonl had \d+ bytes .* another time of change"):
            read_all(plain)
        with pytest.raises(SourceError, match=r"s3://none/a cannot be read: .*check the address"):
            text_source("s3://none/a")
    finally:
        server.stop()


# -- units -------------------------------------------------------------------------------------------------------------

FILES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=30)


@given(sizes=FILES.filter(lambda sizes: any(size for size, _ in sizes)), count=st.integers(1, 50))
def test_units_hold_every_atom_once_in_order(sizes, count):
    files = tuple(File(str(number), "", size, "", size, atoms) for number, (size, atoms) in enumerate(sizes))
    groups = cut(files, count)
    assert all(groups)
    assert len(groups) <= count
    pieces = [piece for group in groups for piece in group]
    atoms = [(piece.file.name, atom) for piece in pieces for atom in range(piece.first, piece.stop)]
    assert atoms == [(file.name, atom) for file in files for atom in range(file.atoms)]
    total = sum(size for size, _ in sizes)
    assert sum(piece.n_bytes for piece in pieces) == total
    largest = max(-(-size // atoms) for size, atoms in sizes)
    assert all(sum(piece.n_bytes for piece in group) <= total / count + 2 * largest + 2 for group in groups)


def test_units_of_the_library_are_even():
    units = open_source(EmbeddedConfig(), Limits()).units(8 * 2**20)
    assert len(units) == round(sum(unit.n_bytes for unit in units) / 2**23)
    assert max(unit.n_bytes for unit in units) < 1.2 * min(unit.n_bytes for unit in units)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert {unit.source for unit in units} == {"embedded"}


def test_units_of_a_petabyte_are_cut_at_once():
    file = File("a", "a", 2**50, "", 2**50, 2**50)
    groups = cut((file,), 10_000)
    assert len(groups) == 10_000
    assert {piece.n_bytes for group in groups for piece in group} <= {2**50 // 10_000, 2**50 // 10_000 + 1}


def test_units_travel_to_other_processes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 1000)
    cfg = JsonlConfig(name="poems", paths=[str(tmp_path / "a.jsonl")], template="<{text}>")
    units = open_source(cfg, Limits()).units(2000)
    (tmp_path / "units").write_bytes(pickle.dumps(units))
    code = (
        "import pickle, sys; from data.sources import documents; units = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([document for unit in reversed(units) for document in documents(unit)])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "units"], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([document for unit in reversed(units) for document in documents(unit)])
    assert len(units) == 7
    assert done.stdout.count("<a>") == 1000


# -- change ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.fault(48)
def test_files_that_change_after_listing(tmp_path, kind):
    path = tmp_path / "a"
    line = '{"text": "a"}\n'

    def listed():
        path.write_text(line)
        fields = {"field": "text"} if kind == "jsonl" else {}
        cfg = TypeAdapter(SourceConfig).validate_python({"kind": kind, "paths": [str(path)], **fields})
        return open_source(cfg, Limits())

    source = listed()
    path.write_text(2 * line)
    with pytest.raises(SourceError, match=r"a had 14 bytes when it was listed and has 28 now; let nothing write"):
        read_all(source)
    source = listed()
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match=r"a had 14 bytes when it was listed and has another time of change"):
        read_all(source)
    source = listed()
    reading = documents(source.units(10**9)[0])
    if kind == "jsonl":
        assert isinstance(next(reading), Document)
        path.write_text(3 * line)
        with pytest.raises(SourceError, match=r"a had 14 bytes when it was listed and has 42 now"):
            next(reading)
    source = listed()
    path.unlink()
    with pytest.raises(SourceError, match=r"a cannot be read: No such file or directory; repair it"):
        read_all(source)


# -- config ------------------------------------------------------------------------------------------------------------

RECORDS = {"kind": "jsonl", "paths": ["a"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "text"}, "paths"),
        ({"kind": "text", "paths": []}, "paths"),
        ({"kind": "text", "paths": "a.txt"}, "paths"),
        ({"kind": "embedded", "paths": ["a"]}, "paths"),
        ({"kind": "csv", "paths": ["a"]}, "csv"),
        ({"paths": ["a"]}, "kind"),
        ({"kind": "embedded", "name": "a/b"}, "name"),
        ({"kind": "embedded", "name": ""}, "name"),
        ({"kind": "embedded", "weight": 0.0}, "weight"),
        ({"kind": "embedded", "weight": float("inf")}, "weight"),
        ({"kind": "embedded", "max_epochs": -1.0}, "max_epochs"),
        (RECORDS, "exactly one of field .* and template"),
        ({**RECORDS, "field": "text", "template": "{text}"}, "exactly one of field .* and template"),
        ({**RECORDS, "field": "a..b"}, "field 'a..b' has an empty step; write for example"),
        (
            {**RECORDS, "template": "{text.__class__}"},
            r"a field is a plain name such as \{title\}, not 'text.__class__'",
        ),
        ({**RECORDS, "template": "{text[0]}"}, r"a field is a plain name such as \{title\}, not 'text\[0\]'"),
        ({**RECORDS, "template": "{text:>10}"}, "a field is a plain name"),
        ({**RECORDS, "template": "{text!r}"}, "a field is a plain name"),
        ({**RECORDS, "template": "{}"}, "a field is a plain name"),
        ({**RECORDS, "template": "{0}"}, "a field is a plain name"),
        ({**RECORDS, "template": "{text"}, "is malformed .*for braces"),
        ({**RECORDS, "template": "{{text}}"}, "names no field; write for example"),
        ({"kind": "dataset", "path": "x"}, "exactly one of field"),
        (
            {"kind": "text", "paths": ["s3://b/a"], "storage_options": {"secret": "x"}},
            r"storage_options has secret, which would be saved with the run; give credentials through the environment",
        ),
        ({"kind": "text", "paths": ["gs://b/a"], "storage_options": {"token": "x"}}, "has token, which would"),
        (
            {"kind": "text", "paths": ["a"], "storage_options": {"anon": True}},
            "storage_options are for one remote file system, paths name local files alone",
        ),
        (
            {"kind": "text", "paths": ["s3://b/a", "gs://b/a"], "storage_options": {"anon": True}},
            "paths name gs and s3; use two sources",
        ),
        ({"kind": "megatron", "prefix": ["a.bin"]}, "prefix 'a.bin' has a suffix; write 'a'"),
        ({"kind": "megatron", "prefix": ["a", "a"]}, "prefix names a path twice: a, a; name each once"),
        ({"kind": "megatron", "prefix": []}, "prefix"),
        ({"kind": "corpus"}, "path"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        TypeAdapter(SourceConfig).validate_python(values)


def test_config_takes():
    take = TypeAdapter(SourceConfig).validate_python
    assert take({"kind": "embedded"}).label == "embedded"
    assert (
        take({"kind": "corpus", "path": "s3://b/c", "name": "mine", "weight": 0.5, "max_epochs": 4.0}).label == "mine"
    )
    assert take({"kind": "megatron", "prefix": ["a", "b"]}) == MegatronConfig(prefix=["a", "b"])
    assert take({**RECORDS, "field": "meta.text"}).parts == (("meta", "text"),)
    assert take({**RECORDS, "template": "{a}\n{{b}} {c-d}"}).parts == (("a",), "\n{", "b}", " ", ("c-d",))
    options = {"kind": "text", "paths": ["a", "gs://b/a"], "storage_options": {"token": "anon", "retries": 3}}
    assert take(options).storage_options == {"token": "anon", "retries": 3}


def test_stat_is_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert (
        stat(str(tmp_path / "b"), {}) == stat(str(tmp_path / "a"), {}) == (5, str((tmp_path / "a").stat().st_mtime_ns))
    )
    assert not any(isinstance(document, Bad) for document in read_all(text_source(tmp_path / "b")))
