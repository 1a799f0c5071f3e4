"""One cluster for the session, free of jobs before each test."""

import pytest

import slurm


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
