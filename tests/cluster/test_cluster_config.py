"""Cluster files: what is wrong is told, all at once; what is right becomes a script that a shell can read."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.config import ClusterError, load_cluster
from cluster.script import job_script

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs/cluster").glob("*.yaml"))


def write(folder, text):
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def script(cfg, **changes):
    return job_script(
        cfg, **{"name": "try", "run_dir": Path("/runs/a b/100%"), "cwd": Path("/work"), "python": "/env/bin/python",
                "arguments": ["--config=r.yaml", "run.name=it's"], "lead_s": 300, "node_counts": [2], **changes}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("{nodes: 1, tasks_per_node: 1, time: '60', partion: x}", ["partion: no such key; did you mean partition?"]),
        ("{nodes: 1, tasks_per_node: 1, time: '60', xyzzy: x}",
         ["xyzzy: no such key; known here: nodes, time, min_nodes, gpus_per_node"]),
        ("{}", ["nodes: missing; it has no default", "time: missing; it has no default"]),
        ("{nodes: 2, gpus_per_node: 8, time: 24:00:00}",
         ['time: got 86400; expected a text, in quotes, as YAML reads 24:00:00 as a number: "24:00:00"']),
        ("{nodes: two, gpus_per_node: true, time: '60', launch: mpirun, modules: gcc, env: {A: 1}, container: x, "
         "account: 3}",
         ["nodes: got 'two'; expected a whole number", "gpus_per_node: got True; expected a whole number",
          "launch: got 'mpirun'; expected srun or deepspeed", "modules: got 'gcc'; expected a list of texts",
          "env: got {'A': 1}; expected names with texts (numbers in quotes: \"1\")",
          "container: got 'x'; expected a mapping",
          "account: got 3; expected a text"]),
        ("{nodes: 0, gpus_per_node: 8, time: soon, env: {HF_TOKEN: x, 'a b': y}, network_interface: 'ib0,ib1', sbatch: [x]}",
         ["nodes: got 0; expected 1 or more", "time: got 'soon'; expected a time as SLURM writes it",
          "env.HF_TOKEN: the job's script may be read by others, so no secrets here", "env.a b: no name of a variable",
          "network_interface: got 'ib0,ib1'; expected one name", "sbatch: got 'x'; expected an option of sbatch"]),
        ("{nodes: 1, time: '5'}", ["gpus_per_node: got 0 and no tasks_per_node; give one of the two",
                                   "lead_s: got 300, and time is 5; nothing of a start would be left: lower lead_s"]),
        ("{nodes: 1, gpus_per_node: 1, time: '10'}", [
            "preflight.within_s: got 300, lead_s is 300 and time 10; a pre-flight that takes its time would leave nothing"]),
        ("{nodes: 1, gpus_per_node: 1, time: '60', container: {kind: docker, imag: x}}",
         ["container.kind: got 'docker'; expected apptainer or pyxis",
          "container.imag: no such key; did you mean container.image?",
          "container.image: missing"]),
        ("{nodes: 2, gpus_per_node: 1, time: '60', preflight: {enabled: 1, within_s: 5, clock_s: -1, sped: 1}}",
         ["preflight.enabled: got 1; expected true or false", "preflight.clock_s: got -1; expected a number, 0 or more",
          "preflight.sped: no such key; did you mean preflight.speed?"]),
        ("{nodes: 2, gpus_per_node: 1, time: '60', min_nodes: 3, preflight: {within_s: 5, speed: 1.5}}",
         ["min_nodes: got 3; expected 1 to 2, which is nodes", "preflight.within_s: got 5; expected 30 or more",
          "preflight.speed: got 1.5; expected a share, below 1"]),
        ("[1]", ["expected keys such as nodes: and time:; got list"]),
        ("{a: [", ["not YAML"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_at_once(tmp_path, text, messages):
    with pytest.raises(ClusterError) as error:
        load_cluster(write(tmp_path, text))
    for message in messages:
        assert message in str(error.value)


def test_a_missing_file_names_the_examples():
    with pytest.raises(
        ClusterError, match=r"cannot read the cluster file nope.yaml: .*; examples: configs/cluster/one.yaml"
    ):
        load_cluster("nope.yaml")


def test_there_are_examples():
    assert [(path.stem, load_cluster(str(path)).ranks) for path in EXAMPLES] == [
        ("one", 8), ("sixty-four", 512), ("two", 16)
    ]  # fmt: skip


VARIANTS = {
    "srun": "",
    "deepspeed": "launch: deepspeed, cpus_per_task: 3,",
    "apptainer": "container: {kind: apptainer, image: my image.sif, mounts: ['/a b:/c']}, gpus_per_node: 8,",
    "apptainer-deepspeed": "launch: deepspeed, container: {kind: apptainer, image: i.sif},",
    "pyxis": "container: {kind: pyxis, image: 'docker://a#b', mounts: ['/a:/a', '/b:/b']},",
    "all": "partition: p, account: a, qos: q, reservation: r, exclude: 'n[1-2]', modules: [gcc/12], env: {X: \"a'b $c\"}, "
    "network_interface: ib0, scratch: /tmp/s p, cache: /c, sbatch: ['--mem=0'],",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shells_accept_the_script(tmp_path, variant):
    cfg = load_cluster(write(tmp_path, f"{{nodes: 2, tasks_per_node: 2, time: '60', {VARIANTS[variant]}}}"))
    path = tmp_path / "job.sh"
    path.write_text(script(cfg))
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):  # SC2016: "$@" is for the shell that srun starts
        done = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# what job.py does with the two commands: one after the other
JOB = """while [ "$1" != -- ]; do shift; done; shift; first=()
while [ "$1" != -- ]; do first+=("$1"); shift; done; shift; "${first[@]}"; "$@\""""


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ranks_get_their_command_word_for_word(tmp_path, variant):
    """Run for real, with programs of these names that write down what they were given."""
    cfg = load_cluster(write(tmp_path, f"{{nodes: 2, tasks_per_node: 2, time: '60', {VARIANTS[variant]}}}"))
    bin_dir, run_dir = tmp_path / "bin", tmp_path / "run dir"
    for folder in (bin_dir, run_dir):
        folder.mkdir()
    programs = {
        "srun": 'while [ "$1" != bash ]; do shift; done\n"$@"',  # as one task
        "apptainer": 'printf "%s|" inside "$@" >&3; while [ "$1" != python ]; do shift; done\n"$@"',
        "module": "true",
        "python": f"case $1 in *job.py) {JOB};; *) printf '%s|' \"$@\"; echo;; esac",
    }
    for name, body in programs.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    command = "finetune" if cfg.launch == "deepspeed" else "pretrain"
    text = script(cfg, run_dir=run_dir, python=str(bin_dir / "python"), command=command).replace(
        "/tmp/s p", str(tmp_path / "s p")
    )
    env = {"PATH": f"{bin_dir}:/usr/bin:/bin", "SLURM_NODEID": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "7"}
    done = subprocess.run(
        ["bash", "-c", f'exec 3>{tmp_path}/outer; eval "$0"', text], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    program = [str(ROOT / f"launcher/{command}.py"), "--config=r.yaml", "run.name=it's"]
    preflight, ranks = (line.rstrip("|").split("|") for line in done.stdout.splitlines())
    assert preflight[:2] == [str(ROOT / "launcher/preflight.py"), f"--folder={run_dir}"]
    assert preflight[2:] == ([f"--folder={tmp_path / 's p'}"] if cfg.scratch else [])
    if cfg.launch == "deepspeed":
        assert ranks == [
            "-m", "deepspeed.launcher.runner", "--hostfile", str(run_dir / "hostfile"), "--no_ssh", "--node_rank", "1",
            "--master_addr", "n1", "--master_port", "7", *program,
        ]  # fmt: skip
    else:
        assert ranks == program
    if variant == "apptainer":
        outer = (tmp_path / "outer").read_text().rstrip("|").split("|")
        assert outer[:7] == ["inside", "exec", "--nv", "--bind", "/a b:/c", "my image.sif", "python"]


def test_what_sbatch_is_asked_for(tmp_path):
    cfg = load_cluster(
        write(tmp_path, f"{{nodes: 2, gpus_per_node: 8, cpus_per_task: 3, time: '60', {VARIANTS['all']}}}")
    )
    asked = [line.removeprefix("#SBATCH ") for line in script(cfg).splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=try", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=3", "--time=60",
        "--partition=p", "--account=a", "--qos=q", "--reservation=r", "--exclude=n[1-2]", "--signal=B:USR1@300",
        "--requeue", "--open-mode=append", "--chdir=/work", '--output="/runs/a b/100%%/logs/slurm-%j.out"', "--mem=0",
    ]  # fmt: skip
    less = load_cluster(write(tmp_path, "{nodes: 4, min_nodes: 2, gpus_per_node: 8, cpus_per_task: 3, time: '60'}"))
    text = script(less, node_counts=[2, 4])
    assert "#SBATCH --nodes=2-4\n#SBATCH --gpus-per-node=8\n#SBATCH --mincpus=24\n#SBATCH --exclusive\n" in text
    assert "--ntasks-per-node=8\n#" not in text  # with these SLURM gives as few nodes as hold the tasks
    assert " --node-counts 2,4 --tasks-per-node 8 " in text
    assert "srun --ntasks-per-node=8 --cpus-per-task=3 --wait=60" in script(
        cfg
    )  # srun takes no --cpus-per-task from its job
