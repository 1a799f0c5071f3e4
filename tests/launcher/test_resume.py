"""Killed, stopped and resumed runs against one that never stopped: the same bits."""

import json
import os
import shutil
import signal

import pytest

from cluster.goodput import read_status
from launcher import audit
from runs import (
    assert_same_state,
    deepspeed,
    kill,
    losses,
    metrics,
    rank_pids,
    run,
    start,
    torchrun,
    wait_for_step,
    write_recipe,
)

LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    """ZeRO stage -> the folder of a run of 24 steps on two ranks that nothing interrupted."""
    made = {}

    def get(stage):
        if stage not in made:
            folder = tmp_path_factory.mktemp(f"straight{stage}")
            recipe = write_recipe(folder, corpus)
            run(torchrun(2, "--config", recipe, f"parallel.zero_stage={stage}"), folder / "log")
            made[stage] = folder / "runs/test"
        return made[stage]

    return get


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=LONG), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_never_stopped(stage, undisturbed, corpus, tmp_path):
    """SIGKILL for all ranks after step 12, two micro-batches a step, dropout on: it goes on from step 10 or 15."""
    straight = undisturbed(stage)
    recipe = write_recipe(tmp_path, corpus)
    command = torchrun(2, "--config", recipe, f"parallel.zero_stage={stage}")
    process = start(command, tmp_path / "log")
    wait_for_step(tmp_path / "runs/test", 12, process)
    kill(recipe, process)
    text = run(command, tmp_path / "log")
    assert "resumed from" in text
    assert losses(tmp_path / "runs/test") == losses(straight)
    assert_same_state(tmp_path / "runs/test", straight)


OFFLOAD = {
    1: ["parallel.zero_stage=1", "parallel.offload_optimizer=cpu"],
    3: ["parallel.zero_stage=3", "parallel.offload_optimizer=cpu", "parallel.offload_param=cpu"],
}


@pytest.fixture(scope="module")
def unclipped(tmp_path_factory, corpus):
    """ZeRO stage -> the folder of a run on the device without clipping, for which the host adds up in another order."""
    made = {}

    def get(stage):
        if stage not in made:
            folder = tmp_path_factory.mktemp(f"unclipped{stage}")
            recipe = write_recipe(folder, corpus)
            run(torchrun(2, "--config", recipe, "optim.grad_clip=0.0", f"parallel.zero_stage={stage}"), folder / "log")
            made[stage] = folder / "runs/test"
        return made[stage]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "before", "after"), [pytest.param(1, "host", "device", marks=LONG), (3, "device", "host")]
)
def test_a_killed_run_goes_on_with_or_without_offload(stage, before, after, unclipped, corpus, tmp_path):
    """SIGKILL for all ranks after step 12; the same bits as never stopped and never offloaded."""
    recipe = write_recipe(tmp_path, corpus)
    kept = {"host": OFFLOAD[stage], "device": OFFLOAD[stage][:1]}
    first, second = (torchrun(2, "--config", recipe, "optim.grad_clip=0.0", *kept[at]) for at in (before, after))
    process = start(first, tmp_path / "log")
    wait_for_step(tmp_path / "runs/test", 12, process)
    kill(recipe, process)
    assert "resumed from" in run(second, tmp_path / "log")
    assert losses(tmp_path / "runs/test") == losses(unclipped(stage))
    assert_same_state(tmp_path / "runs/test", unclipped(stage))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGUSR1, marks=[pytest.mark.fault(27), pytest.mark.slow]),
        pytest.param(signal.SIGINT, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_stopped_by_a_signal_saves_and_goes_on(number, undisturbed, corpus, tmp_path):
    """The signal reaches one rank alone; both leave at the same step, saved, with exit code 75."""
    recipe = write_recipe(tmp_path, corpus)
    command = ["--config", recipe]
    process = start(deepspeed(2, *command), tmp_path / "log")
    run_dir = tmp_path / "runs/test"
    wait_for_step(run_dir, 4, process)
    os.kill(rank_pids(recipe)[1], number)
    process.wait(60)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 75, text[-3000:]
    assert f"stopped by {number.name} at step" in text
    events = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    stopped = next(event for event in events if event["event"] == "stopped")
    assert (run_dir / f"checkpoints/step-{stopped['step']:08d}/manifest.json").exists()
    run(deepspeed(2, *command), tmp_path / "log")
    assert losses(run_dir) == losses(undisturbed(1))
    assert_same_state(run_dir, undisturbed(1))


@pytest.mark.slow
@pytest.mark.long
def test_stopped_at_a_given_step_it_saves_and_goes_on_to_a_later_one(undisturbed, corpus, tmp_path):
    """Step 7 is none at which a checkpoint is due. The learning rate stays that of 24 steps, or the losses would differ."""
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    text = run(deepspeed(2, "--config", recipe, "train.stop_at=7"), tmp_path / "first", code=75)
    assert (
        "stopped by train.stop_at at step 7 of 24, saved; the same command with a later train.stop_at, or without, "
        "goes on from there" in text
    )
    assert (run_dir / "checkpoints/step-00000007/manifest.json").exists()
    assert sorted(losses(run_dir)) == list(range(1, 8))
    last = json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"], last["signal"]) == ("stopped", 7, None)
    text = run(deepspeed(2, "--config", recipe, "train.stop_at=7"), tmp_path / "again", code=2)
    assert "stands at step 7 and train.stop_at=7; to go on, give a later step or leave it out" in text
    run(deepspeed(2, "--config", recipe, "train.stop_at=24"), tmp_path / "second")
    assert losses(run_dir) == losses(undisturbed(1))
    assert_same_state(run_dir, undisturbed(1))


def test_a_finished_run_says_so(undisturbed, corpus, tmp_path):
    run_dir = undisturbed(1)
    recipe = write_recipe(tmp_path, corpus)
    before = (run_dir / "metrics.jsonl").read_bytes()
    text = run(torchrun(1, "--config", recipe, f"run.folder={run_dir.parent}"), tmp_path / "log")
    assert f"{run_dir} is finished: 24 of 24 steps; nothing to do" in text
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_goes_on_when_its_length_is_changed_on_purpose(corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)
    run(torchrun(1, "--config", recipe, "train.steps=6"), tmp_path / "first")
    longer = torchrun(1, "--config", recipe, "--allow-change", "train.steps", "train.steps=8")
    run(longer, tmp_path / "longer")
    assert sorted(losses(tmp_path / "runs/test")) == list(range(1, 9))
    text = run(torchrun(1, "--config", recipe, "train.steps=6"), tmp_path / "back", code=None)
    assert "train.steps: was 8, is 6" in text


@pytest.mark.slow
def test_a_run_killed_before_it_could_say_finished_says_so_at_the_next_start(undisturbed, corpus, tmp_path):
    """Between its last checkpoint and the ledger's last line: evaluated again, no step trained again."""
    run_dir = tmp_path / "runs/test"
    shutil.copytree(undisturbed(1), run_dir)
    ledger = run_dir / "ledger.jsonl"
    *events, told = ledger.read_text().splitlines()
    ledger.write_text("".join(f"{event}\n" for event in events))
    recipe = write_recipe(tmp_path, corpus)
    run(torchrun(2, "--config", recipe), tmp_path / "log")
    *_, started, finished = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert (started["event"], started["step"]) == ("start", 24)
    assert finished == {**json.loads(told), "time": finished["time"]}
    assert losses(run_dir) == losses(undisturbed(1))
    assert audit.main([str(run_dir), "--verify"]) == 0
    assert "is finished: 24 of 24 steps; nothing to do" in run(torchrun(2, "--config", recipe), tmp_path / "again")


def test_every_number_that_is_promised_is_written(undisturbed):
    lines = metrics(undisturbed(1))
    names = {name for line in lines for name in line}
    assert names >= {
        "loss/train", "optim/lr", "optim/grad_norm", "progress/tokens", "optim/skipped_steps", "speed/tokens_per_s",
        "speed/tokens_per_s_per_device", "speed/step_time_s", "speed/data_wait_s", "system/peak_host_mem_gib",
        "speed/checkpoint_stall_s", "speed/median_step_time_s", "speed/eval_time_s", "speed/sample_time_s",
        "speed/slowest_rank", "speed/slowest_rank_excess", "speed/stragglers", "goodput/goodput",
        "loss/valid", "loss/valid_bits_per_byte", "loss/valid_perplexity",
    }  # fmt: skip
    assert [line["progress/tokens"] for line in lines if "progress/tokens" in line] == [
        8 * 32 * (i + 1) for i in range(24)
    ]


@pytest.mark.slow
def test_tensorboard_shows_one_curve_over_a_restart(undisturbed, corpus, tmp_path):
    """The event files of two starts, read as TensorBoard reads them: each step once, the config and samples as text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = write_recipe(tmp_path, corpus)
    command = torchrun(2, "--config", recipe)
    process = start(command, tmp_path / "log")
    wait_for_step(tmp_path / "runs/test", 8, process)
    kill(recipe, process)
    run(command, tmp_path / "log")
    board = EventAccumulator(
        str(tmp_path / "runs/test/tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    ).Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss/train")]
    assert [step for step, _ in points] == list(range(1, 25))
    expected = losses(undisturbed(1))
    assert all(abs(value - expected[step]) < 1e-6 for step, value in points)  # TensorBoard keeps fp32
    # What status.py tells of the run is in the curves, too, from the first step of it to the last.
    shares = {name: board.Scalars(name) for name in board.Tags()["scalars"] if name.startswith("goodput/")}
    assert {len(curve) for curve in shares.values()} == {24}
    assert all(sum(curve[i].value for curve in shares.values()) == pytest.approx(1, abs=1e-3) for i in range(24))
    told = read_status(tmp_path / "runs/test", 0.0)
    last = next(line for line in reversed(metrics(tmp_path / "runs/test")) if "loss/train" in line)
    for part in ("lost", "start-up", "data"):
        assert last[f"goodput/badput_{part}"] * told.wall_s >= told.parts_s[part]  # the wall time is not over yet
    assert min(told.parts_s[part] for part in ("lost", "start-up", "evaluation")) > 0
    assert last["goodput/goodput"] == pytest.approx(told.goodput, rel=0.2)
    assert {"config/text_summary", "sample/0/text_summary"} <= set(board.Tags()["tensors"])
    assert len((tmp_path / "runs/test/metrics.superseded.jsonl").read_text().splitlines()) >= 1
