"""One run, killed ten times, each time going on with other ranks and another ZeRO stage: the transcript, with `-s`."""

import random
import re
import time

import pytest

from launcher import audit
from launcher.run_dir import Ledger
from runs import final_state, kill, losses, run, start, torchrun, wait_for_step, write_recipe

STEPS, BATCH = 72, 12
# (ranks, ZeRO stage, micro-batch) of each start; the last one finishes
STARTS = [
    (2, 1, 3),
    (1, 0, 6),
    (4, 3, 3),
    (3, 2, 2),
    (2, 3, 6),
    (4, 1, 1),
    (1, 2, 12),
    (3, 0, 4),
    (2, 2, 1),
    (4, 2, 3),
    (2, 1, 3),
]
KILLED_AFTER = [5, 12, 17, 25, 31, 38, 42, 50, 57, 66]


def wait_for_start(run_dir, number, process):
    """Until the run's ledger has that many starts: the last one may have logged more than the next is waited for."""
    deadline = time.monotonic() + 120
    while sum(event["event"] == "start" for event in Ledger(run_dir).events()) < number:
        assert process.poll() is None, "the run ended before it began"
        assert time.monotonic() < deadline, f"start {number} did not begin in 120 s"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault(39)
def test_a_run_killed_ten_times_on_changing_ranks_and_stages_reads_and_learns_the_same(corpus, tmp_path, capsys):
    """Losses and weights within what the order of additions changes; every sample once, which the audit proves."""
    common = [f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "checkpoint.every=4", "model.dropout=0.0"]
    straight = write_recipe(tmp_path, corpus, "straight")
    run(torchrun(2, "--config", straight, *common), tmp_path / "straight.log")
    recipe, run_dir, rng = write_recipe(tmp_path, corpus, "killed"), tmp_path / "runs/killed", random.Random(0)
    for number, (ranks, stage, micro) in enumerate(STARTS):
        log = tmp_path / f"start-{number + 1}.log"
        command = torchrun(
            ranks, "--config", recipe, *common, f"parallel.zero_stage={stage}", f"train.micro_batch_size={micro}"
        )
        if number == len(STARTS) - 1:
            run(command, log)
        else:
            process = start(command, log)
            wait_for_start(run_dir, number + 1, process)
            wait_for_step(run_dir, KILLED_AFTER[number], process)
            time.sleep(rng.random() / 10)  # anywhere within a step or a save
            kill(recipe, process)
        began = re.search(r"resumed from \S+/(step-\d+), written by (\d) ranks with ZeRO (\d)", log.read_text())
        came = f"from {began[1]} of {began[2]} ranks, ZeRO {began[3]}" if began else "from the beginning"
        end = "finished" if number == len(STARTS) - 1 else f"SIGKILL after step {max(losses(run_dir))}"
        with capsys.disabled():
            print(f"start {number + 1:2}: {ranks} ranks, ZeRO {stage}, micro-batch {micro:2}, {came}; {end}")
    expected, found = losses(tmp_path / "runs/straight"), losses(run_dir)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    largest = max(abs(found[step] - expected[step]) / expected[step] for step in found)
    a, b = final_state(run_dir), final_state(tmp_path / "runs/straight")
    weights = max(float((a[key] - b[key]).abs().max()) for key in a if key[1] == "weight")
    assert audit.main([str(run_dir), "--verify"]) == 0
    with capsys.disabled():
        print(f"largest difference to the run never stopped: loss {largest:.1e} (relative), weights {weights:.1e}")
        print(capsys.readouterr().out)
    assert largest < 1e-5  # fp32 sums in another order, over 72 updates
    assert weights < 1e-3
    assert sum(event["event"] == "start" for event in Ledger(run_dir).events()) == len(STARTS)
