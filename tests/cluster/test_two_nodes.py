"""One run over two real SLURM nodes: the losses of two processes on one host."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import slurm
from jobs import SIX_STEPS
from runs import PRETRAIN, SCRIPTS, assert_same_state, losses, write_recipe

pytestmark = pytest.mark.slow

SRUN = """#!/bin/bash
srun --ntasks-per-node=1 {python} {pretrain} --config {recipe} {arguments}
"""


def test_each_node_has_its_name_and_its_address(cluster):
    assert sorted(cluster.run("srun", "-N2", "hostname").split()) == list(slurm.NODES)
    assert cluster.run("srun", "-N2", "--label", "ip", "-br", "-4", "address", "show", "eth0").count("10.99.0.") == 2


def test_the_losses_of_one_host(cluster, expected, corpus, tmp_path):
    """Bare `srun`: only SLURM's own variables tell the ranks where to meet."""
    recipe, path = write_recipe(tmp_path, corpus), tmp_path / "job.sh"
    path.write_text(
        SRUN.format(python=SCRIPTS / "python", pretrain=PRETRAIN, recipe=recipe, arguments=" ".join(SIX_STEPS))
    )
    job = cluster.sbatch("-N2", f"--output={tmp_path}/out", path, env={"GLOO_SOCKET_IFNAME": "eth0"})
    cluster.wait_for(job, "COMPLETED")
    assert losses(tmp_path / "runs/test") == losses(expected)
    assert_same_state(tmp_path / "runs/test", expected)


def test_a_node_can_be_taken_off_the_network(cluster):
    def reached() -> bool:
        return cluster.run("timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/n2/6818 && echo yes", code=None) == "yes\n"

    assert reached()
    cluster.cut("n2")
    assert not reached()
    cluster.restore("n2")
    assert reached()


def test_nothing_of_a_cluster_outlives_its_owner(tmp_path):
    """Also an owner that was killed: no process is left that has the cluster's folder in its command line."""
    if why := slurm.missing():
        pytest.skip(f"a SLURM cluster {why}")
    script = "import sys, time; from pathlib import Path; import slurm\n" + (
        "with slurm.cluster(Path(sys.argv[1])): print('up', flush=True); time.sleep(600)"
    )
    paths = os.pathsep.join([str(slurm.HERE), str(slurm.HERE.parent / "launcher"), str(slurm.ROOT)])
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "cluster")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert processes_of(tmp_path) != []
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    slurm.wait_until(lambda: processes_of(tmp_path) == [], 20, lambda: str(processes_of(tmp_path)))
    assert "10.99.0" not in subprocess.run(["ip", "address"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it has ended
            continue
        if str(folder) in command:
            found.append(command)
    return found
