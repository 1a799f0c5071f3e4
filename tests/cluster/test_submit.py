"""Submitting to a real SLURM: what runs, and what is refused before it is queued."""

import subprocess

import pytest

from jobs import SIX_STEPS, records, submit, submit_command
from runs import ROOT, assert_same_state, environment, losses, write_recipe

pytestmark = pytest.mark.slow


def test_a_submitted_run_gives_the_losses_of_one_host(cluster, expected, corpus, tmp_path):
    """With a task for each rank; `launch: deepspeed` is seen in test_requeue.py."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    job = submit(cluster, folder, corpus, *SIX_STEPS, "eval.prompts=['it is \"so\" $HOME']")
    cluster.wait_for(job, "COMPLETED")
    run_dir = folder / "runs/test"
    assert losses(run_dir) == losses(expected)
    assert_same_state(run_dir, expected)
    assert [end["kind"] for end in records(run_dir, "end")] == ["finished"]
    assert "job.py: the run is finished" in (run_dir / f"logs/slurm-{job}.out").read_text()
    again = cluster.run(*submit_command(folder, folder / "test.yaml", *SIX_STEPS), code=2)
    assert f"{run_dir} is finished; nothing to queue" in again
    by_hand = cluster.sbatch(run_dir / "job.sh")
    cluster.wait_for(by_hand, "COMPLETED")


TUNE = """
init: {init}
task: {{kind: text}}
run: {{name: tuned, folder: {folder}}}
data: {{corpus: {corpus}, sources: [{{kind: text, paths: [-]}}]}}
optim: {{lr: 1e-3, warmup_steps: 2}}
parallel: {{zero_stage: 2, precision: fp32, timeout_s: 60}}
train: {{steps: 6, global_batch_size: 8, micro_batch_size: 2}}
checkpoint: {{every: 3}}
log: {{every: 1}}
eval: {{every: 3, windows: 10}}
"""


@pytest.mark.long
def test_a_fine_tuning_is_submitted_and_stopped_and_goes_on(cluster, expected, corpus, tmp_path):
    recipe, run_dir = tmp_path / "tune.yaml", tmp_path / "runs/tuned"
    recipe.write_text(TUNE.format(init=expected, folder=tmp_path / "runs", corpus=corpus))
    for steps in ("train.stop_at=4", "train.steps=6"):
        out = cluster.run(*submit_command(tmp_path, recipe, steps))
        cluster.wait_for(out.split()[2].rstrip(","), "COMPLETED")
    assert [end["kind"] for end in records(run_dir, "end")] == ["finished", "finished"]
    assert [event["step"] for event in records(run_dir, "start", "ledger.jsonl")] == [0, 4]
    assert f"from {expected}@6" in (run_dir / f"logs/slurm-{records(run_dir, 'end')[0]['job']}.out").read_text()
    assert sorted(losses(run_dir)) == list(range(1, 7))


@pytest.mark.parametrize(
    ("overrides", "changes", "messages"),
    [
        (["train.stepz=3", "optim.lr=-1"], {"partition": "gpu"},
         ["train.stepz: no such key; did you mean train.steps?", "optim.lr: got -1",
          "SLURM has no gpu; it has main, urgent"]),
        (["train.global_batch_size=9"], {"nodes": 3},
         ["a global batch of 9 sequences does not divide into train.micro_batch_size=2 on 3 ranks",
          "nodes: got 3; the partition main has 2"]),
        ([], {"time": "3:00:00"}, ["time: got 3:00:00; the partition main allows 2:00:00 at most"]),
        (["run.folder=/proc/runs"], {}, ["/proc/runs cannot be written: ", "choose another place with run.folder"]),
        (["data.corpus=/nowhere"], {}, ["corpus folder /nowhere does not exist"]),
        ([], {"sbatch": ["--constraint=quantum"]}, ["sbatch refuses", "eature"]),
        ([], {"lead_s": 700}, ["lead_s: got 700, and time is 10:00"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)  # fmt: skip
def test_refused_before_it_is_queued(cluster, corpus, tmp_path, overrides, changes, messages):
    out = cluster.run(*submit_command(tmp_path, write_recipe(tmp_path, corpus), *overrides, **changes), code=2)
    assert out.startswith("submit: ")
    for message in messages:
        assert message in out
    assert cluster.run("squeue", "--noheader") == ""


def test_a_second_job_of_a_run_is_refused(cluster, corpus, tmp_path):
    job = submit(cluster, tmp_path, corpus, sbatch=["--begin=now+1hour"])
    out = cluster.run(*submit_command(tmp_path, tmp_path / "test.yaml"), code=2)
    assert f"runs/test has job {job}, which is PENDING; it goes on by itself. To replace it: scancel {job}" in out
    cluster.run("scancel", job)
    submit(cluster, tmp_path, corpus, sbatch=["--begin=now+1hour"])


def test_without_slurm_only_the_script_is_to_be_had(corpus, tmp_path):
    command = submit_command(tmp_path, write_recipe(tmp_path, corpus))
    dry = subprocess.run([*command, "--dry-run"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=test\n")
    assert not (tmp_path / "runs").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment(PATH="/nowhere"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "sinfo is not here; call this on a node of a SLURM cluster" in done.stderr


def test_min_nodes_is_a_number_that_the_batch_divides_over(corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)

    def dry(nodes, min_nodes, batch):
        changes, override = {"nodes": nodes, "min_nodes": min_nodes}, f"train.global_batch_size={batch}"
        command = submit_command(tmp_path, recipe, override, "--dry-run", **changes)
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)

    refused = dry(3, 2, 6)
    assert refused.returncode == 2
    assert "min_nodes: got 2; the batch does not divide over 2 ranks; numbers of nodes that do are 3" in refused.stderr
    assert " --node-counts 2,4 " in dry(4, 2, 8).stdout
