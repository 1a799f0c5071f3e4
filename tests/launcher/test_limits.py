"""Limits of the system that are too low are named before a run starts; those that it may raise itself it raises."""

import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher import limits
from launcher.config import load_config
from launcher.limits import LimitError, allow_files, check_threads
from launcher.run_data import open_data
from runs import PRETRAIN, ROOT, environment, write_recipe

PIDS = Path("/sys/fs/cgroup/pids/longhaul-test")


@pytest.fixture
def limited(monkeypatch):
    """Sets (soft, hard) of open files as the system would report them; gives what was set since."""
    state = {}

    def set_to(soft, hard):
        state["files"] = (soft, hard)
        return state

    monkeypatch.setattr(resource, "getrlimit", lambda which: state["files"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: state.update(files=pair))
    return set_to


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [(256, 4096, 1412), (256, 1412, 1412), (2000, 4096, 2000), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, -1),
     (256, resource.RLIM_INFINITY, 1412)],
)  # fmt: skip
def test_the_limit_of_files_is_raised_to_what_is_needed(limited, soft, hard, after):
    state = limited(soft, hard)
    allow_files(shards=800, world_size=129)  # 100 + 128 * 4 + 800
    assert state["files"] == (after, hard)


@pytest.mark.fault(55)
def test_a_hard_limit_below_that_is_named(limited):
    state = limited(256, 1411)
    message = (
        "a rank may have 1412 files open at a time, 800 of them of shards and 512 connections to other ranks; the limit is "
        "1411: raise it .ulimit -n 1412; "
    )
    with pytest.raises(LimitError, match=message):
        allow_files(shards=800, world_size=129)
    assert state["files"] == (256, 1411)


def test_threads_that_are_refused_are_counted(monkeypatch):
    started = []

    def start(thread):
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    begin = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(
        LimitError, match=r"a rank needs 64 threads, the system gave 5 \(can't start new thread\); raise the "
    ):
        check_threads()
    assert not any(thread.is_alive() for thread in started)


def test_the_threads_are_gone_afterwards():
    before = threading.active_count()
    check_threads()
    assert threading.active_count() == before


def command(tmp_path, corpus, before, *overrides):
    recipe = write_recipe(tmp_path, corpus)
    program = f"{sys.executable} {PRETRAIN} --config {recipe} train.steps=2 optim.warmup_steps=1 {' '.join(overrides)}"
    return subprocess.run(
        ["bash", "-c", f"{before}; exec {program}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip


@pytest.mark.fault(55)
def test_a_run_under_a_hard_limit_of_files(tmp_path, corpus):
    done = command(tmp_path, corpus, "ulimit -n 90")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "pretrain: a rank may have 110 files open at a time, 10 of them of shards and 0 connections" in done.stderr
    assert "the limit is 90: raise it (ulimit -n 110; " in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(55)
def test_a_run_under_a_soft_limit_of_files(tmp_path, corpus):
    done = command(tmp_path, corpus, "ulimit -Sn 64")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.fault(55)
def test_a_run_under_a_limit_of_processes(tmp_path, corpus):
    try:
        PIDS.mkdir()
        (PIDS / "pids.max").write_text("20")
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error}")
    try:
        done = command(tmp_path, corpus, f"echo $$ > {PIDS}/cgroup.procs")
        assert done.returncode == 2, done.stderr[-3000:]
        assert "pretrain: a rank needs 64 threads, the system gave 1" in done.stderr
        assert "(ulimit -u: " in done.stderr
    finally:
        PIDS.rmdir()


def test_the_files_that_data_needs_are_those_of_all_sources_and_splits(mixture, tmp_path):
    sources = "[{kind: text, name: json, paths: [-]}, {kind: text, name: email, paths: [-]}]"
    recipe = write_recipe(tmp_path, mixture)
    data = open_data(load_config(str(recipe), [f"data.sources={sources}"]), None, 0, 1)
    shards = [len(corpus.shards) for corpus in (*data.dataset.corpora.values(), *data.valid.values())]
    assert len(shards) == 4
    assert data.most_files() == 2 * sum(shards)


def test_what_a_run_has_open_is_less_than_it_asks_for(tmp_path, corpus):
    """The two constants, on a running rank without its shards."""
    from runs import kill, rank_pids, start, torchrun, wait_for_step

    recipe = write_recipe(tmp_path, corpus)
    process = start(torchrun(2, "--config", recipe, "train.steps=100000"), tmp_path / "log")
    try:
        wait_for_step(tmp_path / "runs/test", 6, process)
        for pid in rank_pids(recipe):
            opened = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
            assert sum(str(corpus) not in name for name in opened) < limits.FILES + limits.CONNECTIONS
            assert len(list(Path(f"/proc/{pid}/task").iterdir())) < limits.THREADS
    finally:
        kill(recipe, process)
