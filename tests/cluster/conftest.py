"""One cluster for the session, free of jobs before each test."""

import pytest

import slurm
from jobs import SIX_STEPS
from runs import run, torchrun, write_recipe


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory):
    if why := slurm.missing():
        pytest.skip(f"a SLURM cluster {why}")
    with slurm.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster):
    running_cluster.clear()
    yield running_cluster
    running_cluster.clear()


@pytest.fixture(scope="session")
def expected(tmp_path_factory, corpus):
    """The folder of a run of six steps by two processes on one host."""
    folder = tmp_path_factory.mktemp("expected")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *SIX_STEPS), folder / "log")
    return folder / "runs/test"
