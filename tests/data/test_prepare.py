"""Preparing a corpus: the same bytes whoever works on it and however often it is stopped, and nothing mixed."""

import fcntl
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.config import DataConfig
from data.corpus import MANIFEST, Corpus, CorpusError
from data.prepare import PrepareError, TrainTask, held_out, prepare, report, train_tokenizer
from data.shards import Shard
from data.sources import SourceError, Unit, documents, open_source
from data.tokenizer import Tokenizer, TokenizerError

ROOT = Path(__file__).parents[2]
LIBRARY = Path(sysconfig.get_path("stdlib"))


def config(corpus, **changes):
    """Some 100 files of the Python library, 1.2 MB, in 18 units; dotted keys by double underscores."""
    values = {
        "corpus": str(corpus),
        "source": {
            "kind": "text",
            "paths": [f"{LIBRARY}/{name}/*.py" for name in ("asyncio", "email", "email/mime", "json", "xml/*")],
        },
        "tokenizer": {"vocab_size": 600, "train_bytes": 2**17},
        "shard_bytes": 2**16,
        "valid_fraction": 0.2,
        "workers": 2,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    return DataConfig(**values)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != module.LOCK
    }


def identities(folder):
    """What changes when a file is written anew, even with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def write_texts(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return {"kind": "text", "paths": [f"{folder}/*.txt"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, manifest) of a corpus made by two workers without a stop; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("prepare") / "corpus"
    return folder, prepare(config(folder))


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def chosen(tmp_path):
    """Settings that use the session's small tokenizer and train nothing, for tests about something else."""
    folder = tmp_path / "chosen"
    lines = [f"line {number} of a text with some words in it\n" * 20 for number in range(30)]
    module.train(lines, folder, config("x", tokenizer__vocab_size=300).tokenizer)
    return {"tokenizer": {"vocab_size": 300, "path": str(folder)}}


# -- what is written ---------------------------------------------------------------------------------------------------


def test_one_worker_writes_the_same_bytes_as_two(finished, tmp_path):
    prepare(config(tmp_path / "one", workers=1))
    one, two = contents(tmp_path / "one"), contents(finished[0])
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len([name for name in one if name.startswith("train-")]) == 2 * 18


def test_every_document_is_in_one_split_as_it_was(finished):
    folder, manifest = finished
    tokenizer = Tokenizer.load(folder / "tokenizer")
    source = open_source(config(folder).source)
    found = {"train": [], "valid": []}
    for split, entry in manifest.splits.items():
        for shard in entry.shards:
            reader = Shard(folder / shard.name)
            for number in range(reader.n_documents):
                ids = reader.document(number)
                assert ids[-1] == tokenizer.eos_id
                assert tokenizer.eos_id not in ids[:-1]
                found[split].append(tokenizer.decode(ids[:-1]))
    texts = [document.text for unit in source.units(10**9) for document in documents(unit) if hasattr(document, "text")]
    expected = {
        side: [text for text in texts if held_out(text.encode(), 0, 0.2) == (side == "valid")] for side in found
    }
    assert found == expected  # in order, none lost, none twice
    assert not set(found["train"]) & set(found["valid"])
    assert 0.05 < len(found["valid"]) / len(texts) < 0.4
    for split, entry in manifest.splits.items():
        assert (entry.documents, entry.bytes) == (len(found[split]), sum(len(text.encode()) for text in found[split]))
    assert len(texts) + manifest.skipped["empty"] == len(source.files)


def test_the_corpus_opens_and_its_hashes_hold(finished):
    folder, manifest = finished
    for split in ("train", "valid"):
        corpus = Corpus.open(folder, split, seq_len=32)
        corpus.verify()
        assert corpus.n_tokens == manifest.splits[split].tokens
        assert corpus.windows(np.arange(corpus.n_windows)).max() < 600
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.fingerprint == Tokenizer.load(folder / "tokenizer").fingerprint


def test_equal_documents_fall_on_the_same_side(tmp_path, chosen):
    texts = [f"document number {number % 20} " * 30 for number in range(100)]
    source = write_texts(tmp_path / "texts", texts)
    manifest = prepare(config(tmp_path / "corpus", source=source, shard_bytes=2**14, **chosen))
    assert manifest.splits["valid"].documents % 5 == 0  # each of the 20 texts stands there five times
    assert 0 < manifest.splits["valid"].documents < 100


def test_held_out_share_and_seed():
    """A binomial share of 20,000 documents: 6 standard deviations of 0.0021."""
    texts = [str(number).encode() for number in range(20_000)]
    sides = [[held_out(text, seed, 0.1) for text in texts] for seed in (0, 1)]
    assert all(abs(np.mean(side) - 0.1) < 6 * 0.0021 for side in sides)
    assert sides[0] != sides[1]
    assert not any(held_out(text, 0, 0.0) for text in texts)


def test_the_tokenizer_never_sees_held_out_documents(finished, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train", lambda texts, folder, cfg: seen.extend(texts))
    source, cfg = open_source(config("x").source), config("x").tokenizer
    train_tokenizer(TrainTask(tmp_path, Unit(0, source.files, False), cfg, 0, 0.2), None)
    assert len(seen) == finished[1].splits["train"].documents
    assert not any(held_out(text.encode(), 0, 0.2) for text in seen)


def test_without_held_out_split(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", ["one text alone"])
    manifest = prepare(config(tmp_path / "corpus", source=source, valid_fraction=0.0, **chosen))
    assert list(manifest.splits) == ["train"]
    with pytest.raises(CorpusError, match="has no split 'valid'"):
        Corpus.open(tmp_path / "corpus", "valid", 4)


@pytest.mark.parametrize(("fraction", "empty"), [(0.02, "valid"), (0.98, "train")])
def test_too_few_documents_to_split(tmp_path, chosen, fraction, empty):
    source = write_texts(tmp_path / "texts", ["one text", "another text"])
    cfg = config(tmp_path / "corpus", source=source, valid_fraction=fraction, **chosen)
    with pytest.raises(
        PrepareError, match=rf"no document of 2 fell into the {empty} split with .*={fraction} .*and delete"
    ):
        prepare(cfg)
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_a_chosen_tokenizer_is_copied_and_used(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", [f"text {number} of some" for number in range(40)])
    manifest = prepare(config(tmp_path / "corpus", source=source, **chosen))
    assert manifest.tokenizer.fingerprint == Tokenizer.load(tmp_path / "chosen").fingerprint
    assert contents(tmp_path / "corpus" / "tokenizer") == contents(tmp_path / "chosen")
    with pytest.raises(
        PrepareError, match=r"vocab_size=600, but the tokenizer in .*chosen has 300; set .*vocab_size=300"
    ):
        prepare(config(tmp_path / "other", tokenizer__path=str(tmp_path / "chosen")))
    with pytest.raises(TokenizerError, match=r"nowhere/tokenizer.model does not exist"):
        prepare(config(tmp_path / "other", tokenizer__path=str(tmp_path / "nowhere")))
    assert not (tmp_path / "other").exists()


# -- stopped and gone on with ------------------------------------------------------------------------------------------


def start(cfg):
    script = (
        "from data.config import DataConfig; from data.prepare import prepare\n"
        f"prepare(DataConfig(**{cfg.model_dump()!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, start_new_session=True)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended by itself with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_and_resumed_gives_the_same_bytes_and_keeps_what_was_done(finished, tmp_path):
    folder = tmp_path / "corpus"
    process = start(config(folder))
    wait_for(lambda: len(list(folder.glob("records/*.json"))) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = [path.stem for path in folder.glob("records/*.json")]
    assert 3 <= len(done) < 18
    assert not (folder / MANIFEST).exists()
    before = {name: identity for name, identity in identities(folder).items() if name[6:11] in done}
    tokenizer = identities(folder / "tokenizer")
    with pytest.raises(CorpusError, match=r"has no manifest.json, so it is not a finished corpus"):
        Corpus.open(folder, "train", 32)
    (folder / "train-99999.bin.tmp").write_text("left by the kill")
    prepare(config(folder, workers=1))
    assert contents(folder) == contents(finished[0])
    after = identities(folder)
    assert len(before) >= 2 * 3
    assert {name: after[name] for name in before} == before
    assert identities(folder / "tokenizer") == tokenizer


def test_killed_while_the_tokenizer_is_trained(finished, tmp_path):
    folder = tmp_path / "corpus"
    process = start(config(folder))
    wait_for((folder / "plan.json").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "tokenizer").exists()
    prepare(config(folder))
    assert contents(folder) == contents(finished[0])


def test_ctrl_c_ends_the_workers_and_the_next_start_goes_on(finished, tmp_path):
    folder = tmp_path / "corpus"
    process = start(config(folder))
    wait_for(lambda: list(folder.glob("records/*.json")), process)
    process.send_signal(signal.SIGINT)  # to the parent alone; a terminal sends it to all
    process.wait(timeout=5)
    assert process.returncode != 0
    prepare(config(folder))
    assert contents(folder) == contents(finished[0])


def test_finished_returns_at_once_and_needs_no_text(finished, copy, caplog):
    before = identities(copy)
    began = time.perf_counter()
    with caplog.at_level(logging.INFO):
        assert prepare(config(copy)) == finished[1]
    assert time.perf_counter() - began < 0.5
    assert "copy is finished; nothing to do" in caplog.text
    assert identities(copy) == before


def test_finished_without_its_text(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", source=source, **chosen)
    manifest = prepare(cfg)
    shutil.rmtree(tmp_path / "texts")
    assert prepare(cfg) == manifest


def test_a_lost_shard_is_made_again_alone(finished, copy, caplog):
    (copy / "train-00004.bin").write_bytes(b"cut")
    before = identities(copy)
    prepare(config(copy))
    after = identities(copy)
    assert contents(copy) == contents(finished[0])
    assert "1 files are missing or of the wrong size, as " in caplog.text
    rewritten = {name for name in after if before.get(name) != after[name]} - {module.LOCK}
    assert rewritten == {"train-00004.bin", "train-00004.idx", "valid-00004.bin", "valid-00004.idx", MANIFEST} & set(
        after
    )


def test_a_corpus_being_repaired_is_no_corpus(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", source=source, **chosen)
    manifest = prepare(cfg)
    (tmp_path / "corpus" / f"{manifest.splits['train'].shards[0].name}.bin").unlink()
    text = tmp_path / "texts" / "000.txt"
    modified = text.stat().st_mtime_ns
    text.write_bytes(b"\xff" * text.stat().st_size)  # the repair fails
    os.utime(text, ns=(modified, modified))
    with pytest.raises(SourceError, match="is not UTF-8"):
        prepare(cfg)
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_a_damaged_record_is_made_again(finished, copy, caplog):
    (copy / MANIFEST).unlink()
    (copy / "records" / "00002.json").write_text("{")
    prepare(config(copy))
    assert contents(copy) == contents(finished[0])
    assert "00002.json is damaged; the unit is done again" in caplog.text


# -- never mixed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer__vocab_size": 601}, r"data.tokenizer.vocab_size: 600 in the folder, 601 now"),
        ({"tokenizer__split_digits": False}, r"data.tokenizer.split_digits: True in the folder, False now"),
        ({"seed": 1}, r"data.seed: 0 in the folder, 1 now"),
        ({"valid_fraction": 0.25}, r"data.valid_fraction: 0.2 in the folder, 0.25 now"),
        ({"shard_bytes": 2**18}, r"data.shard_bytes: 65536 in the folder, 262144 now"),
        ({"source": {"kind": "embedded"}}, r"data.source.kind: text in the folder, embedded now"),
    ],
)
def test_other_options_are_refused(copy, done, change, match):
    if not done:
        (copy / MANIFEST).unlink()
    before = contents(copy)
    with pytest.raises(
        PrepareError, match=rf"(?s)was begun with other options .*{match}.*put these back, set data.corpus"
    ):
        prepare(config(copy, **change))
    assert contents(copy) == before


def test_another_tokenizer_is_refused(copy, chosen):
    with pytest.raises(PrepareError, match=r"(?s)data.tokenizer.fingerprint: not set in the folder, \w{16} now"):
        prepare(config(copy, **chosen))


def test_changed_text_under_an_unfinished_corpus_is_refused(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", source=source, **chosen)
    prepare(cfg)
    (tmp_path / "corpus" / MANIFEST).unlink()
    (tmp_path / "texts" / "new.txt").write_text("one more")
    with pytest.raises(PrepareError, match=r"(?s)source.documents: 40 in the folder, 41 now.*source.files: "):
        prepare(cfg)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match=r"holds other things \(thesis.tex\) and no plan.json; set data.corpus"):
        prepare(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(PrepareError, match=r"data.corpus=.*thesis.tex is a file; name a folder"):
        prepare(config(tmp_path / "thesis.tex"))


@pytest.mark.parametrize("plan", ["", "[]", "{}"])
def test_a_damaged_plan_is_refused(copy, plan):
    (copy / "plan.json").write_text(plan)
    with pytest.raises(PrepareError, match=r"plan.json is damaged .*delete .*copy and prepare it again"):
        prepare(config(copy))


def test_two_at_a_time_are_refused(copy, monkeypatch):
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.2)
    (copy / MANIFEST).unlink()
    with open(copy / module.LOCK, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match=r"is being prepared by another process; wait for it"):
            prepare(config(copy))


def test_bad_text_stops_everything_and_leaves_no_part(tmp_path, chosen):
    source = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    (tmp_path / "texts" / "030.txt").write_bytes(b"sch\xf6n")
    with pytest.raises(SourceError, match=r"030.txt: byte 3 \(0xF6\) is not UTF-8"):
        prepare(config(tmp_path / "corpus", source=source, **chosen))
    assert not list((tmp_path / "corpus").glob("*.tmp"))
    assert not (tmp_path / "corpus" / MANIFEST).exists()


# -- what is said ------------------------------------------------------------------------------------------------------


def test_report(finished):
    lines = report(finished[1]).splitlines()
    assert lines[0].split() == ["split", "documents", "bytes", "tokens", "bytes/token"]
    train = finished[1].splits["train"]
    assert lines[1].split() == [
        "train", f"{train.documents:,}", f"{train.bytes:,}", f"{train.tokens:,}", f"{train.bytes / train.tokens:.3f}"
    ]  # fmt: skip
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == f"left out: {finished[1].skipped['empty']} empty"


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 5.0, 6.0, 11.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO), module._progress(total=40_000_000) as advance:
        for _ in range(4):
            advance(500, 5_000_000)
    assert [entry.message for entry in caplog.records] == [
        "10.0 of 40.0 MB, 1,000 documents, 2.0 MB/s, 15 s left",
        "20.0 of 40.0 MB, 2,000 documents, 1.8 MB/s, 11 s left",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with module._progress(total=40_000_000) as advance:
        advance(500, 10_000_000)
        advance(500, 10_000_000)
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert "50%" in last
    assert "20.0M/40.0M, 1,000 documents, " in last
    assert "B/s" in last
    assert last.endswith("left")


def test_plan_holds_the_listing(finished):
    plan = json.loads((finished[0] / "plan.json").read_text())
    assert plan["options"]["tokenizer"]["vocab_size"] == 600
    assert plan["listing"]["documents"] == len(open_source(config("x").source).files)
