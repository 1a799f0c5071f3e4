"""Submit once, and the run finishes: stopped in every way that SLURM has, it ends in the bits of one that never was.

Each test ends in `same_as_undisturbed`: losses, weights and moments equal, each step logged once, the ledger finished,
and every batch read again and compared.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from cluster.goodput import read_status
from jobs import RUN, output, ranks, reach, records, standing_still, submit
from launcher import audit
from runs import assert_same_state, losses, run, torchrun, write_recipe
from slurm import NODES, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *RUN), folder / "log")
    return folder / "runs/test"


def same_as_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    assert losses(run_dir) == losses(undisturbed)
    assert_same_state(run_dir, undisturbed)
    assert [event["step"] for event in records(run_dir, "finished", "ledger.jsonl")] == [40]
    assert audit.main([str(run_dir), "--verify"]) == 0
    told = read_status(run_dir, time.time())
    assert (told.state, told.step, len(told.starts)) == ("finished", 40, len(records(run_dir, "begin")))
    assert sum(told.parts_s.values()) == pytest.approx(told.wall_s)  # or a time was counted twice


@pytest.mark.fault(24, 26)
def test_a_warning_while_the_ranks_start_is_repeated_until_they_heed_it(cluster, undisturbed, corpus, tmp_path):
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN), tmp_path / "runs/test"
    wait_until(lambda: "the ranks meet at" in output(run_dir, job), 60, lambda: output(run_dir, job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    first, last = records(run_dir, "end")
    assert (first["kind"], first["cause"], first["blameless"]) == (
        "stopped", "SIGUSR1 to the job: preemption, or by hand", True
    )  # fmt: skip
    assert first["verdict"].endswith("requeued")
    assert last["kind"] == "finished"
    assert [begin["restart"] for begin in records(run_dir, "begin")] == [0, 1]
    assert [event["signal"] for event in records(run_dir, "stopped", "ledger.jsonl")] == ["SIGUSR1"]


@pytest.mark.long
@pytest.mark.fault(24)
def test_a_warning_to_all_processes_but_the_script(cluster, undisturbed, corpus, tmp_path):
    """As `--signal` without `B:` sends it: to DeepSpeed's runner and launcher, too, which it must not end."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, launch="deepspeed"), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 5)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert [(end["kind"], end["cause"]) for end in records(run_dir, "end")] == [
        ("stopped", "a signal to the ranks"), ("finished", "")
    ]  # fmt: skip
    assert (run_dir / f"logs/slurm-{job}.out").read_text().count("Exited with exit code 75") == 2  # both of its runners


@pytest.mark.fault(23)
def test_scontrol_requeue(cluster, undisturbed, corpus, tmp_path):
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 5)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for(job, "PENDING")
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert cluster.job(job)["Restarts"] == "1"  # by SLURM alone: job.py did not ask for another


@pytest.mark.fault(25)
def test_scancel_saves_and_is_obeyed(cluster, undisturbed, corpus, tmp_path):
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 5)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    cluster.nodes_idle()
    assert [event["signal"] for event in records(run_dir, "stopped", "ledger.jsonl")] == ["SIGTERM"]
    assert "SLURM is ending the job itself" in records(run_dir, "end")[-1]["verdict"]
    assert cluster.run("squeue", "--noheader") == ""
    cluster.wait_for(cluster.sbatch(run_dir / "job.sh"), "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.fault(31)
def test_a_job_of_higher_priority_takes_the_nodes(cluster, undisturbed, corpus, tmp_path):
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 5)
    urgent = cluster.sbatch("-N2", "--exclusive", "--partition=urgent", f"--output={tmp_path}/urgent", "--wrap=sleep 3")
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert records(run_dir, "stopped", "ledger.jsonl")


@pytest.mark.parametrize(
    "warned",
    [
        pytest.param(True, marks=[pytest.mark.fault(24), pytest.mark.long], id="warned"),
        pytest.param(False, marks=[pytest.mark.fault(28), pytest.mark.long], id="not-warned"),
    ],
)
def test_a_time_limit_shorter_than_the_run(cluster, undisturbed, corpus, tmp_path, warned):
    """Warned by SLURM, or, where nobody does, by the job's own look at the time that is left.

    The ranks stand still until they are asked to stop: however fast or slow they are, the limit is too short.
    """
    run_dir, asked = tmp_path / "runs/test", "job.py: asking the ranks to save and stop: the time limit is near"
    held = submit(cluster, tmp_path, corpus, *RUN, "parallel.timeout_s=400", time="2", lead_s=60 if warned else 80,
                  sbatch=["--exclusive", "--hold"])  # fmt: skip
    cluster.run("scancel", held)
    script = run_dir / "job.sh"
    text = script.read_text().replace("#SBATCH --hold\n", "")
    script.write_text(
        text.replace("--lead-s 60", "--lead-s 1") if warned else re.sub("#SBATCH --signal=.*\n", "", text)
    )
    job = cluster.sbatch(script)
    reach(cluster, job, run_dir, 5)
    with standing_still(tmp_path):
        wait_until(lambda: asked in output(run_dir, job), 150, lambda: output(run_dir, job))
    cluster.wait_for(job, "COMPLETED", timeout=400)
    same_as_undisturbed(run_dir, undisturbed)
    assert "the time limit is near" in {end["cause"] for end in records(run_dir, "end")[:-1]}


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("power", marks=[pytest.mark.fault(29), pytest.mark.long]),
        pytest.param("network", marks=[pytest.mark.fault(32), pytest.mark.long]),
    ],
)
def test_a_node_that_is_lost(cluster, undisturbed, corpus, tmp_path, lost):
    """n1 has rank 0 and the job's script. The job goes on when the node is back; until then nothing of it runs."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, "parallel.timeout_s=8"), tmp_path / "runs/test"
    node, lose, bring_back = {
        "power": ("n1", cluster.kill_node, cluster.boot_node), "network": ("n2", cluster.cut, cluster.restore)
    }[lost]  # fmt: skip
    reach(cluster, job, run_dir, 18)
    lose(node)
    try:
        cluster.wait_for(job, "PENDING", timeout=180)
        wait_until(lambda: ranks(tmp_path) == [], 60, lambda: output(run_dir, job))
    finally:
        bring_back(node)
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert [begin["saved_step"] for begin in records(run_dir, "begin")] == [0, 15]
    if lost == "network":
        assert "rank 1 on n2 does not answer" in records(run_dir, "failed", "ledger.jsonl")[0]["error"]


@pytest.mark.long
@pytest.mark.fault(32)
@pytest.mark.parametrize(("node", "towards"), [("n2", "n1"), ("n1", "n2")])
def test_a_network_that_is_cut_one_way(cluster, undisturbed, corpus, tmp_path, node, towards):
    """SLURM sees nothing of it; one side still hears the other, and both end."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, "parallel.timeout_s=8"), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 18)
    cluster.mute(node, towards)
    try:
        wait_until(lambda: records(run_dir, "failed", "ledger.jsonl"), 120, lambda: output(run_dir, job))
        wait_until(lambda: ranks(tmp_path) == [], 90, lambda: output(run_dir, job))
    finally:
        cluster.unmute(node, towards)
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert [begin["saved_step"] for begin in records(run_dir, "begin")][:2] == [0, 15]
    assert re.search("rank [01] on n[12]", records(run_dir, "failed", "ledger.jsonl")[0]["error"])


@pytest.mark.long
@pytest.mark.fault(29)
def test_a_slurmd_that_is_killed(cluster, undisturbed, corpus, tmp_path):
    """SLURM takes its node for dead and requeues the job, while the ranks are all well.

    They stand still until then, as this run would be finished before SLURM notices.
    """
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, "parallel.timeout_s=400"), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 18)
    with standing_still(tmp_path):
        cluster.kill_slurmd("n2")
        wait_until(lambda: cluster.run("sinfo", "-hN", "-n", "n2", "-o", "%T").startswith("down"), 120)
    try:
        cluster.wait_for(job, "PENDING", timeout=120)
        wait_until(lambda: ranks(tmp_path) == [], 60, lambda: output(run_dir, job))
    finally:
        cluster.start_slurmd("n2")
    cluster.wait_for(job, "COMPLETED", timeout=300)
    same_as_undisturbed(run_dir, undisturbed)
    assert [begin["restart"] for begin in records(run_dir, "begin")] == [0, 1]


@pytest.mark.long
@pytest.mark.fault(33)
def test_a_network_that_carries_smaller_packets_from_a_step_on(cluster, undisturbed, corpus, tmp_path):
    """On both nodes; test_bad_network.py has other ways of a network."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 5)
    try:
        with standing_still(tmp_path):
            assert len(ranks(tmp_path)) == 2
            for node in NODES:
                cluster.run("ip", "-n", node, "link", "set", "eth0", "mtu", "576")
        cluster.wait_for(job, "COMPLETED", timeout=300)
    finally:
        for node in NODES:
            cluster.run("ip", "-n", node, "link", "set", "eth0", "mtu", "1500")
    same_as_undisturbed(run_dir, undisturbed)
    assert len(records(run_dir, "begin")) == 1


@pytest.mark.long
def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save(cluster, undisturbed, corpus, tmp_path):
    """Under `deepspeed`, which says that all is well."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, launch="deepspeed"), tmp_path / "runs/test"
    reach(cluster, job, run_dir, 18)
    os.kill(ranks(tmp_path)[-1], signal.SIGKILL)
    cluster.wait_for(job, "COMPLETED", timeout=400)
    assert [end["kind"] for end in records(run_dir, "end")] == ["failed", "finished"]
    assert records(run_dir, "begin")[1]["saved_step"] == 15
    same_as_undisturbed(run_dir, undisturbed)
    wait_until(lambda: ranks(tmp_path) == [], 60)


@pytest.mark.fault(30)
def test_a_run_that_always_fails_stops_with_its_cause(cluster, corpus, tmp_path):
    """At this learning rate the second step is not finite, however often it is tried."""
    failing = ("optim.lr=1e30", "train.bad_steps.max_skipped_in_a_row=1")
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, *failing, max_failures=2), tmp_path / "runs/test"
    cluster.wait_for(job, "FAILED", timeout=300)
    first, last = records(run_dir, "end")
    assert first["verdict"].endswith("requeued")
    assert (
        "not requeued: 2 starts in a row saved nothing beyond step 0. Mend the cause and submit again"
        in last["verdict"]
    )
    assert "updates in a row were skipped, up to step 2, the last one because its loss is" in last["cause"]
    assert last["verdict"] in output(run_dir, job)
    assert cluster.run("squeue", "--noheader") == ""


def test_a_refusal_is_not_repeated(cluster, corpus, tmp_path):
    """What was right when it was queued, and no longer is when it starts."""
    job, run_dir = submit(cluster, tmp_path, corpus, *RUN, sbatch=["--exclusive", "--hold"]), tmp_path / "runs/test"
    (tmp_path / "test.yaml").write_text("run: {name: test}\n")
    cluster.run("scontrol", "release", job)
    cluster.wait_for(job, "FAILED")
    (end,) = records(run_dir, "end")
    assert end["kind"] == "refused"
    assert "not requeued, as it would be refused again: pretrain: " in end["verdict"]
