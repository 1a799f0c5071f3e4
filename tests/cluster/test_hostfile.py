"""A plain DeepSpeed hostfile over ssh, without SLURM: two hosts with an sshd each, as README says it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import SIX_STEPS
from runs import PRETRAIN, SCRIPTS, assert_same_state, losses, write_recipe
from slurm import NODES, Cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

SSHD = """
ListenAddress {host}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@pytest.fixture
def hosts(cluster, tmp_path) -> Iterator[Cluster]:
    """The two nodes, reached by ssh. What ssh reads is mounted where only they see it."""
    if lacking := [name for name in ("sshd", "ssh", "pdsh") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(lacking)}: apt-get install openssh-server pdsh")
    folder = tmp_path / "ssh"
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    cluster.run("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
    cluster.run("mkdir", "-p", "/run/sshd")
    daemons = []
    with open(folder / "log", "w") as log:
        for host in NODES:
            (folder / host).write_text(SSHD.format(host=host, folder=folder))
            daemons.append(
                cluster.start(
                    "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash", "-c",
                    f'hostname {host}; exec "$0" -D -e -f {folder / host}', shutil.which("sshd"), host=host,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )
            )  # fmt: skip
    try:
        for host in NODES:
            wait_until(
                lambda host=host: cluster.run("ssh", host, "hostname", code=None) == f"{host}\n", 30,
                lambda: (folder / "log").read_text(),
            )  # fmt: skip
        yield cluster
    finally:
        for daemon in daemons:
            os.killpg(daemon.pid, signal.SIGKILL)  # with what nsenter has started
            daemon.wait()
        cluster.run("umount", "/etc/ssh/ssh_config")


def test_a_run_over_ssh_stopped_and_continued_is_that_of_one_host(hosts, expected, corpus, tmp_path):
    recipe, hostfile, log = write_recipe(tmp_path, corpus), tmp_path / "hostfile", Path(tmp_path / "log")
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    command = [SCRIPTS / "deepspeed", "--hostfile", hostfile, "--master_addr", "n1", PRETRAIN, f"--config={recipe}",
               *SIX_STEPS]  # fmt: skip
    for more, code in ((["train.stop_at=3"], None), ([], 0)):
        out = hosts.run(*command, *more, code=code, timeout=300, host="n1", env={"DS_ENV_FILE": str(tmp_path / "env")})
        log.write_text(out)
    assert "resumed from" in out
    assert losses(tmp_path / "runs/test") == losses(expected)
    assert_same_state(tmp_path / "runs/test", expected)
