"""A network that loses packets or delays them: slow, and the same to the last bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs import SIX_STEPS, records, submit
from runs import assert_same_state, losses
from slurm import HERE, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900), pytest.mark.fault(33)]


@contextmanager
def bad_cable(cluster: Cluster, node: str, delay_s: float, loss: float) -> Iterator[None]:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun")
    cable = cluster.start(sys.executable, HERE / "cable.py", node, delay_s, loss, stdout=subprocess.PIPE)
    try:
        assert cable.stdout is not None
        assert cable.stdout.readline() == "up\n"
        yield
    finally:
        os.killpg(cable.pid, signal.SIGKILL)
        cable.wait()
        address = f"10.99.0.{node.removeprefix('n')}/24"
        for words in (f"link set eth1 name eth0; address add {address} dev eth0; link set eth0 up").split("; "):
            cluster.run("ip", "-n", node, *words.split())


def round_trip_s(cluster: Cluster, node: str) -> float:
    """Of a connection to the node's slurmd."""
    program = (
        f"import socket, time; b = time.time(); socket.create_connection(({node!r}, 6818)); print(time.time() - b)"
    )
    return float(cluster.run(sys.executable, "-c", program))


@pytest.mark.parametrize(("delay_s", "loss"), [(0.0, 0.05), (0.25, 0.0)], ids=["lost", "late"])
def test_packets_that_are_lost_or_late(cluster, expected, corpus, tmp_path, delay_s, loss):
    """One in twenty lost, or each half a second there and back."""
    with bad_cable(cluster, "n2", delay_s, loss):
        assert round_trip_s(cluster, "n2") >= 2 * delay_s
        job = submit(cluster, tmp_path, corpus, *SIX_STEPS, "parallel.timeout_s=300")
        cluster.wait_for(job, "COMPLETED", timeout=600)
    run_dir = tmp_path / "runs/test"
    assert losses(run_dir) == losses(expected)
    assert_same_state(run_dir, expected)
    assert [end["kind"] for end in records(run_dir, "end")] == ["finished"]
