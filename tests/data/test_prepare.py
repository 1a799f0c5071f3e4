"""Preparing a corpus: the same bytes whoever works on it and however often it is stopped, and nothing mixed."""

import fcntl
import gzip
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import plan as locks
from data import prepare as module
from data import units
from data.clean import CleanError
from data.config import DataConfig
from data.corpus import Corpus
from data.manifest import MANIFEST, CorpusError
from data.plan import LOCK
from data.prepare import PrepareError, held_out, prepare, prepare_part, report
from data.shards import Shard
from data.sources import Document, Limits, SourceError, documents, open_source
from data.tokenizer import TokenizerError, load_tokenizer, train

ROOT = Path(__file__).parents[2]
LIBRARY = Path(sysconfig.get_path("stdlib"))
FOLDERS = ("asyncio", "email", "email/mime", "json", "xml/*")
N_UNITS = {"library": 19, "notes": 5}  # of the two sources below


def write_notes(path, texts):
    """JSON lines, packed where the name says so."""
    content = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def notes(count=1500, seed=0):
    rng = random.Random(seed)
    line = "{} saw {} and thought of \u592a\u5b97\u7687\u5e1d {}"  # now and then a character that no other text has
    return [
        "\n".join(line.format(*(rng.choice(("she", "he", "Ada", "no one")) for _ in range(2)), rng.randrange(99))
                  for _ in range(rng.randrange(1, 9)))
        + ("" if number % 100 else chr(0x4E00 + number)) for number in range(count)
    ]  # fmt: skip


def config(corpus, **changes):
    """Some 100 files of the Python library, 1.2 MB, in 19 units; dotted keys by double underscores."""
    values = {
        "corpus": str(corpus),
        "sources": [{"kind": "text", "name": "library", "paths": [f"{LIBRARY}/{name}/*.py" for name in FOLDERS]}],
        "tokenizer": {"vocab_size": 600, "train_bytes": 2**17},
        "shard_bytes": 2**16,
        "valid_fraction": 0.2,
        "workers": 2,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values.get(section, {}) | {name: value} if name else value
    return DataConfig.model_validate(values)


def mixture(corpus, folder, **changes):
    """Two sources, the library and some JSON lines in folder."""
    if not (folder / "notes.jsonl").exists():
        write_notes(folder / "notes.jsonl", notes())
    library = config(corpus).sources[0].model_dump(exclude={"weight"})
    both = [library | {"weight": 3.0}, {"kind": "jsonl", "name": "notes", "paths": [str(folder / "notes.jsonl")],
                                        "field": "text", "weight": 1.0}]  # fmt: skip
    return config(corpus, **{"sources": both, **changes})


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(LOCK)
    }


def identities(folder):
    """What changes when a file is written anew, even with the same bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(LOCK)
    }


def unit_of(name):
    """(source, number) of a file of a unit, else None."""
    parts = name.replace("records/", "").split("/")
    if len(parts) != 2 or parts[0] == "tokenizer":
        return None
    return parts[0], parts[1].removesuffix(".json").replace("train-", "").replace("valid-", "")[:5]


def write_texts(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return [{"kind": "text", "paths": [f"{folder}/*.txt"]}]


def texts_of(folder, manifest, source, split):
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for shard in manifest.sources[source].splits[split].shards:
        reader = Shard(folder / shard.name)
        for number in range(reader.n_documents):
            ids = reader.document(number)
            assert ids[-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in ids[:-1]
            found.append(tokenizer.decode(ids[:-1]))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the JSON lines of the mixture."""
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, place):
    """(folder, manifest) of a mixture made by two workers without a stop; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("prepare") / "corpus"
    return folder, prepare(mixture(folder, place))


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Settings that use a small tokenizer and train nothing, for tests about something else; one worker is enough."""
    folder = tmp_path_factory.mktemp("tokenizer") / "chosen"
    lines = [f"line {number} of a text with some words in it\n" * 20 for number in range(30)]
    train([(lines, 2**17)], folder, config("x", tokenizer__vocab_size=300).tokenizer)
    return {"tokenizer": {"vocab_size": 300, "path": str(folder)}, "workers": 1}


# -- what is written ---------------------------------------------------------------------------------------------------


def test_one_worker_writes_the_same_bytes_as_two(finished, place, tmp_path):
    prepare(mixture(tmp_path / "one", place, workers=1))
    one, two = contents(tmp_path / "one"), contents(finished[0])
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    for source, count in N_UNITS.items():
        assert len([name for name in one if name.startswith(f"records/{source}/")]) == count
        assert len([name for name in one if name.startswith(f"{source}/train-") and name.endswith("-000.bin")]) > 3


@pytest.mark.parametrize("batch_bytes", [1, 5_000, 2**30])
def test_the_cut_into_batches_does_not_matter(finished, place, tmp_path, monkeypatch, batch_bytes):
    """The worker's own function, here: a document alone, some, all of the unit at once."""
    folder, cfg = tmp_path / "corpus", mixture(tmp_path / "corpus", place)
    shutil.copytree(finished[0] / "tokenizer", folder / "tokenizer")
    monkeypatch.setattr(units, "BATCH_BYTES", batch_bytes)
    work = module._work(cfg, folder, module.Part(), {})
    for unit in (work.units[2], work.units[-1]):
        units.make_shards(units.UnitTask(folder, unit, work.rules, 2 * cfg.shard_bytes, "auto"), lambda *_: None)
    made, expected = contents(folder), contents(finished[0])
    assert len(made) >= 2 + 2 * 3
    assert {name: expected[name] for name in made} == made


def test_every_document_is_in_one_split_as_it_was(finished, place):
    folder, manifest = finished
    for cfg in mixture("x", place).sources:
        source = open_source(cfg, Limits())
        found = {split: texts_of(folder, manifest, source.name, split) for split in ("train", "valid")}
        # in the order of the units
        read = [document for unit in source.units(2**16) for document in documents(unit)]
        texts = [document.text for document in read if isinstance(document, Document)]
        expected = {
            side: [text for text in texts if held_out(text.encode(), 0, 0.2) == (side == "valid")] for side in found
        }
        assert found == expected  # in order, none lost, none twice
        assert not set(found["train"]) & set(found["valid"])
        assert 0.05 < len(found["valid"]) / len(texts) < 0.4
        entry = manifest.sources[source.name]
        for split, part in entry.splits.items():
            assert (part.documents, part.bytes) == (len(found[split]), sum(len(text.encode()) for text in found[split]))
        assert Counter(entry.left_out) == Counter(
            document.reason for document in read if document[0:1] and not isinstance(document, Document)
        )
        tokenizer = load_tokenizer(folder / "tokenizer")
        assert entry.unknown_tokens == sum(tokenizer.unknowns(tokenizer.encode(text)) for text in texts)
    assert manifest.sources["notes"].unknown_tokens > 0
    assert sorted(notes()) == sorted(found["train"] + found["valid"])


def test_the_corpus_opens_and_its_hashes_hold(finished):
    folder, manifest = finished
    for source in manifest.sources:
        for split in ("train", "valid"):
            corpus = Corpus.open(folder, split, 32, source)
            corpus.verify()
            assert corpus.n_tokens == manifest.sources[source].splits[split].tokens
            assert corpus.windows(np.arange(corpus.n_windows)).max() < 600
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.fingerprint == load_tokenizer(folder / "tokenizer").fingerprint


def test_more_text_than_expected_goes_on_in_further_shards(tmp_path, chosen):
    """A packed file that turns out larger than thought, as its one unit holds all of it: parts of at most twice
    shard_bytes, or one document."""
    write_notes(tmp_path / "notes.jsonl.gz", [*["word " * 50] * 80, *["long " * 2000] * 3, *["word " * 50] * 5])
    sources = [{"kind": "jsonl", "paths": [str(tmp_path / "notes.jsonl.gz")], "field": "text"}]
    cfg = config(tmp_path / "corpus", sources=sources, shard_bytes=2**11, valid_fraction=0.0, **chosen)
    shards = prepare(cfg).sources["jsonl"].splits["train"].shards
    assert sum(shard.documents for shard in shards) == 88
    assert {shard.name.rpartition("-")[2] for shard in shards} > {"000", "001"}
    assert sum(shard.bytes == 10_000 for shard in shards) == 3
    assert all(shard.bytes <= 2 * 2**11 or shard.documents == 1 for shard in shards)
    assert [shard.name for shard in shards] == sorted(shard.name for shard in shards)


def test_equal_documents_fall_on_the_same_side(tmp_path, chosen):
    texts = [f"document number {number % 20} " * 30 for number in range(100)]
    sources = write_texts(tmp_path / "texts", texts)
    manifest = prepare(config(tmp_path / "corpus", sources=sources, shard_bytes=2**14, **chosen))
    held = manifest.sources["text"].splits["valid"].documents
    assert held % 5 == 0  # each of the 20 texts stands there five times
    assert 0 < held < 100


def test_held_out_share_and_seed():
    """A binomial share of 20,000 documents: 6 standard deviations of 0.0021."""
    texts = [str(number).encode() for number in range(20_000)]
    sides = [[held_out(text, seed, 0.1) for text in texts] for seed in (0, 1)]
    assert all(abs(np.mean(side) - 0.1) < 6 * 0.0021 for side in sides)
    assert sides[0] != sides[1]
    assert not any(held_out(text, 0, 0.0) for text in texts)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_trained_on_kept_documents_by_weight(finished, place, tmp_path, monkeypatch):
    seen, budgets = [], []

    def note(streams, folder, cfg):
        for stream, n_bytes in streams:
            seen.append(list(stream))
            budgets.append(n_bytes)

    monkeypatch.setattr(units, "train", note)
    work = module._work(mixture(tmp_path, place), tmp_path, module.Part(), {})
    units.train_tokenizer(
        units.TrainTask(tmp_path / "tokenizer", module._draws(work), work.cfg.tokenizer, work.rules), None
    )
    assert budgets == [2**17 * 3 // 4, 2**17 // 4]
    for source, texts in zip(("library", "notes"), seen, strict=True):
        assert len(texts) == finished[1].sources[source].splits["train"].documents
        assert not any(held_out(text.encode(), 0, 0.2) for text in texts)


def test_without_weights_the_tokenizers_sample_is_by_size(place, tmp_path):
    cfg = mixture(tmp_path, place)
    cfg = cfg.model_copy(update={"sources": [source.model_copy(update={"weight": None}) for source in cfg.sources]})
    work = module._work(cfg, tmp_path, module.Part(), {})
    sizes = [source.n_bytes for source in work.sources.values()]
    budgets = [draw.train_bytes for draw in module._draws(work)]
    assert sum(budgets) == 2**17
    assert budgets[0] / budgets[1] == pytest.approx(sizes[0] / sizes[1], rel=1e-3)


def test_a_large_source_is_sampled_at_equal_distances(place, tmp_path):
    cfg = mixture(tmp_path, place, tokenizer__train_bytes=2**16)
    draws = module._draws(module._work(cfg, tmp_path, module.Part(), {}))
    assert [unit.number for unit in draws[0].units] == [*range(0, N_UNITS["library"], 3)]


def test_a_chosen_tokenizer_is_copied_and_used(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", [f"text {number} of some" for number in range(40)])
    manifest = prepare(config(tmp_path / "corpus", sources=sources, **chosen))
    folder = Path(chosen["tokenizer"]["path"])
    assert manifest.tokenizer.fingerprint == load_tokenizer(folder).fingerprint
    assert contents(tmp_path / "corpus" / "tokenizer") == contents(folder)
    with pytest.raises(
        PrepareError, match=r"vocab_size=600, but the tokenizer of .*chosen has 300; set .*vocab_size=300"
    ):
        prepare(config(tmp_path / "other", tokenizer__path=str(folder)))
    with pytest.raises(TokenizerError, match=r"nowhere/tokenizer.model does not exist"):
        prepare(config(tmp_path / "other", tokenizer__path=str(tmp_path / "nowhere")))
    assert not (tmp_path / "other").exists()


# -- nothing in a split ------------------------------------------------------------------------------------------------


def test_without_held_out_split(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", ["one text alone"])
    manifest = prepare(config(tmp_path / "corpus", sources=sources, valid_fraction=0.0, **chosen))
    assert list(manifest.sources["text"].splits) == ["train"]
    with pytest.raises(CorpusError, match="has no split 'valid'"):
        Corpus.open(tmp_path / "corpus", "valid", 4)


@pytest.mark.parametrize(("fraction", "empty"), [(0.02, "valid"), (0.98, "train")])
@pytest.mark.fault(50)
def test_too_few_documents_to_split(tmp_path, chosen, fraction, empty):
    sources = write_texts(tmp_path / "texts", ["one text", "another text"])
    cfg = config(tmp_path / "corpus", sources=sources, valid_fraction=fraction, **chosen)
    with pytest.raises(
        PrepareError, match=rf"no document of 2 .*fell into the {empty} split with .*={fraction} .*and delete"
    ):
        prepare(cfg)
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_one_source_without_a_held_out_document_is_a_warning(tmp_path, chosen, caplog):
    few = write_texts(tmp_path / "few", ["one text", "another text"])[0] | {"name": "few"}
    many = write_texts(tmp_path / "many", [f"text {number}" for number in range(99)])[0] | {"name": "many"}
    manifest = prepare(config(tmp_path / "corpus", sources=[few, many], valid_fraction=0.02, **chosen))
    assert {name: [*entry.splits] for name, entry in manifest.sources.items()} == {
        "few": ["train"], "many": ["train", "valid"]
    }  # fmt: skip
    assert "no document of few is held out, so that there is no validation loss of it" in caplog.text


@pytest.mark.fault(50)
def test_a_source_of_which_nothing_is_left_is_refused(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", ["short"] * 3)
    cfg = config(tmp_path / "corpus", sources=sources, clean={"filters": ["gopher_quality"]}, **chosen)
    with pytest.raises(
        PrepareError, match=r"all 3 documents of source 'text' are left out \(3 filter:gopher_quality\); leave it out"
    ):
        prepare(cfg)


# -- malformed documents -----------------------------------------------------------------------------------------------


def write_bad(folder, bad):
    """600 JSON lines in 12 units, those of the numbers in bad malformed in one of two ways."""
    lines = [json.dumps({"text": f"text number {number} " * 5}) for number in range(600)]
    for number in bad:
        lines[number] = lines[number][:20] if number % 2 else '{"title": 1}'
    (folder / "some.jsonl").write_text("\n".join(lines) + "\n")
    return {"sources": [{"kind": "jsonl", "name": "some", "paths": [str(folder / "some.jsonl")], "field": "text"}],
            "shard_bytes": 5_000}  # fmt: skip


@pytest.mark.fault(44)
def test_a_malformed_document_stops_it_and_the_message_says_how_to_go_on(tmp_path, chosen):
    made = write_bad(tmp_path, [301]) | chosen
    with pytest.raises(PrepareError, match=r"(?s)source 'some': .*some.jsonl.*data.on_bad=skip"):
        prepare(config(tmp_path / "corpus", **made))
    assert not (tmp_path / "corpus" / MANIFEST).exists()
    assert not list((tmp_path / "corpus").rglob("*.tmp"))
    before = identities(tmp_path / "corpus" / "some")
    prepare(config(tmp_path / "corpus", on_bad="skip", **made))  # the same folder: what is done stays
    after = identities(tmp_path / "corpus" / "some")
    assert before
    assert {name: after[name] for name in before} == before


@pytest.mark.fault(44)
def test_malformed_documents_are_left_out_counted_and_listed(tmp_path, chosen):
    bad = [5, 6, 7, 300, 599]
    made = write_bad(tmp_path, bad) | chosen | {"on_bad": "skip"}
    entry = prepare(config(tmp_path / "corpus", **made)).sources["some"]
    assert sum(split.documents for split in entry.splits.values()) == 595
    assert sum(count for reason, count in entry.left_out.items() if reason.startswith("bad:")) == 5
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "bad.jsonl").read_text().splitlines()]
    assert len(listed) == 5
    assert all(entry["source"] == "some" and "some.jsonl" in entry["name"] for entry in listed)
    assert Counter(f"bad:{entry['reason']}" for entry in listed) == entry.left_out
    prepare(config(tmp_path / "two", **made | {"workers": 2}))
    assert contents(tmp_path / "corpus") == contents(tmp_path / "two")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.fault(44)
def test_more_malformed_documents_than_allowed_stop_it(tmp_path, chosen, workers):
    """Outcome whatever the timing: six, in six units, are one too many; then five more are allowed and it goes on."""
    made = write_bad(tmp_path, [5, 105, 205, 305, 405, 505]) | chosen | {"on_bad": "skip", "workers": workers}
    for _ in range(2):
        with pytest.raises(
            PrepareError, match=r"at least 6 malformed documents, more than data.max_bad=5; .*some.jsonl"
        ):
            prepare(config(tmp_path / "corpus", max_bad=5, **made))
        assert not (tmp_path / "corpus" / MANIFEST).exists()
    prepare(config(tmp_path / "corpus", max_bad=6, **made))
    with pytest.raises(PrepareError, match=r"at least 6 malformed documents, more than data.max_bad=5"):
        prepare(config(tmp_path / "corpus", max_bad=5, **made))
    with pytest.raises(PrepareError, match=r"(?s)source 'some': .*data.on_bad=skip"):
        prepare(config(tmp_path / "corpus", **made | {"on_bad": "stop"}))


def test_one_unit_with_too_many_does_not_read_on(tmp_path, chosen):
    made = write_bad(tmp_path, range(10, 600)) | chosen | {"on_bad": "skip", "max_bad": 3, "shard_bytes": 2**20}
    with pytest.raises(
        PrepareError, match=r"at least 4 malformed documents, more than data.max_bad=3; the last .*some"
    ):
        prepare(config(tmp_path / "corpus", **made))


@pytest.mark.fault(45)
def test_bad_text_stops_everything_and_leaves_no_part(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    (tmp_path / "texts" / "030.txt").write_bytes(b"sch\xf6n")
    with pytest.raises(PrepareError, match=r"(?s)030.txt.*UTF-8.*data.on_bad=skip"):
        prepare(config(tmp_path / "corpus", sources=sources, **chosen))
    assert not list((tmp_path / "corpus").rglob("*.tmp"))
    assert not (tmp_path / "corpus" / MANIFEST).exists()


# -- cleaning ----------------------------------------------------------------------------------------------------------


def write_duplicates(folder):
    """Two sources of JSON lines with equal and nearly equal texts in and between them, held-out ones too."""
    rng = random.Random(0)
    base = [" ".join(f"w{rng.randrange(5000)}" for _ in range(80)) for _ in range(60)]
    sources = []
    for name in ("first", "second"):
        texts = []
        for _ in range(150):
            words = rng.choice(base).split()
            if rng.random() < 0.5:
                words[rng.randrange(80)] = "other"
            texts.append(" ".join(words))
        write_notes(folder / f"{name}.jsonl.gz", [*texts, "tiny", ""])
        sources.append({"kind": "jsonl", "name": name, "paths": [str(folder / f"{name}.jsonl.gz")], "field": "text"})
    clean = {"exact": True, "near": {"threshold": 0.7}, "filters": ["gopher_repetition"]}
    return {"sources": sources, "shard_bytes": 2**14, "clean": clean}


def test_duplicates_are_left_out_the_same_way_by_one_and_two(tmp_path, chosen):
    made = write_duplicates(tmp_path)
    manifest = prepare(config(tmp_path / "one", **made | chosen))
    prepare(config(tmp_path / "two", **made | chosen | {"workers": 2}))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not [name for name in contents(tmp_path / "one") if "marks" in name or "sketch" in name]
    kept = {
        split: [text for source in manifest.sources for text in texts_of(tmp_path / "one", manifest, source, split)]
        for split in ("train", "valid")
    }
    assert len(kept["train"] + kept["valid"]) == len(set(kept["train"] + kept["valid"])) <= 61
    assert len(kept["train"] + kept["valid"]) >= 40
    for text in kept["valid"]:  # no near duplicate of it is trained on: at most half of the words at the same places
        assert all(
            sum(a == b for a, b in zip(text.split(), other.split(), strict=False)) < 40 for other in kept["train"]
        )
    for entry in manifest.sources.values():
        assert entry.left_out["duplicate"] > 0
        assert entry.left_out["near_duplicate"] > 0
        assert entry.left_out["empty"] == 1
        assert sum(part.documents for part in entry.splits.values()) + sum(entry.left_out.values()) == 152
    assert "tiny" in kept["train"] + kept["valid"]


@pytest.mark.slow
@pytest.mark.fault(48)
def test_a_text_that_changes_between_the_passes_is_refused(tmp_path, chosen, monkeypatch):
    made = write_duplicates(tmp_path)
    real = module._run

    def run(work, task, units_):
        if task is module.make_shards:
            verdicts = next((work.folder / "clean" / "second").glob("*.verdict.npy"))
            np.save(verdicts, np.load(verdicts)[:-1])
        return real(work, task, units_)

    monkeypatch.setattr(module, "_run", run)
    with pytest.raises(
        CleanError, match=r"of second had \d+ documents when duplicates .* and has \d+ now; let nothing"
    ):
        prepare(config(tmp_path / "corpus", **made | chosen))


@pytest.mark.slow
def test_a_lost_shard_of_a_cleaned_corpus_is_made_again(tmp_path, chosen):
    made = write_duplicates(tmp_path) | chosen
    manifest = prepare(config(tmp_path / "corpus", **made))
    before = contents(tmp_path / "corpus")
    (tmp_path / "corpus" / f"{manifest.sources['second'].splits['train'].shards[0].name}.idx").unlink()
    prepare(config(tmp_path / "corpus", **made))
    assert contents(tmp_path / "corpus") == before


# -- stopped and gone on with ------------------------------------------------------------------------------------------


def start(cfg, *arguments, setting=""):
    script = (
        "from data import prepare; from data.config import DataConfig; from data.prepare import Part, prepare_part\n"
        f"{setting}\n"
        f"prepare_part(DataConfig.model_validate({cfg.model_dump(mode='json')!r}), {', '.join(arguments) or 'Part()'})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, start_new_session=True)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended by itself with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.001)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_gives_the_same_bytes_and_keeps_what_was_done(finished, place, tmp_path):
    folder = tmp_path / "corpus"
    process = start(mixture(folder, place))
    wait_for(lambda: len(list(folder.glob("records/*/*.json"))) >= 3, process)
    kill(process)
    done = {unit_of(str(path.relative_to(folder))) for path in folder.glob("records/*/*.json")}
    assert 3 <= len(done) < sum(N_UNITS.values())
    assert not (folder / MANIFEST).exists()
    before = {name: identity for name, identity in identities(folder).items() if unit_of(name) in done}
    tokenizer = identities(folder / "tokenizer")
    with pytest.raises(CorpusError, match=r"has no manifest.json, so it is not a finished corpus"):
        Corpus.open(folder, "train", 32)
    (folder / "library" / "train-99999-000.bin.tmp").parent.mkdir(exist_ok=True)
    (folder / "library" / "train-99999-000.bin.tmp").write_text("left by the kill")
    prepare(mixture(folder, place, workers=1))
    assert contents(folder) == contents(finished[0])
    after = identities(folder)
    assert len(before) >= 3 * 2
    assert {name: after[name] for name in before} == before
    assert identities(folder / "tokenizer") == tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again_at_any_moment(tmp_path, chosen, seed):
    """All phases, the search for duplicates too; what a record says is done is not written again."""
    rng = random.Random(seed)
    made = write_duplicates(tmp_path) | ({} if seed % 2 else chosen)
    if seed % 2:
        made["tokenizer"] = {"vocab_size": 280, "train_bytes": 2**16}
    prepare(config(tmp_path / "straight", **made))
    folder, kills = tmp_path / "corpus", 0
    while not (folder / MANIFEST).exists():
        before = {name: at for name, at in identities(folder).items() if unit_of(name)} if folder.exists() else {}
        done = {unit_of(name) for name in before if name.startswith("records/") and name.endswith(".json")}
        process = start(config(folder, **made | {"workers": rng.choice([1, 2])}))
        try:
            process.wait(timeout=rng.uniform(0.2, 1.3) if kills < 10 else 60)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
        after = identities(folder) if folder.exists() else {}
        kept = {name: at for name, at in before.items() if unit_of(name) in done}
        assert {name: after.get(name) for name in kept} == kept
    assert kills > 0
    assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.slow
def test_killed_while_the_tokenizer_is_trained(finished, place, tmp_path):
    folder = tmp_path / "corpus"
    process = start(mixture(folder, place))
    wait_for((folder / "plan.json").exists, process)
    kill(process)
    assert not (folder / "tokenizer").exists()
    prepare(mixture(folder, place))
    assert contents(folder) == contents(finished[0])


def test_ctrl_c_ends_the_workers_and_the_next_start_goes_on(finished, place, tmp_path):
    folder = tmp_path / "corpus"
    process = start(mixture(folder, place))
    wait_for(lambda: list(folder.glob("records/*/*.json")), process)
    process.send_signal(signal.SIGINT)  # to the parent alone; a terminal sends it to all
    process.wait(timeout=5)
    assert process.returncode != 0
    prepare(mixture(folder, place))
    assert contents(folder) == contents(finished[0])


def test_finished_returns_at_once_and_needs_no_text(finished, place, copy, caplog):
    before = identities(copy)
    with caplog.at_level(logging.INFO):
        assert prepare(mixture(copy, place)) == finished[1]
    assert "copy is finished; nothing to do" in caplog.text
    assert identities(copy) == before


def test_finished_without_its_text(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", sources=sources, **chosen)
    manifest = prepare(cfg)
    shutil.rmtree(tmp_path / "texts")
    assert prepare(cfg) == manifest


def test_a_lost_shard_is_made_again_alone(finished, place, copy, caplog):
    (copy / "library" / "train-00004-000.bin").write_bytes(b"cut")
    before = identities(copy)
    prepare(mixture(copy, place))
    after = identities(copy)
    assert contents(copy) == contents(finished[0])
    assert "1 files are missing or of the wrong size, as " in caplog.text
    rewritten = {name for name in after if before.get(name) != after[name]}
    expected = {f"library/{split}-00004-000.{kind}" for split in ("train", "valid") for kind in ("bin", "idx")}
    assert rewritten == (expected | {"records/library/00004.json", MANIFEST, "report.json"}) & set(after)


def test_a_corpus_being_repaired_is_no_corpus(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", sources=sources, **chosen)
    manifest = prepare(cfg)
    (tmp_path / "corpus" / f"{manifest.sources['text'].splits['train'].shards[0].name}.bin").unlink()
    text = tmp_path / "texts" / "000.txt"
    modified = text.stat().st_mtime_ns
    text.write_bytes(b"\xff" * text.stat().st_size)  # the repair fails
    os.utime(text, ns=(modified, modified))
    with pytest.raises((PrepareError, SourceError), match="000.txt"):
        prepare(cfg)
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_a_damaged_record_is_made_again(finished, place, copy, caplog):
    (copy / MANIFEST).unlink()
    (copy / "records" / "library" / "00002.json").write_text("{")
    prepare(mixture(copy, place))
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
        ({"max_document_bytes": 2**20}, r"data.max_document_bytes: 268435456 in the folder, 1048576 now"),
        ({"clean": {"exact": True}}, r"data.clean.exact: False in the folder, True now"),
        ({"sources": [{"kind": "embedded"}]}, r"data.order: \['library', 'notes'\] in the folder, \['embedded'\] now"),
    ],
)
def test_other_options_are_refused(copy, place, done, change, match):
    if not done:
        (copy / MANIFEST).unlink()
    before = contents(copy)
    with pytest.raises(
        PrepareError, match=rf"(?s)was begun with other options .*{match}.*put these back, set data.corpus"
    ):
        prepare(mixture(copy, place, **change))
    assert contents(copy) == before


def test_a_corpus_from_before_a_key_is_the_same(copy, place):
    """Corpora begun with version 0.1.0 know neither of these; what is asked for by nobody is no other option."""
    assert not {"mask_token", "add_tokens"} & module._options(mixture(copy, place), None)["tokenizer"].keys()


def test_what_a_run_chooses_is_not_refused(finished, place, copy):
    """Weights, packing, the number of workers, and what to do about malformed documents."""
    cfg = mixture(copy, place, workers=1, packing="best_fit", on_bad="skip", max_bad=1, tokenizer__bulk="reference")
    sources = [source.model_copy(update={"weight": 9.0, "max_epochs": 2.0}) for source in cfg.sources]
    assert prepare(cfg.model_copy(update={"sources": sources})) == finished[1]


@pytest.mark.fault(40)
def test_another_tokenizer_is_refused(copy, place, chosen):
    with pytest.raises(PrepareError, match=r"(?s)data.tokenizer.fingerprint: not set in the folder, \w{16} now"):
        prepare(mixture(copy, place, **chosen))


@pytest.mark.fault(48)
def test_changed_text_under_an_unfinished_corpus_is_refused(tmp_path, chosen):
    sources = write_texts(tmp_path / "texts", [f"text {number}" for number in range(40)])
    cfg = config(tmp_path / "corpus", sources=sources, **chosen)
    prepare(cfg)
    (tmp_path / "corpus" / MANIFEST).unlink()
    (tmp_path / "texts" / "new.txt").write_text("one more")
    with pytest.raises(PrepareError, match=r"(?s)source.text.documents: 40 in the folder, 41 now.*text.fingerprint: "):
        prepare(cfg)


@pytest.mark.parametrize("url", ["s3://bucket/corpus", "file:///tmp/corpus"])
def test_a_url_is_refused_before_anything_is_read(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    cfg = config(url, sources=[{"kind": "text", "paths": ["/nowhere/*.txt"]}])
    with pytest.raises(
        PrepareError, match=rf"data.corpus={url} is a URL, and prepare writes to a folder; .*sync FOLDER"
    ):
        prepare(cfg)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match=r"holds other things \(thesis.tex\) and no plan.json; set data.corpus"):
        prepare(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(PrepareError, match=r"data.corpus=.*thesis.tex is a file; name a folder"):
        prepare(config(tmp_path / "thesis.tex"))


@pytest.mark.parametrize("plan", ["", "[]", "{}"])
def test_a_damaged_plan_is_refused(copy, place, plan):
    (copy / "plan.json").write_text(plan)
    with pytest.raises(PrepareError, match=r"plan.json is damaged .*delete .*copy and prepare it again"):
        prepare(mixture(copy, place))


def test_two_at_a_time_are_refused(copy, place, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.2)
    (copy / MANIFEST).unlink()
    with (
        locks.working(copy, locks.Part()),
        pytest.raises(PrepareError, match=r"is being prepared by another process; wait for it"),
    ):
        prepare(mixture(copy, place))
    with open(copy / LOCK, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match=r"is being prepared by another process; wait for it"):
            prepare(mixture(copy, place))


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cleaned", [False, True])
def test_three_processes_share_the_work(finished, place, tmp_path, chosen, cleaned):
    """Byte for byte what one process makes, the tokenizer trained once; who comes last writes the manifest."""
    if cleaned:
        made = write_duplicates(tmp_path) | chosen
        prepare(config(tmp_path / "straight", **made))
        cfg, expected = config(tmp_path / "corpus", **made), contents(tmp_path / "straight")
    else:
        cfg, expected = mixture(tmp_path / "corpus", place, workers=1), contents(finished[0])
    processes = [start(cfg, f"Part({number}, 3)") for number in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "corpus") == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_parts_killed_at_any_moment(tmp_path, chosen, seed):
    """Two parts, one or the other killed, even in the middle of what it does for both; then both to the end."""
    rng = random.Random(seed)
    made = write_duplicates(tmp_path) | (
        chosen if seed % 2 else {"tokenizer": {"vocab_size": 280, "train_bytes": 2**16}}
    )
    prepare(config(tmp_path / "straight", **made))
    folder = tmp_path / "corpus"
    cfg = config(folder, **made | {"workers": 1})
    patience = "prepare.PART_START_S = 5.0"
    crew = {number: start(cfg, f"Part({number}, 2)", setting=patience) for number in range(2)}
    for _ in range(6):
        time.sleep(rng.uniform(0.2, 1.0))
        number = rng.randrange(2)
        kill(crew[number])
        crew[number] = start(cfg, f"Part({number}, 2)", setting=patience)
    assert [process.wait(timeout=120) for process in crew.values()] == [0, 0]
    if not (folder / MANIFEST).exists():  # a part that found the other one dead has ended early
        assert prepare_part(cfg, module.Part(1, 2)) or prepare_part(cfg, module.Part(0, 2))
    assert contents(folder) == contents(tmp_path / "straight")


def test_a_part_does_its_units_and_says_what_is_missing(finished, place, tmp_path, caplog):
    cfg = mixture(tmp_path / "corpus", place)
    with caplog.at_level(logging.INFO):
        assert prepare_part(cfg, module.Part(1, 2)) is None
    total = sum(N_UNITS.values())
    assert f"part 1/2 is done; {(total + 1) // 2} of {total} units of other parts are still missing, and no process is " \
        "at work on part 0: start it" in caplog.text  # fmt: skip
    assert len(list((tmp_path / "corpus").glob("records/*/*.json"))) == total // 2
    assert not (tmp_path / "corpus" / MANIFEST).exists()
    assert prepare_part(cfg, module.Part(0, 2)) == finished[1]
    assert contents(tmp_path / "corpus") == contents(finished[0])
    assert prepare_part(cfg, module.Part(1, 2)) == finished[1]


@pytest.mark.slow
def test_parts_that_look_for_duplicates_one_after_the_other(tmp_path, chosen, caplog, monkeypatch):
    """The first has nobody to wait for and ends; started again after the others it finds all that it needs."""
    monkeypatch.setattr(module, "PART_START_S", 0.3)
    made = write_duplicates(tmp_path) | chosen
    expected = prepare(config(tmp_path / "straight", **made))
    cfg = config(tmp_path / "corpus", **made)
    with caplog.at_level(logging.INFO):
        assert prepare_part(cfg, module.Part(0, 2)) is None
    assert (
        "are not yet marked for the search for duplicates, and no process is at work on part 1; start it" in caplog.text
    )
    assert prepare_part(cfg, module.Part(1, 2)) is None
    assert prepare_part(cfg, module.Part(0, 2)) == expected
    assert contents(tmp_path / "corpus") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_two_parts_do_not_wait_for_each_other_when_a_third_is_missing(tmp_path, chosen):
    made = write_duplicates(tmp_path) | chosen
    cfg = config(tmp_path / "corpus", **made)
    patience = "prepare.PART_START_S = 3.0"
    processes = [start(cfg, f"Part({number}, 3)", setting=patience) for number in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert not (tmp_path / "corpus" / "clean" / "decided.json").exists()


def test_parts_count_malformed_documents_together(tmp_path, chosen):
    made = write_bad(tmp_path, [5, 105, 205, 305, 405, 505]) | chosen | {"on_bad": "skip", "max_bad": 5}
    cfg, outcomes = config(tmp_path / "corpus", **made), []
    for number in range(2):
        try:
            outcomes.append(prepare_part(cfg, module.Part(number, 2)))
        except PrepareError as error:
            outcomes.append(str(error))
    assert outcomes[0] is None
    assert "at least 6 malformed documents, more than data.max_bad=5" in outcomes[1]
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_parts_of_another_division_and_the_same_part_twice_are_refused(copy, place, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.2)
    (copy / MANIFEST).unlink()
    cfg = mixture(copy, place)
    with locks.working(copy, locks.Part(0, 2)):
        with pytest.raises(PrepareError, match=r"is being prepared in 2 parts, not 3; wait for them, or stop them all"):
            prepare_part(cfg, module.Part(1, 3))
        with pytest.raises(PrepareError, match=r"is being prepared by another process as part 0/2; wait for it"):
            prepare_part(cfg, module.Part(0, 2))
        assert locks.others_at_work(copy, locks.Part(1, 2)) == [0]
    assert locks.others_at_work(copy, locks.Part(1, 2)) == []


def test_one_waits_for_the_other_and_says_so(tmp_path):
    script = (
        "import logging, pathlib, sys; from data import plan; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        f"with plan.step(pathlib.Path({str(tmp_path)!r}), 'which does something'): print('in')"
    )
    with locks.step(tmp_path, ""):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert "waiting for another part, which does something" in process.stdout.readline()
    with process:
        assert process.communicate(timeout=20)[0] == "in\n"
    assert process.returncode == 0


# -- what is said ------------------------------------------------------------------------------------------------------


def test_report(finished):
    lines = report(finished[1]).splitlines()
    assert lines[0].split() == ["source", "split", "documents", "bytes", "tokens", "bytes/token"]
    train = finished[1].sources["library"].splits["train"]
    assert lines[1].split() == ["library", "train", f"{train.documents:,}", f"{train.bytes:,}", f"{train.tokens:,}",
                                f"{train.bytes / train.tokens:.3f}"]  # fmt: skip
    assert [line.split()[:2] for line in lines[1:7]] == [
        [name, split] for name in ("library", "notes") for split in ("train", "valid")
    ] + [["all", "train"], ["all", "valid"]]
    assert len({len(line) for line in lines[:7]}) == 1
    entry = finished[1].sources["library"]
    assert lines[7].split(None, 1) == [
        "library",
        f"left out: {entry.left_out['empty']} empty; {entry.unknown_tokens:,} tokens for what the vocabulary lacks",
    ]  # fmt: skip
    assert re.fullmatch(r"notes    left out: none; [\d,]+ tokens for what the vocabulary lacks", lines[8])
    total = sum(source.splits["train"].tokens for source in finished[1].sources.values())
    assert f"{total:,}" in lines[5]


def test_report_as_numbers(finished):
    content = json.loads((finished[0] / "report.json").read_text())
    train = finished[1].sources["notes"].splits["train"]
    assert content["sources"]["notes"]["splits"]["train"] == {
        "documents": train.documents,
        "bytes": train.bytes,
        "tokens": train.tokens,
        "bytes_per_token": round(train.bytes / train.tokens, 4),
        "shards": len(train.shards),
    }
    assert content["sources"]["library"]["left_out"] == finished[1].sources["library"].left_out


def test_a_worker_tells_of_all_documents_also_of_those_left_out():
    told = []
    texts = ["ab", None, "c" * 10, None, None]
    found = list(units.batches(iter(texts), lambda *counts: told.append(counts)))
    assert [batch.texts for batch in found] == [["ab", "c" * 10]]
    assert [sum(column) for column in zip(*told, strict=True)] == [5, 12]


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(units, "BATCH_BYTES", 10)
    monkeypatch.setattr(units, "BATCH_DOCUMENTS", 4)
    found = [
        batch.texts for batch in units.batches(["a" * 7, "b" * 7, "c", *"defg", "\u592a" * 4, "h"], lambda *_: None)
    ]
    assert found == [["a" * 7, "b" * 7], ["c", "d", "e", "f"], ["g", "\u592a" * 4], ["h"]]


def test_plan_holds_the_listing(finished):
    plan = json.loads((finished[0] / "plan.json").read_text())
    assert plan["options"]["tokenizer"]["vocab_size"] == 600
    assert plan["listing"]["library"]["documents"] == len(open_source(config("x").sources[0], Limits()).files)
    assert "weight" not in plan["options"]["sources"]["notes"]


def test_a_workers_module_brings_in_neither_torch_nor_transformers():
    unwanted = {"torch", "transformers", "datasets", "data.config"}
    script = f"import sys, data.units; print(sorted({unwanted} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
