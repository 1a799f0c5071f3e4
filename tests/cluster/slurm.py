"""A real two-node SLURM on this machine, in namespaces of its own; see hosts.sh. Needs root and Debian's packages."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import ROOT, environment

HERE = Path(__file__).parent
NODES = ("n1", "n2")
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "ip": "iproute2"}
GONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")

# Requeued jobs wait until the credential of their last start has expired: two minutes with SLURM's default.
CONFIG = """
ClusterName=longhaul
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
JobRequeue=1
KillWait=30
ReturnToService=2
SlurmdTimeout=10
MpiDefault=none
NodeName=n[1-2] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=2:00:00 PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] MaxTime=1:00:00 PriorityTier=10 PreemptMode=OFF
"""

# Each node has process numbers of its own, so that killing process 1 kills the node. A slurmd that ends is started again,
# as systemd does, but not while the file is there.
NODE = """
hostname "$1"
while true; do
  slurmd -D -N "$1" -f {folder}/slurm.conf
  while [ -e "{folder}/$1.hold" ]; do sleep 0.2; done
done
"""


class Unavailable(RuntimeError):
    """This machine cannot run the cluster; the message says what it lacks."""


class Cluster:
    """A running cluster. Commands run on its controller, `ctl`."""

    def __init__(self, folder: Path, init: subprocess.Popen, pid: int) -> None:
        self.folder, self._init = folder, init
        self._enter = ["nsenter", f"--target={pid}", "--mount", "--net", "--pid", "--uts", f"--wdns={ROOT}"]

    def start(self, *command: object, host: str = "ctl", **popen) -> subprocess.Popen:
        inner = [] if host == "ctl" else ["nsenter", f"--net=/run/netns/{host}"]
        env = environment(SLURM_CONF=str(self.folder / "slurm.conf"), **popen.pop("env", {}))
        words = [str(word) for word in (*self._enter, *inner, *command)]
        return subprocess.Popen(words, env=env, text=True, start_new_session=True, **popen)

    def run(self, *command: object, code: int | None = 0, timeout: float = 60, **popen) -> str:
        """Run to the end and return its output, both streams; asserts the exit code unless it is None."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert code is None or process.returncode == code, f"{command}: exit code {process.returncode}\n{out}"
        return out

    def sbatch(self, *arguments: object, **popen) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **popen).split(";")[0].strip().splitlines()[-1]

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "")

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|\n)", shown))

    def wait_for(self, job: str, *states: str, timeout: float = 120) -> str:
        """Until the job is in one of the states; any other end of it fails at once, with the job's output."""
        found = ""

        def there() -> bool:
            nonlocal found
            found = self.state(job)
            assert found in states or found not in GONE, f"job {job} is {found}\n{self.output(job)[-6000:]}"
            return found in states

        wait_until(there, timeout, lambda: f"job {job} is {found}, not {states}\n{self.output(job)[-6000:]}")
        return found

    def output(self, job: str) -> str:
        path = Path(self.job(job).get("StdOut", "/nonexistent"))
        return path.read_text(errors="replace") if path.exists() else ""

    def nodes_idle(self, timeout: float = 60) -> None:
        def idle() -> bool:
            return self.run("sinfo", "-hN", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES)

        wait_until(idle, timeout, lambda: self.run("sinfo") + self.run("squeue") + self.logs())

    def cut(self, node: str) -> None:
        """Take the node off the network, as if its cable were pulled."""
        self.run("ip", "link", "set", f"to-{node}", "down")

    def restore(self, node: str) -> None:
        self.run("ip", "link", "set", f"to-{node}", "up")

    def mute(self, node: str, towards: str) -> None:
        """What the node sends to the other one is lost, silently; it still hears that one."""
        self.run("ip", "-n", node, "route", "add", "blackhole", self._address(towards))

    def unmute(self, node: str, towards: str) -> None:
        self.run("ip", "-n", node, "route", "del", "blackhole", self._address(towards))

    def _address(self, node: str) -> str:
        return f"10.99.0.{NODES.index(node) + 1}"

    def kill_node(self, node: str) -> None:
        """End all its processes at once, as a loss of power does."""
        _kill(["bash", str(self.folder / "node.sh"), node])

    def boot_node(self, node: str) -> None:
        with open(self.folder / f"{node}.out", "a") as out:
            self.start(
                "nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child",
                "--mount-proc", "bash", self.folder / "node.sh", node, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def kill_slurmd(self, node: str) -> None:
        """End the daemon alone; what runs on the node goes on."""
        (self.folder / f"{node}.hold").touch()
        _kill(["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")])

    def start_slurmd(self, node: str) -> None:
        (self.folder / f"{node}.hold").unlink()

    def clear(self) -> None:
        """No job, all nodes back: for the next test."""
        for node in NODES:
            self.restore(node)
            (self.folder / f"{node}.hold").unlink(missing_ok=True)
        self.run("scancel", "--full", "--user=root", code=None)
        self.run("scancel", "--signal=KILL", "--user=root", code=None)
        self.nodes_idle()

    def logs(self) -> str:
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


def _kill(words: list[str]) -> None:
    """SIGKILL for the one process of these words, in whichever namespace it is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_bytes().decode(errors="replace").rstrip("\0").split("\0") == words:
                found.append(int(path.parent.name))
    assert len(found) == 1, f"{words}: {found}"
    os.kill(found[0], signal.SIGKILL)


def missing() -> str | None:
    """Why the cluster cannot be run here, None if it can."""
    if os.geteuid() != 0:
        return "needs root: it makes network namespaces"
    if lacking := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        return f"needs apt-get install {' '.join(lacking)}"
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "sh", "-c",
         "mount -t tmpfs none /run && ip link add name br0 type bridge && ip link add name one type veth peer name two"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"cannot make namespaces here: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Bring a cluster up; it is gone with the block, or with this process however that ends."""
    if why := missing():
        raise Unavailable(why)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
    (folder / "node.sh").write_text(NODE.format(folder=folder))
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    os.chmod(folder / "munge.key", 0o400)
    with open(folder / "hosts.out", "w") as errors:
        init = subprocess.Popen(
            ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc",
             "bash", str(HERE / "hosts.sh"), str(folder), *NODES],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        assert init.stdout is not None
        up = init.stdout.readline()
        pid = int(Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0]) if up else 0
        running = Cluster(folder, init, pid)
        if not up:
            raise RuntimeError(f"the cluster did not come up\n{running.logs()}")
        wait_until(lambda: running.run("scontrol", "ping", code=None).count("is UP") == 1, 20, running.logs)
        running.nodes_idle(30)
        yield running
    finally:
        assert init.stdin is not None
        init.stdin.close()
        init.wait(20)


def wait_until(condition: Callable[[], bool], timeout: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what()}"
        time.sleep(0.2)
