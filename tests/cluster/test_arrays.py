"""Preparation and evaluation as job arrays: the bytes and the numbers of the commands without SLURM."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.arrays import evaluate_script, prepare_script
from cluster.config import load_cluster
from jobs import cluster_file, submit_command
from launcher import check, evaluate
from launcher.config import load_config, to_yaml
from runs import ROOT, environment, write_recipe
from slurm import wait_until

VARIANTS = {
    "plain": {},
    "gpus": {"gpus_per_node": 8, "cpus_per_task": 3, "tasks_per_node": None, "sbatch": ["--mem=0"], "lead_s": 300},
    "apptainer": {"container": {"kind": "apptainer", "image": "my image.sif", "mounts": ["/a b:/c"]}},
    "pyxis": {"container": {"kind": "pyxis", "image": "docker://a#b", "mounts": ["/a:/a"]}},
}


def prepare_text(cfg, folder, python="/env/bin/python"):
    return prepare_script(
        cfg, name="try", folder=folder / "a b/c.slurm", corpus=folder / "a b/c", cwd=folder, python=python,
        arguments=["--config=r.yaml", "run.name=it's"],
    )  # fmt: skip


def evaluate_text(cfg, folder, python="/env/bin/python"):
    return evaluate_script(
        cfg, name="try", folder=folder / "run/evaluations/wiki", run_dir=folder / "a run", cwd=folder, python=python,
        steps=[5, 10, 15], save="wiki", data=["x y.txt", "z.txt"],
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", [prepare_text, evaluate_text])
def test_shells_accept_the_scripts(tmp_path, variant, text):
    path = tmp_path / "job.sh"
    path.write_text(text(load_cluster(str(cluster_file(tmp_path, **VARIANTS[variant]))), tmp_path))
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def asked(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_what_sbatch_is_asked_for(tmp_path):
    plain, gpus = (load_cluster(str(cluster_file(tmp_path, **VARIANTS[name]))) for name in ("plain", "gpus"))
    assert asked(prepare_text(plain, Path("/f"))) == [
        "--job-name=prepare-try", "--array=0-1", "--nodes=1", "--ntasks=1", "--time=10:00", "--partition=main", "--requeue",
        "--open-mode=append", "--chdir=/f", '--output="/f/a b/c.slurm/%A-%a.out"', "--signal=B:USR1@30", "--exclusive",
    ]  # fmt: skip
    assert asked(prepare_text(gpus, Path("/f")))[-3:] == ["--cpus-per-task=24", "--signal=B:USR1@60", "--mem=0"]
    assert asked(evaluate_text(gpus, Path("/f"))) == [
        "--job-name=evaluate-try", "--array=0-2%2", "--nodes=1", "--ntasks=1", "--time=10:00", "--partition=main",
        "--requeue", "--open-mode=append", "--chdir=/f", "--output=/f/run/evaluations/wiki/%A-%a.out", "--gpus-per-node=1",
        "--cpus-per-task=3", "--mem=0",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_command_of_a_task(tmp_path, variant):
    """Run for real, with programs of these names that write down what they were given."""
    cfg = load_cluster(str(cluster_file(tmp_path, **VARIANTS[variant])))
    strip = 'while [ "$1" != python ]; do shift; done; "$@"'
    env = stand_ins(tmp_path, python='printf "%s|" "$@"', srun=strip, apptainer=strip)
    (tmp_path / "a b/c.slurm").mkdir(parents=True)
    run = {
        text: subprocess.run(["bash", "-c", text(cfg, tmp_path, str(tmp_path / "bin/python"))], env=env,
                             capture_output=True, text=True)
        for text in (prepare_text, evaluate_text)
    }  # fmt: skip
    assert [done.returncode for done in run.values()] == [0, 0], run
    assert run[prepare_text].stdout == f"{ROOT}/launcher/prepare.py|--config=r.yaml|run.name=it's|"
    assert run[evaluate_text].stdout.split("|")[:-1] == [
        f"{ROOT}/launcher/evaluate.py", f"{tmp_path}/a run", "--save=wiki", "--data", "x y.txt", "z.txt", "--step", "10"
    ]  # fmt: skip


def stand_ins(folder, **programs):
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_CPUS_ON_NODE": "2"}  # fmt: skip


@pytest.mark.parametrize("progress", [True, False])
def test_before_the_time_limit_a_part_that_got_further_is_queued_again(tmp_path, progress):
    env = stand_ins(
        tmp_path, scontrol='echo "scontrol $*"', python="touch ready; while [ ! -e go ]; do sleep 0.1; done; exit 3"
    )
    (tmp_path / "a b/c.slurm").mkdir(parents=True)
    (tmp_path / "a b/c").mkdir()
    (tmp_path / "a b/c/old.json").touch()
    os.utime(tmp_path / "a b/c/old.json", (1, 1))
    text = prepare_text(load_cluster(str(cluster_file(tmp_path))), tmp_path, str(tmp_path / "bin/python"))
    process = subprocess.Popen(["bash", "-c", text], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "ready").exists, 60)
    if progress:
        (tmp_path / "a b/c/new.json").touch()
        later = time.time() + 10
        os.utime(tmp_path / "a b/c/new.json", (later, later))
    process.send_signal(signal.SIGUSR1)
    said = process.stdout.readline()
    said += process.stdout.readline() if progress else ""
    (tmp_path / "go").touch()
    assert process.wait(60) == 3  # it goes on until SLURM ends it
    assert said == (
        "the time limit is near: part 1 is queued again\nscontrol requeue 77_1\n" if progress
        else "nothing was finished in 10:00; give it more time, or lower data.shard_bytes\n"
    )  # fmt: skip


@pytest.fixture
def text_recipe(corpus, tmp_path):
    """The recipe of the corpus that the tests share, made elsewhere: its path, and overrides."""
    sources = json.dumps([{"kind": "text", "paths": [str(corpus.parent / "texts/*.py")]}])
    return write_recipe(tmp_path, tmp_path / "made"), (
        f"data.sources={sources}", "data.tokenizer.train_bytes=1048576", "data.valid_fraction=0.1",
        "data.shard_bytes=300000", "data.workers=1",
    )  # fmt: skip


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def array_command(folder, recipe, *arguments, **changes):
    return submit_command(folder, recipe, *arguments, **{"nodes": 2, **changes})


def queued(out):
    assert out.startswith("queued: job "), out
    return out.split()[2].rstrip(",")


def part_pids(recipe, part):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            env = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if words[1:2] == [f"{ROOT}/launcher/prepare.py"] and f"--config={recipe}" in words:
            found += [int(path.name)] if f"SLURM_ARRAY_TASK_ID={part}".encode() in env else []
    return found


@pytest.mark.slow
def test_a_corpus_prepared_by_two_nodes_one_of_which_fails_at_first(cluster, corpus, text_recipe, tmp_path):
    """Its part is done by the same command again; the bytes are those of one process without SLURM."""
    recipe, overrides = text_recipe
    command = array_command(tmp_path, recipe, "--job=prepare", *overrides)
    job = queued(cluster.run(*command))
    wait_until(lambda: part_pids(recipe, 1), 60, lambda: cluster.run("squeue"))
    (pid,) = part_pids(recipe, 1)
    os.kill(pid, signal.SIGSTOP)
    cluster.wait_for(f"{job}_0", "COMPLETED")
    second = "from pathlib import Path; from cluster.submit import refuse_second_job; refuse_second_job(Path({!r}))"
    out = cluster.run(sys.executable, "-c", second.format(f"{tmp_path}/made.slurm"), code=1)
    assert f"{tmp_path}/made.slurm has job {job}, which is RUNNING; it goes on by itself" in out
    os.kill(pid, signal.SIGKILL)
    cluster.wait_for(f"{job}_1", "FAILED")
    assert not (tmp_path / "made/manifest.json").exists()
    job = queued(cluster.run(*command))
    for part in (0, 1):
        cluster.wait_for(f"{job}_{part}", "COMPLETED")
    assert files(tmp_path / "made") == files(corpus)
    out = cluster.run(*command, code=2)
    assert f"submit: {tmp_path}/made is whole; nothing to queue" in out
    assert sorted(path.name for path in (tmp_path / "made.slurm").glob(f"{job}*.out")) == [
        f"{job}-0.out",
        f"{job}-1.out",
    ]


@pytest.mark.slow
def test_checkpoints_evaluated_by_an_array(cluster, expected, tmp_path, capsys):
    run_dir, recipe = tmp_path / "runs/test", tmp_path / "test.yaml"
    shutil.copytree(expected, run_dir)
    recipe.write_text((expected.parents[1] / "test.yaml").read_text().replace(str(expected.parents[1]), str(tmp_path)))
    job = queued(cluster.run(*array_command(tmp_path, recipe, "--job=evaluate")))
    for task in (0, 1):
        cluster.wait_for(f"{job}_{task}", "COMPLETED")
    for step in (5, 6):
        capsys.readouterr()
        assert evaluate.main([str(run_dir), f"--step={step}", "--json"]) == 0
        kept = json.loads((run_dir / f"evaluations/held-out/step-{step:08d}.json").read_text())
        assert kept == json.loads(capsys.readouterr().out)
    assert check.main([f"--config={recipe}", "--job=evaluate"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=3"], "--steps, --data and --save belong to --job evaluate; this is --job pretrain"),
        (["--job=evaluate", "--data=x.txt"], "--data needs a name for its results, such as --save wiki"),
    ],
)
def test_options_that_do_not_fit(corpus, tmp_path, arguments, message):
    done = subprocess.run(
        [*array_command(tmp_path, write_recipe(tmp_path, corpus)), *arguments], cwd=ROOT, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--job=prepare", "data.corpus=s3://b/c"], "data.corpus=s3://b/c is a URL, and prepare writes to a folder"),
        (["--job=prepare", "data.sources=[{kind: text, paths: [/nowhere/*]}]", "data.corpus=/nowhere/corpus"],
         "'/nowhere/*' matches no file"),
        (["--job=prepare"], "was begun with other options or other text"),
        (["--job=evaluate", "--steps=7,5"], "has no checkpoint of step 7; it has: 5"),
        (["--job=evaluate", "--steps=all"], "--steps all; expected steps with commas between them, such as 1000,2000"),
        (["--job=evaluate", "--data=/nowhere/x.txt", "--save=x"], "'/nowhere/x.txt' matches no file"),
        (["--job=evaluate", "--save=a/b"], "--save 'a/b'; expected a name of letters, digits, dots and dashes"),
        (["--job=evaluate", "run.name=other"], "runs/other is no folder of a run; beside it: "),
        (["--job=evaluate", "run.name=empty"], "runs/empty has no checkpoint yet; beside it: "),
    ],
)  # fmt: skip
def test_what_is_refused_before_it_is_queued(corpus, tmp_path, arguments, message, capsys):
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    (run_dir / "checkpoints/step-00000005").mkdir(parents=True)
    (run_dir / "checkpoints/step-00000005/manifest.json").touch()
    (tmp_path / "runs/empty").mkdir()
    for name in ("test", "empty"):
        (tmp_path / f"runs/{name}/config.yaml").write_text(to_yaml(load_config(str(recipe), [])))
    assert check.main([f"--config={recipe}", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_dry_runs_write_nothing(corpus, text_recipe, tmp_path):
    recipe, overrides = text_recipe
    before = sorted(tmp_path.iterdir())
    dry = subprocess.run(
        [*array_command(tmp_path, recipe, "--job=prepare", "--dry-run"), *overrides, "data.clean.exact=true"], cwd=ROOT,
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=prepare-test\n")
    assert f"launcher/prepare.py --config={recipe} {shlex.quote(overrides[0])} " in dry.stdout
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cluster.yaml"])
    assert sys.executable in dry.stdout
