"""Shards from a real S3 server through a proxy that injects faults, into a cache that several processes share."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
import xxhash
from pydantic import ValidationError
from s3 import BUCKET, CREDENTIALS, Fault, Proxy, Server

from data.cache import SUFFIXES, Cache, CacheConfig, Files, Held, default_folder
from data.manifest import ShardEntry
from data.remote import BLOCK, DifferentError, Remote, Tries
from data.shards import Shard, ShardWriter
from data.store import MissingError, StoreError, is_url, open_store

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
LONG_S = 60.0  # for what must not happen: tests wait for what does
FAST = {"retries": 5, "backoff_s": 0.01, "timeout_s": LONG_S, "wait_s": LONG_S, "shards": 4, "prefetch": 0}


class Entry(NamedTuple):
    """A shard of made-up bytes, with what its manifest would say."""

    name: str
    bin: bytes
    idx: bytes

    bin_bytes = property(lambda self: len(self.bin))
    idx_bytes = property(lambda self: len(self.idx))
    bin_xxh3 = property(lambda self: xxhash.xxh3_64_hexdigest(self.bin))
    idx_xxh3 = property(lambda self: xxhash.xxh3_64_hexdigest(self.idx))

    @property
    def files(self):
        return Files((self.bin_bytes, self.idx_bytes), (self.bin_xxh3, self.idx_xxh3))


def make_entry(number, size=3000):
    """Shard number; the same bytes in every process."""
    rng = np.random.default_rng(number)
    return Entry(f"library/train-{number:05d}-000", rng.bytes(size), rng.bytes(size // 10))


def content(lease):
    return tuple(Path(f"{lease.prefix}{suffix}").read_bytes() for suffix in SUFFIXES)


def local_shards(folder):
    """Keys of the shards that take disk."""
    places = Path(folder) / "shards"
    return sorted(os.listdir(places)) if places.is_dir() else []


def wait_for(condition, seconds=LONG_S):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.005)
    return found


@pytest.fixture(scope="session")
def server():
    server = Server()
    for number in range(8):
        put(server, make_entry(number))
    server.put("c/manifest.json", b"{}")
    yield server
    server.stop()


def put(server, entry, folder="c"):
    for suffix, body in zip(SUFFIXES, (entry.bin, entry.idx), strict=True):
        server.put(f"{folder}/{entry.name}{suffix}", body)


@pytest.fixture
def proxy(server, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    proxy = Proxy(server.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def config(tmp_path, proxy):
    return partial(CacheConfig, folder=str(tmp_path / "cache"), options={"endpoint_url": proxy.endpoint}, **FAST)


@pytest.fixture
def open_s3(config):
    """open_s3(shards=2, ...) -> a store at s3://BUCKET/c; all share the cache tmp_path/cache."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            open_store(f"s3://{BUCKET}/c", CacheConfig(**{**config.keywords, **changes}))
        )


@pytest.fixture
def open_memory(tmp_path):
    """The same without a server: shards 0 to 7 in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    for entry in map(make_entry, range(8)):
        for suffix, body in zip(SUFFIXES, (entry.bin, entry.idx), strict=True):
            memory.pipe_file(f"/c/{entry.name}{suffix}", body)
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            open_store("memory://c", CacheConfig(**{"folder": str(tmp_path / "cache"), **FAST, **changes}))
        )
    memory.rm("/c", recursive=True)


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_used_in_place(tmp_path):
    (tmp_path / "library").mkdir()
    entry = make_entry(0)
    for suffix, body in zip(SUFFIXES, (entry.bin, entry.idx), strict=True):
        (tmp_path / f"{entry.name}{suffix}").write_bytes(body)
    before = sorted(tmp_path.rglob("*"))
    with open_store(tmp_path, CacheConfig()) as store, store.shard(entry) as lease:
        assert lease.prefix == tmp_path / entry.name
        assert store.read(f"{entry.name}.idx") == entry.idx
        store.prefetch([entry])
        assert sum(store.stats().values()) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_local_folder_is_checked(tmp_path):
    store, entry = open_store(str(tmp_path), CacheConfig()), make_entry(0)
    with pytest.raises(
        MissingError, match=r"train-00000-000\.bin cannot be found .*No such file.*prepare the corpus again"
    ):
        store.shard(entry)
    with pytest.raises(MissingError, match=r"manifest\.json does not exist"):
        store.read("manifest.json")
    (tmp_path / "library").mkdir()
    with pytest.raises(StoreError, match=r"library cannot be read \(Is a directory\)"):
        store.read("library")
    for suffix in SUFFIXES:
        (tmp_path / f"{entry.name}{suffix}").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"train-00000-000\.bin has 5 bytes, the manifest says 3000"):
        store.shard(entry)


@pytest.mark.parametrize("kind", ["s3", "http", "file", "memory"])
def test_shards_and_small_files_from_any_place(kind, proxy, tmp_path, open_s3, open_memory, server):
    entry = make_entry(1)
    if kind == "s3":
        store = open_s3()
    elif kind == "memory":
        store = open_memory()
    elif kind == "http":
        store = open_store(f"{proxy.endpoint}/{BUCKET}/c/", CacheConfig(folder=str(tmp_path / "cache"), **FAST))
    else:
        (tmp_path / "far" / "library").mkdir(parents=True)
        for suffix, body in zip(SUFFIXES, (entry.bin, entry.idx), strict=True):
            (tmp_path / "far" / f"{entry.name}{suffix}").write_bytes(body)
        store = open_store(f"file://{tmp_path}/far", CacheConfig(folder=str(tmp_path / "cache"), **FAST))
    with store, store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
        assert lease.prefix.is_relative_to(tmp_path / "cache")
        assert store.read(f"{entry.name}.idx") == entry.idx
        assert store.location.startswith(f"{kind}://")
        with pytest.raises(MissingError, match=rf"{kind}://.*/absent does not exist \(3 tries"):
            store.read("absent")


def test_a_shard_of_several_blocks_and_of_none(server, open_s3, proxy):
    sizes = (2 * BLOCK, BLOCK + 1, 0, 1)
    for number, size in enumerate(sizes):
        entry = Entry(f"big-{number}", random.Random(size).randbytes(size), b"i" * number)
        put(server, entry)
        with open_s3().shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
    assert proxy.counts()["c/big-0.bin"] == 2
    assert proxy.counts()["c/big-1.bin"] == 2


def test_a_real_shard_is_mapped_from_the_cache(server, open_s3, tmp_path):
    with ShardWriter(tmp_path / "real", np.uint16) as writer:
        writer.add(np.arange(500))
        written = writer.close()
    put(server, Entry("real", *((tmp_path / f"real{suffix}").read_bytes() for suffix in SUFFIXES)))
    with open_s3().shard(ShardEntry(name="real", bytes=0, **written._asdict())) as lease:
        assert Shard(lease.prefix).read(0, 500).tolist() == list(range(500))


def test_a_web_server_that_knows_no_ranges_and_a_name_that_needs_quoting(tmp_path):
    entry = Entry("my shard #1 100%", random.Random(2).randbytes(BLOCK + 5), b"")
    for suffix, body in zip(SUFFIXES, (entry.bin, entry.idx), strict=True):
        (tmp_path / f"{entry.name}{suffix}").write_bytes(body)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        cfg = CacheConfig(folder=str(tmp_path / "cache"), **FAST)
        with open_store(f"http://127.0.0.1:{server.server_port}", cfg) as store, store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
        server.shutdown()


def test_what_cannot_be_opened(tmp_path):
    cfg = CacheConfig(folder=str(tmp_path / "cache"))
    with pytest.raises(StoreError, match=r"carrier-pigeon://x cannot be opened .*expected a folder, or a URL"):
        open_store("carrier-pigeon://x", cfg)
    wrong = CacheConfig(folder=str(tmp_path / "cache"), options={"endpoint": "http://127.0.0.1:1"})
    with pytest.raises(StoreError, match=r"cannot be read: TypeError: .*'endpoint'.*data\.cache\.options"):
        open_store("s3://bucket/c", wrong).read("manifest.json")
    assert is_url("s3://bucket")
    assert not is_url(tmp_path)


@pytest.mark.parametrize(
    ("url", "module", "install"), [("s3://b/c", "s3fs", "longhaul[s3]"), ("gs://b/c", "gcsfs", "gcsfs")]
)
def test_a_missing_driver(url, module, install, tmp_path):
    script = f"""
    import sys
    sys.modules[{module!r}] = None
    from data.store import CacheConfig, StoreError, open_store
    try:
        open_store({url!r}, CacheConfig(folder={str(tmp_path)!r}))
    except StoreError as error:
        print(error)
    """
    said = run_script(script).stdout
    assert re.search(
        rf"{url}: the driver for \w+:// is not installed .*install it with: pip install '?{re.escape(install)}", said
    )


def run_script(script, **options):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE, timeout=LONG_S, **options)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"secret": "x"}, {"key": "x"}, {"client_kwargs": {"aws_secret_access_key": "x"}}, {"token": 7}, {"sas": "x"}],
)
def test_credentials_do_not_belong_in_the_config(options):
    with pytest.raises(ValidationError, match=r"data\.cache\.options has .*would be saved with the run"):
        CacheConfig(options=options)
    CacheConfig(options={"endpoint_url": "http://127.0.0.1:1", "anon": True, "token": "anon"})


def test_a_cache_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        StoreError, match=r"cache folder .*file/cache cannot be used \(Not a directory\).*data\.cache\.folder"
    ):
        open_store("memory://c", CacheConfig(folder=str(tmp_path / "file" / "cache")))


def test_the_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_store("memory://c", CacheConfig()).close()
    assert default_folder().parent == tmp_path
    os.chown(default_folder(), os.getuid() + 1, -1) if os.getuid() == 0 else pytest.skip(
        "only root can give a folder away"
    )
    with pytest.raises(StoreError, match=r"longhaul-cache-\d+ cannot be used \(it belongs to another user\)"):
        open_store("memory://c", CacheConfig())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who may not write")
def test_a_read_only_cache_folder(tmp_path):
    script = f"""
    import os
    from data.store import CacheConfig, StoreError, open_store
    os.chdir({str(tmp_path)!r})  # the folders above may not be open to others
    os.setuid(65534)
    try:
        open_store("memory://c", CacheConfig(folder="cache"))
    except StoreError as error:
        print(error)
    """
    (tmp_path / "cache").mkdir(mode=0o555)
    assert "cache folder cache cannot be used (Permission denied)" in run_script(script).stdout


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "argument", "times"),
    [
        (Fault.SLOW_DOWN, None, 4),
        pytest.param(Fault.ERROR, (500, "InternalError"), 3, marks=SLOW),
        (Fault.TRUNCATED, None, 3),
        pytest.param(Fault.SHORT, None, 2, marks=SLOW),
        pytest.param(Fault.RESET, None, 3, marks=SLOW),
        (Fault.CORRUPT, None, 2),
        (Fault.MISSING, None, 2),
        (Fault.STALL, None, 1),
    ],
)
def test_a_fault_that_passes_is_survived(fault, argument, times, proxy, open_s3, caplog):
    entry = make_entry(2)
    store = open_s3(timeout_s=0.3 if fault is Fault.STALL else LONG_S)
    proxy.fault(f"{entry.name}.bin", fault, argument, times)
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
    assert store.stats()["retries"] >= times  # a busy machine may stall once more
    assert proxy.counts()[f"c/{entry.name}.bin"] >= times + 1
    assert caplog.text.count("train-00002-000.bin: try ") == store.stats()["retries"]


@pytest.mark.slow
def test_a_slow_store_is_waited_for(proxy, open_s3):
    entry = make_entry(2)
    proxy.fault(f"{entry.name}.bin", Fault.TRICKLE, 6000)
    store = open_s3()
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
    assert store.stats()["retries"] == 0


@pytest.mark.parametrize(
    ("fault", "argument", "tries", "kind", "match"),
    [
        (Fault.SLOW_DOWN, None, 6, StoreError, r"be read: 6 tries in .* the last: OSError: .*SlowDown.*retries \(5\)"),
        pytest.param(Fault.RESET, None, 6, StoreError, r"6 tries .*last: ClientPayloadError.*Check the store", marks=SLOW),
        pytest.param(Fault.STALL, None, 6, StoreError, r"6 tries .*came within data\.cache\.timeout_s=0\.[12]", marks=SLOW),
        (Fault.TRICKLE, 100, 6, StoreError, r"6 tries .*came within data\.cache\.timeout_s=0\.[12]"),
        (Fault.MISSING, None, 3, MissingError, r"does not exist \(3 tries, the last: FileNotFoundError.*removed or renamed"),
        (Fault.ERROR, (403, "AccessDenied"), 1, StoreError, r"cannot be read: PermissionError: AccessDenied.*AWS_PROFILE"),
        (Fault.CORRUPT, None, 3, DifferentError, r"has xxh3-64 \w{16}, the manifest says .* of xxh3-64 \w{16} \(3 tries\)"),
        pytest.param(Fault.SHORT, None, 3, DifferentError, r"has 1500 bytes, the manifest says 3000 bytes", marks=SLOW),
    ],
)  # fmt: skip
def test_a_fault_that_stays_is_told(fault, argument, tries, kind, match, proxy, open_s3, tmp_path):
    entry = make_entry(3)
    store = open_s3(timeout_s=0.2 if fault in (Fault.STALL, Fault.TRICKLE) else LONG_S)
    store.read("manifest.json")  # connected: that takes a while, and would count
    proxy.fault(f"{entry.name}.bin", fault, argument)
    with pytest.raises(kind, match=rf"s3://{BUCKET}/c/{entry.name}\.bin .*{match}"):
        store.shard(entry)
    assert proxy.counts()[f"c/{entry.name}.bin"] == tries
    assert local_shards(tmp_path / "cache") == []  # its place is free again
    proxy.heal()
    with open_s3().shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)


@pytest.mark.parametrize("change", ["rewritten", "appended to", pytest.param("cut", marks=SLOW), "emptied"])
def test_an_object_that_is_not_the_manifests(change, server, open_s3):
    entry = make_entry(4)
    other = make_entry(5).bin
    body = {"rewritten": other, "appended to": entry.bin + b"!", "cut": entry.bin[:10], "emptied": b""}[change]
    found = {
        "rewritten": f"xxh3-64 {xxhash.xxh3_64_hexdigest(other)}", "appended to": "more than 3000 bytes",
        "cut": "10 bytes", "emptied": "0 bytes",
    }[change]  # fmt: skip
    server.put("c/changed.bin", body)
    server.put("c/changed.idx", entry.idx)
    with pytest.raises(DifferentError, match=rf"has {found}, the manifest says 3000 bytes of xxh3-64 {entry.bin_xxh3}"):
        open_s3().shard(entry._replace(name="changed"))


def test_an_outage_ends_the_run_whatever_retries_says(proxy, open_s3):
    store = open_s3(retries=10**6, outage_s=0.3, backoff_s=0.05)
    proxy.stop()
    with pytest.raises(
        StoreError, match=r"could not be read: \d+ tr.* in .*the last: .*data\.cache\.outage_s \(0\.3\)"
    ):
        store.shard(make_entry(0))


def test_a_store_that_comes_back_is_used_again(proxy, open_s3):
    entry, store = make_entry(0), open_s3(retries=1000, backoff_s=0.02)
    proxy.stop()

    def come_back():
        wait_for(lambda: store.stats()["retries"] > 0)
        proxy.start()

    threading.Thread(target=come_back).start()
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
    assert store.stats()["retries"] > 0


def test_what_arrived_is_kept_when_the_line_breaks(server, proxy, open_s3):
    """Two blocks, each interrupted once, and one more try allowed: what arrives between them counts."""
    entry = Entry("long", random.Random(1).randbytes(BLOCK + 1000), b"i")
    put(server, entry)
    store = open_s3(retries=1)
    proxy.fault("long.bin", Fault.RESET, times=1)
    proxy.fault("long.bin", Fault.TRICKLE, 10**9, times=1)  # passes, and uses up the place of the second request
    proxy.fault("long.bin", Fault.RESET, times=1)
    store.shard(entry).release()
    assert proxy.passes()["c/long.bin"] == 2  # the first block twice
    assert proxy.counts()["c/long.bin"] == 4


class Pauses(threading.Event):
    """Notes how long it is waited for, and does not wait."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        return False


def pauses(name, count=12):
    stop = Pauses()

    def run():
        tries = Tries(CacheConfig(retries=count), stop=stop)
        for _ in range(count):
            tries.failed("s3://b/c", "no answer")

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    return stop.pauses


def test_pauses_double_and_differ_between_ranks():
    found = pauses("one")
    for number, pause in enumerate(found):
        longest = min(0.5 * 2**number, 30)
        assert longest / 2 <= pause <= longest
    assert found == pauses("one")
    assert all(a != b for a, b in zip(found, pauses("other"), strict=True))


def test_content_that_is_another_each_time_is_told_too():
    tries = Tries(CacheConfig(retries=3), stop=Pauses())
    for found in ("1 bytes", "2 bytes", "3 bytes"):
        tries.differs("s3://b/c", found, "9 bytes")
    with pytest.raises(DifferentError, match=r"s3://b/c has 4 bytes, the manifest says 9 bytes \(4 tries\)"):
        tries.differs("s3://b/c", "4 bytes", "9 bytes")


def test_credentials_are_never_shown(proxy, tmp_path, caplog):
    secrets = ["hunter2%21", "hunter2!", "c2lnbmF0dXJl", "AKIAEXAMPLEKEY"]
    url = (
        f"http://someone:{secrets[0]}@127.0.0.1:{proxy.port}/{BUCKET}/c"
        f"?X-Amz-Credential={secrets[3]}%2Fus&X-Amz-Signature={secrets[2]}"
    )
    store = open_store(url, CacheConfig(folder=str(tmp_path / "cache"), **{**FAST, "retries": 2}))
    entry, said = make_entry(0), [store.location]
    with store.shard(entry) as lease:  # the query goes with every name
        assert content(lease) == (entry.bin, entry.idx)
    for fault, argument in ((Fault.SLOW_DOWN, None), (Fault.ERROR, (403, "AccessDenied")), (Fault.MISSING, None)):
        proxy.heal()
        proxy.fault("absent", fault, argument)
        with pytest.raises(StoreError, match=rf"http://\*\*\*@127\.0\.0\.1:{proxy.port}/{BUCKET}/c/absent ") as caught:
            store.read("absent")
        said += [str(caught.value), str(caught.getrepr(style="native"))]
    proxy.stop()
    with pytest.raises(StoreError, match="could not be read") as caught:
        store.read("absent")
    said += [str(caught.value), *(record.getMessage() for record in caplog.records if record.name.startswith("data."))]
    # in a driver's own words, and of another URL, such as where a redirect leads
    said += [Remote(url, CacheConfig()).redact(f"login as someone with {secrets[1]}, {secrets[2]} for {secrets[3]}/us")]
    said += [Remote("memory://c", CacheConfig()).redact(f"https://a:{secrets[1]}@b/c?sig={secrets[2]}")]
    assert not [secret for secret in secrets if secret in "\n".join(said)]
    store.close()


# --- the cache ------------------------------------------------------------------------------------------------------


def test_a_hit_asks_the_store_for_nothing(proxy, open_s3, tmp_path):
    entry = make_entry(0)
    stores = [open_s3(), open_s3()]
    leases = [store.shard(entry) for store in stores * 3]
    assert len({lease.prefix for lease in leases}) == 1
    assert len(proxy.requests) == 2
    assert [(store.stats()["fetches"], store.stats()["hits"]) for store in stores] == [(1, 2), (0, 3)]
    assert stores[0].stats()["fetched_bytes"] == len(entry.bin) + len(entry.idx)
    for lease in leases * 2:  # a second release does nothing
        lease.release()


@pytest.mark.slow
def test_the_same_content_is_kept_once_whatever_its_name(server, proxy, open_s3):
    entry = make_entry(0)
    put(server, entry._replace(name="copy"))
    store = open_s3()
    with store.shard(entry) as lease, store.shard(entry._replace(name="copy")) as copy:
        assert lease.prefix == copy.prefix
    assert proxy.counts()["c/copy.bin"] == 0


def test_the_least_recently_used_goes(open_memory, tmp_path):
    store, entries = open_memory(shards=2), [make_entry(n) for n in range(3)]
    for n, left in ((0, [0]), (1, [0, 1]), (0, [0, 1]), (2, [0, 2]), (1, [1, 2])):
        store.shard(entries[n]).release()
        assert local_shards(tmp_path / "cache") == sorted(entries[m].files.key for m in left)
    assert store.stats()["evictions"] == 2


def test_what_is_in_use_stays(open_memory, tmp_path):
    store, entries = open_memory(shards=2, wait_s=0.2), [make_entry(n) for n in range(3)]
    first, second = store.shard(entries[0]), store.shard(entries[1])
    again = store.shard(entries[0])
    first.release()
    match = (
        r"memory://c/library/train-00002-000 could not be had for 0\.2 s .*of the 2 shards .* raise data\.cache\.shards"
    )
    with pytest.raises(StoreError, match=match):
        store.shard(entries[2])
    assert content(again) == (entries[0].bin, entries[0].idx)
    second.release()
    with store.shard(entries[2]):
        assert local_shards(tmp_path / "cache") == sorted([entries[0].files.key, entries[2].files.key])


def test_a_caller_goes_on_when_a_shard_is_released(open_memory):
    store, other = open_memory(shards=1), open_memory(shards=1)
    lease = store.shard(make_entry(0))
    threading.Timer(0.2, lease.release).start()
    with other.shard(make_entry(1)) as lease:
        assert content(lease)[0] == make_entry(1).bin
    assert other.stats()["wait_s"] > 0.1


def test_a_lower_bound_is_kept_from_the_start(open_memory, tmp_path):
    with open_memory(shards=4) as store:
        for n in range(4):
            store.shard(make_entry(n)).release()
    open_memory(shards=2)
    assert local_shards(tmp_path / "cache") == sorted(make_entry(n).files.key for n in (2, 3))


@pytest.mark.parametrize("damage", ["a bit", "cut", "removed", "index"])
@pytest.mark.parametrize("again", ["at once", "in a later run"])
def test_a_damaged_copy_is_fetched_again(damage, again, open_memory, caplog):
    entry, store = make_entry(0), open_memory()
    lease = store.shard(entry)
    lease.release()
    path = Path(f"{lease.prefix}{'.idx' if damage == 'index' else '.bin'}")
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 7)
    else:
        body = bytearray(path.read_bytes())
        body[3] ^= 1
        path.write_bytes(body)
    if again == "in a later run":
        store.close()
        store = open_memory()
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
    assert ("its copy in the cache is damaged; it is fetched again" in caplog.text) == (damage in ("a bit", "index"))
    store.shard(entry).release()
    assert store.stats()["hits"] == 1


def test_a_later_run_reads_what_it_adopts(open_memory, caplog):
    """A disk may lose bits without any time of change: then only the hash tells."""
    entry, store = make_entry(0), open_memory()
    for rot, fetches in ((False, 0), (True, 1)):
        lease = store.shard(entry)
        lease.release()
        store.close()
        if rot:
            path, state = Path(f"{lease.prefix}.bin"), lease.prefix.parent / "state"
            path.write_bytes(b"x" + entry.bin[1:])
            found, known = path.stat(), json.loads(state.read_text())
            known["files"][0] = [found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
            state.write_text(json.dumps(known))
        store = open_memory()
        with store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
        assert store.stats()["fetches"] == fetches


def test_a_damaged_copy_in_use_is_replaced_after_its_use(open_memory):
    entry, reader, store = make_entry(0), open_memory(), open_memory(wait_s=0.2)
    lease = reader.shard(entry)
    Path(f"{lease.prefix}.bin").write_bytes(b"x" + entry.bin[1:])
    with pytest.raises(StoreError, match=r"another process has been at it all the time; look for a stopped process"):
        store.shard(entry)
    lease.release()
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)


def test_a_touched_copy_in_use_is_checked_and_shared(open_memory):
    entry, reader, store = make_entry(0), open_memory(), open_memory()
    with reader.shard(entry) as lease:
        os.utime(f"{lease.prefix}.bin")
        with store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
    assert store.stats()["fetches"] == 0


def test_leftovers_are_taken_over(open_memory, tmp_path):
    store, entries = open_memory(shards=2), [make_entry(n) for n in range(3)]
    for n, name in ((0, "shard.bin.tmp"), (1, None)):  # a killed fetch, and a killed removal
        folder = tmp_path / "cache" / "shards" / entries[n].files.key
        folder.mkdir()
        (folder / name).write_bytes(b"half") if name else None
    (tmp_path / "cache" / "shards" / "lost+found").mkdir()
    for entry in entries * 2:
        with store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
            assert sorted(path.name for path in lease.prefix.parent.iterdir()) == ["shard.bin", "shard.idx", "state"]
        assert len(local_shards(tmp_path / "cache")) <= 2 + 1
    (tmp_path / "cache" / "shards" / entries[2].files.key / "state").write_text("cut off by a kill {")
    store.shard(entries[2]).release()


def test_a_locked_folder_is_told(open_memory, tmp_path):
    store = open_memory(wait_s=0.1)
    with open(tmp_path / "cache" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"cache/lock has been locked for 0\.1 s"):
            store.shard(make_entry(0))


def test_a_cache_folder_that_goes_away_is_told(open_memory, tmp_path):
    store = open_memory()
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"cache folder .*cache cannot be used \(No such file"):
        store.shard(make_entry(0))


@pytest.mark.parametrize("hash_", ["", "../../../etc", "0123456789ABCDEF", "0123456789abcdef0"])
def test_hashes_that_are_none(hash_, open_memory):
    entry = type("Named", (), {"name": "a", "bin_bytes": 1, "idx_bytes": 1, "bin_xxh3": hash_, "idx_xxh3": "0" * 16})
    with pytest.raises(StoreError, match=r"shard 'a' has the hashes .* not xxh3-64"):
        open_memory().shard(entry)


def test_a_closed_store_gives_nothing(open_memory):
    store = open_memory(prefetch=1)
    lease = store.shard(make_entry(0))
    store.close()
    store.close()
    for call in (lambda: store.shard(make_entry(0)), lambda: store.read("x"), lambda: store.prefetch([])):
        with pytest.raises(StoreError, match=r"the store memory://c was closed"):
            call()
    assert content(lease)[0] == make_entry(0).bin  # leases outlive it
    lease.release()


def test_closing_ends_a_caller_that_waits(open_memory, proxy, open_s3):
    store = open_s3(retries=10**6, backoff_s=30.0)
    proxy.stop()
    threading.Timer(0.3, store.close).start()
    with pytest.raises(StoreError, match="was closed"):
        store.shard(make_entry(0))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW) for seed in (1, 2))])
def test_threads_and_stores_never_keep_more_than_the_bound(seed, open_memory, tmp_path):
    """Five users of two stores, each with one shard at a time and wishes for others; the bound is three."""
    stores, over, failed, done = [open_memory(shards=3, prefetch=2) for _ in range(2)], [], [], threading.Event()

    def use(number):
        rng = random.Random(100 * seed + number)
        try:
            for _ in range(30):
                store, entry = rng.choice(stores), make_entry(rng.randrange(8))
                store.prefetch([make_entry(rng.randrange(8)) for _ in range(rng.randrange(3))])
                with store.shard(entry) as lease:
                    assert content(lease) == (entry.bin, entry.idx)
        except BaseException as error:
            failed.append(error)
            raise

    def watch():
        while not done.is_set():
            if len(found := local_shards(tmp_path / "cache")) > 3:
                over.append(found)

    watcher, users = threading.Thread(target=watch), [threading.Thread(target=use, args=(n,)) for n in range(3)]
    for thread in (watcher, *users):
        thread.start()
    for thread in users:
        thread.join()
    done.set()
    watcher.join()
    assert not failed
    assert not over
    assert stores[0].stats()["evictions"] > 0


# --- several processes ----------------------------------------------------------------------------------------------

PROCESS = """
import os, sys, time
sys.path[:0] = ["tests/data", "."]
from test_store import BUCKET, FAST, CacheConfig, content, make_entry, open_store
folder, endpoint, shards, *order = sys.argv[1:]
cfg = CacheConfig(**{**FAST, "folder": folder, "shards": int(shards), "options": {"endpoint_url": endpoint}})
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def start_process(proxy, tmp_path):
    """start_process(script, shards, *order) -> a process that has `cfg` and `order`, stopped before its first line."""
    processes = []

    def start(script, shards, *order):
        arguments = [str(tmp_path / "cache"), proxy.endpoint, str(shards), *map(str, order)]
        command = [sys.executable, "-c", PROCESS + textwrap.dedent(script), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def go(*processes):
    """Let them begin together."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")


READ_ALL = """
with open_store(f"s3://{BUCKET}/c", cfg) as store:
    for number in map(int, order):
        entry = make_entry(number)
        with store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
            time.sleep(0.01)
print("done", flush=True)
"""


def test_processes_fetch_each_file_once_and_keep_the_bound(start_process, proxy, tmp_path):
    together = [start_process(READ_ALL, 8, *range(6)), start_process(READ_ALL, 8, *reversed(range(6)))]
    go(*together)
    assert [process.stdout.readline() for process in together] == ["done\n"] * 2
    assert set(proxy.counts().values()) == {1}
    assert len(proxy.counts()) == 12


@pytest.mark.slow
def test_many_processes_never_keep_more_than_the_bound(start_process, proxy, tmp_path):
    orders = [random.Random(seed).choices(range(8), k=60) for seed in range(4)]
    processes, over = [start_process(READ_ALL, 4, *order) for order in orders], []
    go(*processes)
    while any(process.poll() is None for process in processes):
        if len(found := local_shards(tmp_path / "cache")) > 4:
            over.append(found)
    assert [process.stdout.readline() for process in processes] == ["done\n"] * 4
    assert not over
    assert max(proxy.passes().values()) > 1  # some were evicted, and fetched again


def test_a_fetch_that_is_killed_is_taken_over(start_process, proxy, open_s3, tmp_path):
    entry = make_entry(6)
    proxy.fault(f"{entry.name}.idx", Fault.STALL, times=1)
    process = start_process(READ_ALL, 2, 6)
    go(process)
    wait_for(lambda: list((tmp_path / "cache").glob("shards/*/shard.idx.tmp")))
    waiting, got = open_s3(shards=2), []
    thread = threading.Thread(target=lambda: got.append(content(waiting.shard(entry))))
    thread.start()
    time.sleep(0.1)
    assert not got  # it waits for the process that fetches
    assert proxy.counts()[f"c/{entry.name}.idx"] == 1
    process.send_signal(signal.SIGKILL)
    thread.join(LONG_S)
    assert got == [(entry.bin, entry.idx)]
    assert [path.name for path in (tmp_path / "cache").rglob("*.tmp")] == []


def test_a_lease_ends_with_its_process_although_a_child_of_it_lives(start_process, open_s3):
    script = """
    store = open_store(f"s3://{BUCKET}/c", cfg)
    lease = store.shard(make_entry(0))
    child = os.fork()
    if child == 0:
        try:
            store.shard(make_entry(0))
        except ValueError as error:
            os.write(1, f"{error}\\n".encode())  # one write: two processes share the pipe
        time.sleep(60)
        os._exit(0)
    os.write(1, f"{child}\\n".encode())
    time.sleep(60)
    """
    process = start_process(script, 1)
    go(process)
    said = sorted(process.stdout.readline().strip() for _ in range(2))
    child = int(said[0])
    try:
        assert re.search(r"was opened in process \d+ and is used in process \d+; open one in each process", said[1])
        with pytest.raises(StoreError, match=r"raise data\.cache\.shards"):
            open_s3(shards=1, wait_s=0.2).shard(make_entry(1))
        process.kill()
        process.wait()
        os.kill(child, 0)
        open_s3(shards=1).shard(make_entry(1)).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_who_waits_for_a_stuck_process_is_told(start_process, proxy, open_s3, tmp_path):
    proxy.fault(".idx", Fault.STALL)
    process = start_process(READ_ALL, 2, 0)
    go(process)
    wait_for(lambda: list((tmp_path / "cache").glob("shards/*/shard.idx.tmp")))
    with pytest.raises(StoreError, match=r"could not be had for 0\.2 s .*another process has been at it all the time"):
        open_s3(wait_s=0.2).shard(make_entry(0))


def can_mount():
    try:
        done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs unshare and user namespaces, to mount a small disk")
@pytest.mark.fault(18)
def test_a_full_disk_makes_room_and_is_told_when_it_cannot(tmp_path):
    """A disk of 1 MiB, shards of 330 kB and a bound of 8: two shards fit."""
    script = f"""
    import logging, sys
    sys.path[:0] = ["tests/data", "."]
    from test_store import *
    memory = fsspec.filesystem("memory")
    entries = [make_entry(n, 300_000) for n in range(5)]
    for entry in entries:
        memory.pipe_file(f"/c/{{entry.name}}.bin", entry.bin)
        memory.pipe_file(f"/c/{{entry.name}}.idx", entry.idx)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    with open_store("memory://c", CacheConfig(**{{**FAST, "folder": {str(tmp_path)!r}, "shards": 8}})) as store:
        for entry in entries * 2:
            with store.shard(entry) as lease:
                assert content(lease) == (entry.bin, entry.idx)
        leases = [store.shard(entry) for entry in entries[:3]]
        try:
            store.shard(entries[4])
        except StoreError as error:
            print(error)
        leases[0].release()
        store.shard(entries[4]).release()
        print("evictions", store.stats()["evictions"])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    line = f"exec 3<{tmp_path}/script.py && mount -t tmpfs -o size=1m tmpfs {tmp_path} && {sys.executable} - <&3"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", line], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    assert "its disk is full; a shard was removed from it" in done.stdout
    assert re.search(
        r"no space left on its disk, and no shard in it that is not in use.*data\.cache\.shards=8", done.stdout
    )


# --- fetching ahead -------------------------------------------------------------------------------------------------


def test_prefetched_shards_are_hits(proxy, open_s3):
    store, entries = open_s3(prefetch=2), [make_entry(n) for n in range(4)]
    store.prefetch(entries)
    wait_for(lambda: store.stats()["fetches"] == 4)
    proxy.stop()
    for entry in entries:
        with store.shard(entry) as lease:
            assert content(lease) == (entry.bin, entry.idx)
    assert store.stats()["hits"] == 4


def test_prefetching_neither_waits_nor_tells(proxy, open_s3, caplog):
    store, entries = open_s3(prefetch=2, retries=3), [make_entry(n) for n in range(3)]
    proxy.fault(".bin", Fault.SLOW_DOWN)
    store.prefetch(entries)
    wait_for(lambda: sum(proxy.counts().values()) >= 3)
    assert store.stats()["fetches"] == store.stats()["retries"] == 0  # one try each, without a line
    assert caplog.text.count("try ") == 0
    with pytest.raises(StoreError, match="4 tries"):
        store.shard(entries[0])
    proxy.heal()
    with store.shard(entries[0]) as lease:
        assert content(lease) == (entries[0].bin, entries[0].idx)


def test_a_caller_takes_over_from_a_prefetch_that_fails(proxy, open_s3):
    store, entry = open_s3(prefetch=1, timeout_s=0.5), make_entry(0)
    store.read("manifest.json")  # makes the driver's client, which can take half a second: ahead there is one try only
    proxy.fault(f"{entry.name}.bin", Fault.STALL, times=1)
    store.prefetch([entry])
    wait_for(lambda: proxy.counts()[f"c/{entry.name}.bin"])
    with store.shard(entry) as lease:
        assert content(lease) == (entry.bin, entry.idx)
    assert proxy.counts()[f"c/{entry.name}.bin"] >= 2


def test_prefetching_leaves_what_is_in_use_or_fetched_ahead(open_memory, tmp_path):
    # one thread: of two, the quicker may take the third wish before the slower has a place for the second
    store, entries = open_memory(prefetch=1, shards=3), [make_entry(n) for n in range(8)]
    lease = store.shard(entries[0])
    store.prefetch(entries[1:6])
    wait_for(lambda: store.stats()["fetches"] == 3)
    time.sleep(0.3)  # long enough for the others to come, if they could
    assert local_shards(tmp_path / "cache") == sorted(entry.files.key for entry in entries[:3])
    store.shard(entries[1]).release()  # used: it may go now, for the next wish
    wait_for(lambda: entries[3].files.key in local_shards(tmp_path / "cache"))
    with store.shard(entries[7]):  # asked for: even what was fetched ahead goes for it
        assert entries[0].files.key in local_shards(tmp_path / "cache")
        assert len(local_shards(tmp_path / "cache")) == 3
    assert content(lease) == (entries[0].bin, entries[0].idx)
    lease.release()


def test_wishes_that_are_forgotten_make_room_for_others(open_memory, tmp_path):
    store, entries = open_memory(prefetch=1, shards=2), [make_entry(n) for n in range(8)]
    for first in (0, 2, 4):
        store.prefetch(entries[first : first + 2])
        keys = sorted(entry.files.key for entry in entries[first : first + 2])
        wait_for(lambda keys=keys: local_shards(tmp_path / "cache") == keys)


def test_marks_of_a_dead_process_count_for_nothing(open_memory, tmp_path):
    store = open_memory(prefetch=1, shards=1)
    store.shard(make_entry(0)).release()
    state = tmp_path / "cache" / "shards" / make_entry(0).files.key / "state"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"ahead": 2**22 + 1}))  # more than the kernel gives
    store.prefetch([make_entry(1)])
    wait_for(lambda: local_shards(tmp_path / "cache") == [make_entry(1).files.key])


def test_prefetching_stands_back_for_who_waits(open_memory, tmp_path):
    files = make_entry(0).files
    cache = Cache(tmp_path / "cache", 1)
    with cache.waiting():
        assert not isinstance(cache.claim(files, ahead=True), Held)
        held = cache.claim(files)
        assert isinstance(held, Held)
        held.drop()
    held = cache.claim(files, ahead=True)
    assert isinstance(held, Held)
    held.drop()
    cache.close()


def test_closing_does_not_wait_for_a_stalled_prefetch(proxy, open_s3):
    store = open_s3(prefetch=2)
    proxy.fault(".bin", Fault.STALL)
    store.prefetch([make_entry(0), make_entry(1)])
    wait_for(lambda: sum(proxy.counts().values()) == 2)
    store.close()  # the test's own limit of time is the assertion: the stall has no end


def test_a_hanging_driver_without_coroutines_is_left(tmp_path):
    """file:// has no timeout of its own: a FIFO that nobody writes to stands for a network disk that hangs."""
    os.mkfifo(tmp_path / "a.bin")
    cfg = CacheConfig(**{**FAST, "retries": 1, "timeout_s": 0.1, "folder": str(tmp_path / "cache")})
    with (
        open_store(f"file://{tmp_path}", cfg) as store,
        pytest.raises(StoreError, match=r"2 tries .*came within data\.cache\.timeout_s=0\.[12]"),
    ):
        store.read("a.bin")
