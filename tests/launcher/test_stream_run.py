"""Runs that read raw text (data.stream) through the launcher: refused at the door, ended, killed and resumed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.dataset import Dataset
from data.lanes import Stream
from data.stream import StreamLoader
from launcher import audit, generate, pretrain
from launcher.config import load_config, to_yaml
from launcher.read_log import read_records
from parallel.checkpoint import committed_steps, read_manifest
from runs import (
    PRETRAIN,
    SCRIPTS,
    assert_same_state,
    kill,
    losses,
    metrics,
    rank_pids,
    run,
    start,
    torchrun,
    wait_for_step,
    write_recipe,
)

LANES = 4


@pytest.fixture(scope="module", autouse=True)
def _library_cache(tmp_path_factory):
    """datasets keeps lock files of what it opens; not in the home folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)  # the runs'
        yield


def write_texts(folder, corpus, kind, documents):
    """The corpus's texts as 4 files of some documents of 400 characters each; returns a pattern."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((corpus.parent / "texts").iterdir()))
    pieces = iter([text[begin : begin + 400] for begin in range(0, len(text), 400)])
    folder.mkdir()
    for number in range(LANES):
        rows = [{"text": next(pieces), "n": n} for n in range(documents + number)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=5)
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / f"*.{kind}")


def write_stream_recipe(folder, corpus, kind="jsonl", documents=12, **more):
    """The recipe of runs.py on raw text, without workers unless told otherwise."""
    path = write_recipe(folder, corpus)
    files = write_texts(folder / "texts", corpus, kind, documents)
    dataset = {"jsonl": "json"}.get(kind, kind)
    stream = {"dataset": dataset, "data_files": [files], "tokenizer": str(corpus / "tokenizer"), "lanes": LANES}
    path.write_text(to_yaml(load_config(str(path), [f"data.stream={json.dumps(stream | {'workers': 0} | more)}"])))
    return path


def ledger(run_dir):
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


# -- refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_the_door(monkeypatch):
    """pretrain.main in this process, of which only the checks may run."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))


def refused(capsys, recipe, *arguments):
    assert pretrain.main(["--config", str(recipe), *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stream.data_files=[/nowhere/a.jsonl]", "(/nowhere/a.jsonl), split train cannot be opened: FileNotFound"),
        ("data.stream.data_files=['/nowhere/*.jsonl']", "no file is named by data.stream.data_files="),
        ("data.stream.field=words", "has no field 'words'; its fields: text, n. Set data.stream.field"),
        ("data.stream.dataset=/nowhere/set", "dataset /nowhere/set"),
        ("data.stream.tokenizer=/nowhere", "/nowhere"),
        ("data.stream.workers=5", "data.stream.workers=5, but a rank of 1 has 4 of the 4 lanes; use at most 4 workers"),
    ],
)
@pytest.mark.usefixtures("at_the_door")
def test_refused_before_anything_is_started(capsys, corpus, tmp_path, override, message):
    assert message in refused(capsys, write_stream_recipe(tmp_path, corpus), override)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("at_the_door")
@pytest.mark.fault(50)
def test_lanes_that_the_ranks_cannot_share(capsys, corpus, tmp_path, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    recipe = write_stream_recipe(tmp_path, corpus)
    text = refused(capsys, recipe, "train.global_batch_size=12")
    assert "data.stream.lanes=4 cannot be shared by dp_size=3 ranks; it can by 1, 2, 4." in text
    assert not (tmp_path / "runs").exists()


# -- the end of the text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory, corpus):
    """(recipe, output) of a run whose text ended."""
    folder = tmp_path_factory.mktemp("ended")
    recipe = write_stream_recipe(folder, corpus, documents=4, epochs=1)
    return recipe, run(torchrun(1, "--config", recipe), folder / "log", code=1)


def last_step(run_dir):
    return committed_steps(run_dir / "checkpoints")[-1]


def test_the_end_of_the_text_is_saved_and_named(ended):
    recipe, text = ended
    run_dir = recipe.parent / "runs/test"
    step = last_step(run_dir)
    assert step % 5, "between two checkpoints, or the end has nothing to save"
    assert f"the text ends after data.stream.epochs=1 at step {step} of 24; that step is saved. Finish with" in text
    failed = ledger(run_dir)[-1]
    assert (failed["event"], failed["step"], failed["saved_step"]) == ("failed", step, step)
    assert failed["error"].startswith("StreamEnd: the text ends after data.stream.epochs=1")


@pytest.mark.slow
def test_the_end_of_the_text_can_be_made_the_end_of_the_run(ended, tmp_path):
    """As the message says: no step is trained, the held-out loss is taken and the ledger says finished, once."""
    recipe, _ = ended
    run_dir = tmp_path / "runs/test"
    shutil.copytree(recipe.parent / "runs/test", run_dir)
    before, step = losses(run_dir), last_step(run_dir)
    command = torchrun(1, "--config", recipe, f"run.folder={tmp_path / 'runs'}", f"train.steps={step}")
    run([*command, "--allow-change", "train.steps"], tmp_path / "log")
    finished = ledger(run_dir)[-1]
    assert (finished["event"], finished["step"], finished["tokens"]) == ("finished", step, step * 8 * 32)
    assert finished["loss/valid"] == [line["loss/valid"] for line in metrics(run_dir) if "loss/valid" in line][-1]
    assert losses(run_dir) == before
    size = len(ledger(run_dir))
    assert f"is finished: {step} of {step} steps; nothing to do" in run(command, tmp_path / "again")
    assert len(ledger(run_dir)) == size


@pytest.mark.usefixtures("at_the_door")
@pytest.mark.fault(40)
def test_a_run_goes_on_with_the_stream_that_it_began_with(ended, capsys, corpus):
    recipe, _ = ended
    pretrain.check(pretrain.parse_arguments(["--config", str(recipe)]))
    files = recipe.parent / "texts/0.jsonl"
    before = files.read_bytes()
    files.write_bytes(before + b'{"text": "x", "n": 1}\n')
    try:
        text = refused(capsys, recipe)
    finally:
        files.write_bytes(before)
    assert "the checkpoint was trained on another stream: files was 4 files of " in text
    text = refused(capsys, recipe, "data.stream.lanes=8", "--allow-change", "data.stream.lanes")
    assert "the checkpoint was trained on another stream: lanes was 4, is 8. Go on" in text
    text = refused(capsys, recipe, "data.stream=null", "--allow-change", "data.stream")
    assert "read raw text before, and data.stream is not set now; set it as config.yaml there has it, or use" in text


@pytest.mark.usefixtures("at_the_door")
@pytest.mark.fault(40)
def test_a_run_on_a_prepared_corpus_does_not_go_on_with_a_stream(capsys, corpus, tmp_path, monkeypatch):
    recipe = write_stream_recipe(tmp_path, corpus)
    cfg = load_config(str(recipe), ["data.stream=null"])
    cursor = Dataset.open(cfg.data, cfg.model.seq_len).cursor(8)
    monkeypatch.setattr("launcher.start.saved_position", lambda _: (cursor, 1))
    assert "the data cursor is not one of a stream" in refused(capsys, recipe)


# -- killed, stopped and resumed ----------------------------------------------------------------------------------------


def pids_of_workers(recipe):
    """Process ids of the workers of all ranks of a job."""
    ranks, found = rank_pids(recipe), []
    for entry in Path("/proc").iterdir():
        try:
            is_worker = entry.name.isdigit() and b"data.lane_workers" in (entry / "cmdline").read_bytes()
            if is_worker and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) in ranks:
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def wait_for_workers(recipe, n, process, seconds=100):
    """Their process ids, as soon as all are there."""
    end = time.monotonic() + seconds
    while len(found := pids_of_workers(recipe)) < n:
        assert process.poll() is None, f"the run ended with {process.returncode} before it had {n} workers"
        assert time.monotonic() < end, f"{len(found)} of {n} workers in {seconds} s"
        time.sleep(0.02)
    return found


def wait_until_gone(pids, seconds=20):
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < end, f"processes {left} are still there after {seconds} s"
        time.sleep(0.05)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


STREAM = {"kind": "parquet", "workers": 1, "shuffle_buffer": 4}
LONG = "train.steps=100000"  # a worker is some 50 of these small steps ahead: what becomes of it shows only then


@pytest.mark.slow
def test_killed_and_resumed_on_other_ranks_and_workers_equals_never_stopped(corpus, tmp_path):
    """Two ranks with a worker each, with two, then one rank with three: the same samples, tokens and losses."""
    recipe = write_stream_recipe(tmp_path, corpus, **STREAM)
    straight, run_dir = tmp_path / "runs/straight", tmp_path / "runs/test"
    command = ("--config", recipe, "model.dropout=0.0")  # its masks depend on the number of ranks
    run(torchrun(2, *command, "run.name=straight"), tmp_path / "straight.log")
    for workers, step in ((1, 7), (2, 12)):
        process = start(torchrun(2, *command, f"data.stream.workers={workers}"), tmp_path / "log")
        theirs = wait_for_workers(recipe, 2 * workers, process)
        wait_for_step(run_dir, step, process)
        kill(recipe, process)
        wait_until_gone(theirs)
    run(torchrun(1, *command, "data.stream.workers=3"), tmp_path / "log")
    starts = [event for event in ledger(run_dir) if event["event"] == "start"]
    assert [event["world_size"] for event in starts] == [2, 2, 1]
    last = starts[-1]["step"]
    assert last >= 10

    one, other = losses(straight), losses(run_dir)
    assert one.keys() == other.keys() == set(range(1, 25))
    assert [one[step] for step in range(1, last + 1)] == [other[step] for step in range(1, last + 1)]
    assert max(abs(one[step] - other[step]) for step in one) < 1e-4  # one rank adds up in another order
    held_out = [
        [line["loss/valid"] for line in metrics(folder) if "loss/valid" in line] for folder in (straight, run_dir)
    ]
    assert len(held_out[0]) == 2
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-4)  # for the same reason

    for number in (1, 2):
        for rank in range(2):
            read = read_records(run_dir, number, rank)
            assert read.tolist() == read_records(straight, 1, rank)[read["step"][0] - 1 :][: len(read)].tolist()
    assert read_records(run_dir, 3, 0).tolist() == read_by_one_rank(recipe)[last:]
    whole = [read_manifest(folder / "checkpoints/step-00000024").cursor for folder in (straight, run_dir)]
    assert whole[0] == whole[1]


def read_by_one_rank(recipe):
    """The records of the 24 steps of a run on one rank, without a run."""
    cfg = load_config(str(recipe), [])
    with StreamLoader(
        Stream.open(cfg.data.stream.model_copy(update={"workers": 0})),
        seq_len=cfg.model.seq_len,
        seed=cfg.data.seed,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        return [(step, *batch.span, batch.digest) for step, batch in zip(range(1, 25), loader, strict=False)]


@pytest.mark.slow
@pytest.mark.fault(3)
def test_a_killed_worker_ends_the_run_and_the_next_start_goes_on(corpus, tmp_path):
    """And that one is stopped by a signal to one rank: neither leaves a process behind."""
    recipe = write_stream_recipe(tmp_path, corpus, **STREAM)
    command = torchrun(2, "--config", recipe, LONG)
    run_dir = tmp_path / "runs/test"
    process = start(command, tmp_path / "log")
    workers = wait_for_workers(recipe, 2, process)
    wait_for_step(run_dir, 7, process)
    os.kill(workers[0], signal.SIGKILL)
    process.wait(100)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 1, text[-3000:]
    assert "a worker process of data.stream (of 1, number 0) was killed by SIGKILL in the middle of its work; " in text
    wait_until_gone(workers)
    failed = ledger(run_dir)[-1]
    assert failed["event"] == "failed"

    process = start(command, tmp_path / "log")
    workers = wait_for_workers(recipe, 2, process)
    wait_for_step(run_dir, failed["step"] + 2, process)
    os.kill(rank_pids(recipe)[1], signal.SIGUSR1)
    process.wait(100)
    *events, saved, stopped = ledger(run_dir)
    assert [event["step"] for event in events if event["event"] == "start"] == [0, failed["saved_step"]]
    assert (stopped["event"], stopped["step"]) == ("stopped", saved["step"])
    assert sorted(losses(run_dir)) == list(range(1, stopped["step"] + 1))
    for rank in range(2):  # what was read behind the last checkpoint is read again alike
        first, again = (read_records(run_dir, number, rank)[["first", "next", "digest"]].tolist() for number in (1, 2))
        behind = first[failed["saved_step"] :]
        assert behind == again[: len(behind)]
    wait_until_gone(workers)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault(3)
def test_a_killed_worker_or_rank_leaves_no_process_and_the_next_start_ends_bit_equal(corpus, tmp_path):
    """In mid-run, with two workers a rank that are some 50 steps ahead."""
    recipe = write_stream_recipe(tmp_path, corpus, **(STREAM | {"workers": 2}))
    command = torchrun(2, "--config", recipe, "train.steps=120", "checkpoint.every=20", "eval.every=0")
    run([*command, "run.name=straight"], tmp_path / "straight.log")
    for victim, cause in (
        ("worker", "a worker process of data.stream"),
        ("rank", "its process was ended from outside"),
    ):
        log, run_dir = tmp_path / f"{victim}.log", tmp_path / "runs" / victim
        process = start([*command, f"run.name={victim}"], log)
        workers = wait_for_workers(recipe, 4, process)
        wait_for_step(run_dir, 25, process)
        os.kill(workers[1] if victim == "worker" else rank_pids(recipe)[1], signal.SIGKILL)
        assert process.wait(60) == 1
        wait_until_gone(workers)
        failed = ledger(run_dir)[-1]
        assert failed["event"] == "failed"
        assert cause in failed["error"]
        run([*command, f"run.name={victim}"], log)
        assert [event["step"] for event in ledger(run_dir) if event["event"] == "start"] == [0, failed["saved_step"]]
        assert losses(run_dir) == losses(tmp_path / "runs/straight")
        assert_same_state(run_dir, tmp_path / "runs/straight")


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too_and_the_run_saves_and_stops(corpus, tmp_path):
    """As they start. A terminal sends it to all processes of the job; without a launcher the exit code is the run's."""
    recipe = write_stream_recipe(tmp_path, corpus, **STREAM)
    run_dir = tmp_path / "runs/test"
    command = [str(SCRIPTS / "python"), PRETRAIN, "--config", str(recipe), "data.stream.workers=2", LONG]
    process = start(command, tmp_path / "log")
    workers = wait_for_workers(recipe, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 75, text[-3000:]
    stopped = ledger(run_dir)[-1]
    assert (stopped["event"], stopped["signal"]) == ("stopped", "SIGINT")
    assert last_step(run_dir) == stopped["step"]
    wait_until_gone(workers)


# -- what is made of it -------------------------------------------------------------------------------------------------


def test_text_can_be_sampled_and_an_audit_is_refused(ended, capsys):
    run_dir = ended[0].parent / "runs/test"
    assert generate.main([str(run_dir), "--prompt", "class ", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("class ")
    assert audit.main([str(run_dir), "--verify"]) == 2
    assert "reads raw text (data.stream), which cannot be read again at any place" in capsys.readouterr().err
