"""Two runs compared: a difference of one bit anywhere is found and named, and nothing is equal for not being there."""

import itertools
import json
import math

import pytest
from made_runs import (
    SHAPES,
    change_metric,
    change_read,
    change_tensor,
    made_tensor,
    make_run,
    put_manifest_right,
    write_checkpoint,
)
from safetensors.torch import save_file

from launcher.compare import compare, first_difference, reads_by_step
from launcher.read_log import path_of
from parallel.state import KINDS

STEPS = 8
LAST = f"checkpoints/step-{STEPS:08d}"


@pytest.fixture
def runs(tmp_path):
    """One that never stopped, and one that was killed after step 6 and went on from step 4: equal."""
    return make_run(tmp_path / "straight", STEPS), make_run(tmp_path / "resumed", STEPS, starts=(0, 4))


def first(runs):
    found = first_difference(compare(*runs, STEPS))
    return found and (found.step, found.text)


def test_equal_runs_are_equal_in_all(runs):
    findings = compare(*runs, STEPS)
    assert [finding.what for finding in findings] == [
        "data", "logged values", "evaluation", "weights", "first moments", "second moments", "counters",
    ]  # fmt: skip
    assert [finding.difference for finding in findings] == [None] * 7
    assert findings[0].compared == "samples and a hash of their tokens, 8 steps x 2 ranks"
    assert findings[1].compared.startswith("loss/train, optim/grad_norm, data/epochs_text of 8 steps")
    assert findings[3].compared == "2 tensors, 17 numbers, to the last bit"


@pytest.mark.parametrize(
    ("kind", "what"), list(zip(KINDS, ("weights", "first moments", "second moments"), strict=True))
)
def test_one_bit_of_one_tensor_is_named(runs, kind, what):
    before, after = change_tensor(runs[1] / LAST, f"{kind}:embed:0", element=7, by=2**-22)
    assert before != after
    assert first(runs) == (STEPS, f"{kind} of embed, element 7 of 12: straight {before!r}, resumed {after!r}")
    assert [f.what for f in compare(*runs, STEPS) if f.difference] == [what]


def test_every_chunk_of_a_large_tensor_is_looked_at(runs, monkeypatch):
    monkeypatch.setattr("launcher.compare.CHUNK", 5)
    change_tensor(runs[1] / LAST, "weight:embed:0", element=11, by=1.0)
    assert "weight of embed, element 11 of 12" in first(runs)[1]


@pytest.mark.parametrize(("a", "b", "equal"), [(math.nan, math.nan, True), (0.0, -0.0, False)])
def test_numbers_are_compared_as_bits(runs, a, b, equal):
    for run_dir, value in zip(runs, (a, b), strict=True):
        tensors = {(kind, name): made_tensor(kind, name) for kind in KINDS for name in SHAPES}
        tensors["weight", "norm"][2] = value
        write_checkpoint(run_dir, STEPS, tensors)
    assert (first(runs) is None) == equal


def test_what_happened_first_is_named_first(runs):
    change_tensor(runs[1] / LAST, "weight:norm:0", element=0, by=1.0)
    change_metric(runs[1], 6, "optim/grad_norm", 0.5)
    change_metric(runs[1], 6, "loss/train", 2**-40)
    change_metric(runs[1], 7, "loss/train", 1.0)
    assert first(runs) == (6, f"loss/train: straight {7 / 6!r}, resumed {7 / 6 + 2**-40!r}")
    logged = compare(*runs, STEPS)[1]
    assert logged.more == 2
    change_read(runs[1], start=2, rank=1, step=6, name="digest")
    assert first(runs) == (
        6,
        "data of rank 1: straight samples 40 to 47 with hash 0000000000001771, resumed samples 40 to 47 with hash "
        "0000000000001772",
    )


def test_the_evaluation_counts(runs):
    change_metric(runs[1], STEPS, "loss/valid", 1e-15)
    assert first(runs) == (STEPS, "loss/valid: straight 2.5, resumed 2.500000000000001")


def test_of_a_step_that_was_taken_twice_the_second_time_counts(runs):
    assert reads_by_step(runs[1]) == reads_by_step(runs[0])
    change_read(runs[1], start=1, rank=0, step=5, name="digest")
    assert first(runs) is None
    change_read(runs[1], start=2, rank=0, step=5, name="next")
    assert first(runs)[0] == 5


@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_there_is_not_equal(runs, both):
    for run_dir in runs if both else runs[1:]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] != 3))
    a = "nothing" if both else repr(7 / 3)
    assert first(runs) == (3, f"loss/train: straight {a}, resumed nothing")


@pytest.mark.parametrize("both", [False, True])
def test_a_record_of_data_that_is_cut_off_is_told(runs, both):
    for run_dir, start in ((runs[0], 1), (runs[1], 2)) if both else ((runs[1], 2),):
        path = path_of(run_dir, start, 1)
        path.write_bytes(path.read_bytes()[:-40])  # its last record, and a part of the one before
    assert first(runs) == (7, f"data: straight {'no record' if both else '2 ranks'}, resumed no record")


def test_what_the_killed_start_read_does_not_stand_in_for_what_is_gone(runs):
    for rank in range(2):
        path_of(runs[1], 2, rank).unlink()
    assert first(runs) == (5, "data: straight 2 ranks, resumed no record")


def test_a_record_that_names_another_step_is_none(runs):
    change_read(runs[1], start=2, rank=1, step=7, name="step")
    assert first(runs) == (7, "data: straight 2 ranks, resumed no record")


def test_a_value_logged_twice_is_told(runs):
    with open(runs[1] / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": 2, "loss/train": 3.5}), file=file)
    assert first(runs) == (2, "loss/train: straight 3.5, resumed [3.5, 3.5] (logged twice)")


def test_rubbish_in_the_metrics_is_passed_over(runs):
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write('3\n{"loss/train": 3}\n{"st')
    assert first(runs) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adam_steps": 7}, "adam_steps: straight 8, resumed 7"),
        ({"cursor": {"samples": 65}}, "cursor.samples: straight 64, resumed 65"),
        ({"totals": {"tokens": 801, "losses": [1.5, 3.5]}}, "totals.tokens: straight 800, resumed 801"),
        ({"loss_scaler": {"scale": 2.0}}, "loss_scaler: straight None, resumed nothing"),
        ({"totals": {"tokens": 800, "losses": [1.5, 2.5]}}, "totals.losses[1]: straight 3.5, resumed 2.5"),
        ({"totals": {"tokens": 800, "losses": [1.5]}}, "totals.losses length: straight 2, resumed 1"),
    ],
)
def test_what_a_checkpoint_says_beside_its_tensors_counts(runs, changes, told):
    tensors = {(kind, name): made_tensor(kind, name) for kind in KINDS for name in SHAPES}
    write_checkpoint(runs[1], STEPS, tensors, **changes)
    assert first(runs) == (STEPS, told)


def test_another_model_is_told(runs):
    tensors = {(kind, "embed"): made_tensor(kind, "embed") for kind in KINDS}
    write_checkpoint(runs[1], STEPS, tensors, shapes={"embed": [3, 4]})
    assert first(runs)[1].startswith("parameters: straight {'embed': [4, 3], 'norm': [5]}, resumed {'embed': [3, 4]}")


@pytest.mark.parametrize("fault", ["gone", "damaged", "lacks"])
def test_a_checkpoint_that_cannot_be_read_is_not_equal(runs, fault):
    path = runs[1] / LAST
    if fault == "gone":
        path.rename(path.with_name("elsewhere"))
        message = f"checkpoint: {path} is not there"
    elif fault == "damaged":
        with open(path / "rank-00000.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        message = f"checkpoint: {path} is damaged: {path}/rank-00000.safetensors: xxh3 "
    else:
        write_checkpoint(runs[1], STEPS, {(kind, "embed"): made_tensor(kind, "embed") for kind in KINDS})
        message = f"checkpoint: {path} lacks elements 0 to 5 of the weight of norm"
    step, text = first(runs)
    assert step == STEPS
    assert text.startswith(message)


def test_what_is_frozen_has_no_moments_in_either(runs):
    trained = {(kind, "embed"): made_tensor(kind, "embed") for kind in KINDS}
    frozen = {("weight", "norm"): made_tensor("weight", "norm")}
    write_checkpoint(runs[0], STEPS, trained | frozen)
    assert "checkpoint: " in first(runs)[1]
    write_checkpoint(runs[1], STEPS, trained | frozen)
    assert first(runs) is None
    for run_dir in runs:
        write_checkpoint(run_dir, STEPS, trained)
    assert "lacks elements 0 to 5 of the weight of norm" in first(runs)[1]


def test_how_the_tensors_are_divided_does_not_matter(runs):
    """Two ranks' fragments against one's."""
    parts = {}
    for kind, name in itertools.product(KINDS, SHAPES):
        whole = made_tensor(kind, name)
        parts[f"{kind}:{name}:0"], parts[f"{kind}:{name}:3"] = whole[:3].clone(), whole[3:].clone()
    save_file(parts, runs[1] / LAST / "rank-00000.safetensors")
    put_manifest_right(runs[1] / LAST)
    assert first(runs) is None
