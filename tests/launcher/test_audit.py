"""The audit: what a step read, and a proof that fails when anything was lost, repeated or damaged."""

import json
import re
import shutil

import numpy as np
import pytest

from data.dataset import Dataset
from data.loader import Loader
from data.tokenizer import Tokenizer
from launcher.audit import main
from launcher.config import load_config
from launcher.read_log import RECORD, ReadLog, path_of, read_records
from launcher.run_dir import Ledger, save_config
from runs import RECIPE, kill, losses, run, start, torchrun, wait_for_step

STEPS = 24
G = 8


@pytest.fixture
def make_run(tmp_path, mixture):
    """Builds a run's folder as the train loop leaves it, without training: a list of (first step, last step, ranks,
    micro-batch, overrides) for its starts."""

    def make(*starts, name="test"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(RECIPE.format(name=name, folder=tmp_path / "runs", corpus=mixture))
        cursor = {}
        for number, (first, last, ranks, B, overrides) in enumerate(starts, 1):
            cfg = load_config(str(recipe), [SOURCES, *overrides])
            cfg.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(cfg)
            for rank in range(ranks):
                dataset = Dataset.open(cfg.data, cfg.model.seq_len, G)
                samples = dataset.go_on(cursor[first - 1]) if first > 1 else 0
                loader = Loader(dataset, global_batch_size=G, micro_batch_size=B, dp_rank=rank, dp_size=ranks,
                                samples=samples)  # fmt: skip
                if rank == 0:
                    Ledger(cfg.run_dir).add(
                        "start", number=number, step=first - 1, dp_size=ranks, global_batch_size=G, micro_batch_size=B,
                        cursor=loader.cursor(), skip=[e.model_dump(exclude_none=True) for e in cfg.data.skip],
                    )  # fmt: skip
                reads = ReadLog(cfg.run_dir, number, rank)
                for step in range(first, last + 1):
                    reads.add(step, next(loader))
                    cursor[step] = loader.cursor()
                loader.close()
                reads.close()
        return cfg.run_dir

    return make


SOURCES = (
    "data.sources=[{kind: text, name: email, paths: [-], weight: 0.6}, {kind: text, name: json, paths: [-], weight: 0.3}, "
    "{kind: text, name: asyncio, paths: [-], weight: 0.1}]"
)
LATER = SOURCES.replace("0.6", "0.2")
ALONE = "data.sources=[{kind: text, name: json, paths: [-], weight: 1.0}]"
RESTARTS = ((1, 10, 2, 2, []), (6, 9, 1, 4, []), (10, 13, 4, 1, []), (13, STEPS, 2, 4, []))


def audit(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


@pytest.mark.fault(39)
def test_restarts_on_other_ranks_are_proved(make_run, capsys):
    run_dir = make_run(*RESTARTS)
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 0, text
    assert "start 1: steps 1 to 5, 2 ranks, 5 more taken again later" in text
    assert "start 3: steps 10 to 12, 4 ranks, 1 more taken again later" in text
    assert f"proved: {STEPS} steps read {STEPS * G} samples, each once, none lost; 0 left out by data.skip" in text
    counts = {name: int(count) for name, count in re.findall(r"(\w+) (\d+) \(", text.splitlines()[-1])}
    assert sum(counts.values()) == STEPS * G
    straight = make_run((1, STEPS, 1, 8, []), name="straight")
    assert audit(capsys, straight, "--verify")[1].splitlines()[-1] == text.splitlines()[-1]


def test_changes_on_purpose_are_proved(make_run, capsys):
    """Other weights from step 7 on, and from step 13 on a stretch of samples left out."""
    skip = ["data.skip=[{samples: [100, 109]}]"]
    run_dir = make_run((1, 6, 2, 2, []), (7, 12, 1, 2, [LATER]), (13, 20, 2, 2, [LATER, *skip]))
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 0, text
    assert "proved: 20 steps read 160 samples, each once, none lost; 10 left out by data.skip; 34 batches" in text


def test_a_source_that_was_removed_is_read_again_while_the_corpus_has_it(make_run, mixture, tmp_path, capsys):
    run_dir = make_run((1, 6, 2, 2, []), (7, 12, 1, 2, [ALONE]))
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 0, text
    assert "proved: 12 steps read 96 samples, each once, none lost" in text
    Tokenizer.load(mixture / "tokenizer").save(run_dir / "tokenizer")
    code, text = audit(capsys, run_dir, "--step", 3)
    assert code == 0, text
    assert re.search(r"sample \d+: email, epoch 0", text)
    less = tmp_path / "less"
    shutil.copytree(mixture, less)
    manifest = json.loads((less / "manifest.json").read_text())
    del manifest["sources"]["email"]
    (less / "manifest.json").write_text(json.dumps(manifest))
    for what in (["--verify"], ["--step", 3]):
        code, text = audit(capsys, run_dir, *what, "--corpus", less)
        assert (code, "the run read email, which" in text) == (2, True), text


def records(run_dir, start=1, rank=0):
    return read_records(run_dir, start, rank).copy()


def rewrite(run_dir, content, start=1, rank=0):
    path_of(run_dir, start, rank).write_bytes(content.tobytes())


@pytest.mark.parametrize("event", ["checkpoint", "finished"])
def test_records_that_are_gone_prove_nothing(make_run, capsys, event):
    run_dir = make_run((1, 4, 1, 2, []), (5, 8, 2, 2, []))
    Ledger(run_dir).add(event, step=8)
    assert audit(capsys, run_dir, "--verify")[0] == 0
    for path in (run_dir / "reads").glob("start-0002-*"):
        path.unlink()
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 1
    assert "steps 5 to 8 are in no records, but the ledger says that the run has taken them; files of " in text
    for path in (run_dir / "reads").iterdir():
        path.unlink()
    assert "steps 1 to 8 are in no records" in audit(capsys, run_dir, "--verify")[1]
    code, text = audit(capsys, run_dir, "--step", 5)
    assert code == 2
    assert "has no record of step 5; it has none at all, though it has taken 8 steps" in text


def test_a_repeated_stretch_is_found(make_run, capsys):
    run_dir = make_run((1, 4, 1, 2, []), (5, 8, 1, 2, []))
    rewrite(run_dir, np.concatenate([records(run_dir)[:3], records(run_dir)[2:3]]))
    content = records(run_dir)
    content["step"][3] = 4
    rewrite(run_dir, content)
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 1
    assert "step 4, rank 0 read samples 16 to 23; the next unread ones are 24 to 31: samples were repeated" in text


def test_a_lost_stretch_is_found(make_run, capsys):
    run_dir = make_run((1, 4, 1, 2, []))
    content = records(run_dir)
    content["first"][2:] += 8
    content["next"][2:] += 8
    rewrite(run_dir, content)
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 1
    assert "step 3, rank 0 read samples 24 to 31; the next unread ones are 16 to 23: samples were lost" in text


def test_what_one_rank_read_otherwise_is_found(make_run, capsys):
    run_dir = make_run((1, 4, 2, 2, []))
    content = records(run_dir, rank=1)
    content["digest"][1] ^= 1
    rewrite(run_dir, content, rank=1)
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 1
    assert "step 2, rank 1: what the run read for samples" in text


def test_missing_records_are_found(make_run, capsys):
    run_dir = make_run((1, 4, 2, 2, []), (5, 8, 2, 2, []))
    path_of(run_dir, 1, 1).unlink()
    code, text = audit(capsys, run_dir, "--verify")
    assert code == 1
    assert "steps 1 to 4 are in no start's records; the files in" in text
    content = records(run_dir, 2)
    content["step"][1] = 77
    make_run((1, 4, 2, 2, []), name="damaged")
    damaged = run_dir.with_name("damaged")
    rewrite(damaged, np.concatenate([records(damaged)[:1], content[1:2], records(damaged)[2:]]))
    assert "a record of step 77 where step 2 is expected; it is damaged" in audit(capsys, damaged, "--verify")[1]


def test_a_record_cut_by_a_crash_is_no_record(make_run):
    run_dir = make_run((1, 4, 1, 2, []))
    path = path_of(run_dir, 1, 0)
    path.write_bytes(path.read_bytes()[:-5])
    assert read_records(run_dir, 1, 0)["step"].tolist() == [1, 2, 3]
    assert len(read_records(run_dir, 9, 0)) == 0
    assert RECORD.itemsize == 32


def test_a_step_shows_its_documents(make_run, mixture, capsys):
    run_dir = make_run(*RESTARTS)
    Tokenizer.load(mixture / "tokenizer").save(run_dir / "tokenizer")
    code, text = audit(capsys, run_dir, "--step", 11)
    assert code == 0, text
    assert text.startswith("step 11, by start 3: samples 80 to 87, 4 ranks\n")
    assert [int(n) for n in re.findall(r"^rank \d, micro-batch \d, sample (\d+): ", text, re.M)] == [
        80, 84, 81, 85, 82, 86, 83, 87]  # fmt: skip
    piece = re.search(
        r"^    (\S+) document (\d+), tokens (\d+)-(\d+) of (\d+), bytes (\d+)-(\d+): ('.*'|\".*\")$", text, re.M
    )
    assert piece
    assert int(piece[7]) > int(piece[6])
    assert "to leave this step out: data.skip='[{samples: [80, 87]}]' --allow-change data.skip" in text


def test_refusals(make_run, tmp_path, capsys):
    assert "is no run: it has no config.yaml" in audit(capsys, tmp_path, "--verify")[1]
    run_dir = make_run((1, 4, 1, 2, []))
    code, text = audit(capsys, run_dir, "--step", 9)
    assert (code, "has no record of step 9; it has steps 1 to 4" in text) == (2, True)
    code, text = audit(capsys, run_dir, "--verify", "--corpus", tmp_path / "gone")
    assert (code, "corpus folder" in text and "does not exist" in text) == (2, True)
    (run_dir / "ledger.jsonl").unlink()
    assert "ledger.jsonl names no start, so nothing has been read yet" in audit(capsys, run_dir, "--verify")[1]


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_mixture_is_proved_and_equals_one_never_stopped(mixture, tmp_path, capsys):
    """Three sources, a stage, two ranks killed, one rank, two again: real runs, the same samples and losses."""
    stages = "data.stages=[{from_tokens: 3072, weights: {json: 1.0, asyncio: 1.0}}]"
    recipes = {}
    for name in ("straight", "killed"):
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(RECIPE.format(name=name, folder=tmp_path / "runs", corpus=mixture))
    changes = (SOURCES, stages, "model.dropout=0.0")
    run(torchrun(2, "--config", recipes["straight"], *changes), tmp_path / "straight.log")
    for ranks, step in ((2, 6), (1, 13), (2, 19)):
        process = start(torchrun(ranks, "--config", recipes["killed"], *changes), tmp_path / "killed.log")
        wait_for_step(tmp_path / "runs/killed", step, process)
        kill(recipes["killed"], process)
    run(torchrun(2, "--config", recipes["killed"], *changes), tmp_path / "killed.log")
    results = {name: audit(capsys, tmp_path / f"runs/{name}", "--verify") for name in recipes}
    assert [code for code, _ in results.values()] == [0, 0], results
    assert results["killed"][1].splitlines()[-1] == results["straight"][1].splitlines()[-1]
    one, other = losses(tmp_path / "runs/straight"), losses(tmp_path / "runs/killed")
    assert one.keys() == other.keys() == set(range(1, 25))
    assert max(abs(one[step] - other[step]) for step in one) < 1e-4  # one rank adds up in another order
    lines = [json.loads(line) for line in (tmp_path / "runs/killed/metrics.jsonl").read_text().splitlines()]
    assert {"loss/valid_email", "loss/valid_json", "loss/valid_asyncio"} <= {key for line in lines for key in line}
    assert {"data/epochs_json", "data/share_json"} <= {key for line in lines for key in line}
