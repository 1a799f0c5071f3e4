"""Steps that are not what those before let expect: told with their documents, left out or undone, alike each time."""

import functools
import json
import math
import random
import re
import time

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.prepare import prepare
from launcher import audit
from launcher.bad_steps import Judge
from launcher.config import BadStepConfig, load_config
from launcher.run_dir import Ledger
from parallel.checkpoint import CheckpointReader
from runs import assert_same_state, kill, losses, run, start, torchrun, write_recipe

WINDOW = 16


def judge_after(values, norms=None, **changes):
    cfg = BadStepConfig(**{"window": WINDOW, **changes})
    judge = Judge(cfg, [], [])
    for loss, norm in zip(values, norms or [1.0] * len(values), strict=True):
        judge.accept(loss, norm)
    return judge


@pytest.mark.parametrize("seed", range(20))
def test_a_spike_is_noticed_and_noise_is_not(seed):
    rng = random.Random(seed)
    judge = judge_after([3 + rng.gauss(0, 0.1) for _ in range(WINDOW)], [1 + rng.gauss(0, 0.1) for _ in range(WINDOW)])
    assert judge.look(3.3, 1.2) is None
    loss, norm = judge.look(6, 1), judge.look(3, 4)
    assert (loss.kind, loss.policy) == ("loss_spike", "log")
    assert "its loss is 6, above " in loss.text
    assert (norm.kind, norm.policy) == ("grad_spike", "log")
    assert "its gradient norm is 4, above " in norm.text
    assert f"of the last {WINDOW} steps" in norm.text


def test_the_limit_is_the_median_and_sigma_times_the_spread():
    judge = judge_after([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], window=9, sigma=2.0)
    assert "above 10.9304 = 5 + 2 x 2.97 of the last 9 steps" in judge.look(10.94, 1).text  # 1.4826 x median distance 2
    assert judge.look(10.93, 1) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1), (math.inf, 1), (3, math.nan), (3, math.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step_and_never_enters_the_window(loss, norm):
    judge = judge_after([])
    bad = judge.look(loss, norm)
    assert (bad.kind, bad.policy) == ("not_finite", "skip")
    assert bad.text == f"its loss is {loss:.6g}, its gradient norm {norm:.6g}"
    judge = judge_after([loss, 3.0], [norm, 1.0])
    assert (judge._losses, judge._norms) == ([3.0], [1.0])


def test_nothing_is_a_spike_before_the_window_is_full():
    assert judge_after([1.0] * (WINDOW - 1)).look(100, 100) is None
    assert judge_after([1.0] * WINDOW).look(100, 1) is not None


def test_few_spikes_move_no_limit_and_a_lasting_shift_becomes_the_rule():
    judge = judge_after([1 + i % 3 / 100 for i in range(WINDOW)])
    for _ in range(WINDOW // 2 - 1):
        assert judge.look(50, 1) is not None
        judge.accept(50, 1)  # logged alone: the update was made
    assert judge.look(50, 1) is not None
    for _ in range(2):
        judge.accept(50, 1)
    assert judge.look(50, 1) is None


def test_steps_that_are_equal_do_not_make_the_next_one_a_spike():
    judge = judge_after([2.0] * WINDOW)
    assert judge.look(2.001, 1) is None
    assert judge.look(2.017, 1) is not None  # 8 times a thousandth of the median


def test_the_window_is_kept_short_and_one_from_a_checkpoint_gives_the_same_verdicts():
    rng = random.Random(1)
    values = [rng.random() for _ in range(3 * WINDOW)]
    judge = judge_after(values)
    assert judge._losses == values[-WINDOW:]
    saved = json.loads(json.dumps([judge._losses, judge._norms]))
    again = Judge(judge.cfg, *saved)
    for value in (0.5, 2.0, 9.0):
        assert again.look(value, 1) == judge.look(value, 1)


# -- real runs ------------------------------------------------------------------------------------------------------------

NOISE = "\n".join("".join(random.Random(line).choices("qxzjkvwy#%&@", k=40)) for line in range(2))
RHYME = "The wheels on the bus go round and round, round and round, round and round, all through the town. "
STEPS = 60
CHANGES = (f"train.steps={STEPS}", "optim.lr=1e-2", "checkpoint.every=8", "eval.every=0", "data.valid_fraction=0",
           "train.bad_steps.window=8")  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, corpus):
    """A corpus that a model learns in some twenty steps, with one document of noise among its rhymes.

    Gives a maker of recipes in a folder, and the steps that read noise, all of them after the model has learned.
    """
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / f"texts/{number:03d}.txt").write_text(RHYME * 20)
    (folder / "texts/noise.txt").write_text(NOISE)
    config = {
        "corpus": str(folder / "corpus"),
        "sources": [{"kind": "text", "paths": [str(folder / "texts/*.txt")]}],
        "tokenizer": {"path": str(corpus / "tokenizer"), "vocab_size": 512},
        "valid_fraction": 0,
        "workers": 1,
    }
    prepare(DataConfig.model_validate(config))
    for seed in range(200):
        cfg = load_config(str(write_recipe(folder, folder / "corpus")), [*CHANGES, f"data.seed={seed}"])
        dataset = Dataset.open(cfg.data, cfg.model.seq_len)
        tokens = dataset.read(np.arange(STEPS * 8)).tokens
        rhyme = np.unique(dataset.corpora["text"].document("text/train-00000-000", 0))
        noisy = np.flatnonzero((~np.isin(tokens, rhyme)).sum(axis=1) > 16)
        steps = sorted({1 + sample // 8 for sample in noisy.tolist()})
        if len(steps) == 2 and steps[0] > 30 and steps[1] < STEPS - 5:
            return functools.partial(recipe_of, folder / "corpus", seed), steps
    raise AssertionError("no order reads the noise late enough")


def recipe_of(corpus, seed, folder):
    return write_recipe(folder, corpus), [*CHANGES, f"data.seed={seed}"]


def events(run_dir, kind):
    return [event for event in Ledger(run_dir).events() if event["event"] == kind]


@pytest.mark.fault(37)
def test_a_spike_is_told_with_its_documents_and_skipped_on_all_ranks_alike(poisoned, tmp_path, capsys):
    """Kept from the weights: AdamW has made all updates but those of the steps that read noise."""
    make, steps = poisoned
    recipe, changes = make(tmp_path)
    command = torchrun(2, "--config", recipe, *changes, "train.bad_steps.loss_spike=skip")
    text = run(command, tmp_path / "log")
    run_dir = tmp_path / "runs/test"
    told = events(run_dir, "bad_step")
    assert [event["step"] for event in told if event["kind"] == "loss_spike"] == steps
    assert all(event["policy"] == "skip" for event in told if event["kind"] == "loss_spike")
    assert f"step {steps[0]} is bad (loss_spike), update skipped: its loss is " in text
    noise = re.search(rf"step {steps[0]} is bad.*?samples \[(.*?)\]; documents sample", text)
    assert audit.main([str(run_dir), "--step", str(steps[0])]) == 0
    assert f"sample {noise[1].split(', ')[0]}: " in capsys.readouterr().out
    newest = CheckpointReader(run_dir / f"checkpoints/step-{STEPS:08d}").manifest
    assert (newest.adam_steps, newest.totals["skipped"]) == (STEPS - len(steps), len(steps))
    assert len(newest.totals["losses"]) == 8


@pytest.mark.slow
@pytest.mark.fault(37)
def test_a_run_rewinds_leaves_the_noise_out_and_does_so_alike_each_time(poisoned, tmp_path):
    """Twice undisturbed, and once killed after the first rewind: the same steps, losses and weights, to the last bit."""
    make, steps = poisoned
    runs = {}
    for name, ranks in (("first", 2), ("second", 2), ("killed", 2)):
        (tmp_path / name).mkdir()
        recipe, changes = make(tmp_path / name)
        command = torchrun(ranks, "--config", recipe, *changes, "train.bad_steps.loss_spike=rewind")
        run_dir = runs[name] = tmp_path / name / "runs/test"
        if name == "killed":
            process = start(command, tmp_path / name / "log")
            wait_for_event(run_dir, "rewind", process)
            kill(recipe, process)
        run(command, tmp_path / name / "log")
        rewinds = events(run_dir, "rewind")
        assert len(rewinds) == len(steps)
        assert rewinds[0]["step"] == steps[0]
        assert rewinds[0]["samples"] == [(steps[0] - 1) * 8, steps[0] * 8 - 1]
        assert rewinds[0]["saved_step"] == (steps[0] - 1) // 8 * 8
        assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
        assert losses(run_dir) == losses(runs["first"])
        assert max(loss for step, loss in losses(run_dir).items() if step > 25) < 0.7  # never the noise
        assert_same_state(run_dir, runs["first"])
        assert audit.main([str(run_dir), "--verify"]) == 0


def wait_for_event(run_dir, kind, process):
    deadline = time.monotonic() + 120
    while not events(run_dir, kind):
        assert process.poll() is None, "the run ended first"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault(37)
def test_a_run_that_rewinds_too_often_stops_and_names_the_limit(poisoned, tmp_path):
    recipe, changes = poisoned[0](tmp_path)
    command = ["train.bad_steps.loss_spike=rewind", "train.bad_steps.max_rewinds=1"]
    text = run(torchrun(1, "--config", recipe, *changes, *command), tmp_path / "log", code=None)
    assert "the run has rewound 1 times, train.bad_steps.max_rewinds is 1. The log names the documents" in text
    assert text.count("is bad (loss_spike)") >= 2
    failed = events(tmp_path / "runs/test", "failed")
    assert "FloatingPointError: step " in failed[0]["error"]


@pytest.mark.parametrize(
    ("saved", "left_out"), [pytest.param(None, 3, marks=[pytest.mark.slow, pytest.mark.long]), (2, 2)]
)
def test_a_rewind_leaves_out_as_many_steps_as_is_said_but_none_that_is_saved(saved, left_out, poisoned, tmp_path):
    """saved: the newest checkpoint is of so many steps before the bad one; without any it goes back to the beginning."""
    make, steps = poisoned
    recipe, changes = make(tmp_path)
    every = steps[0] - saved if saved else 1000
    more = ["train.bad_steps.loss_spike=rewind", "train.bad_steps.leave_out=3", f"checkpoint.every={every}"]
    run(torchrun(1, "--config", recipe, *changes, *more, f"train.steps={steps[0] + 2}"), tmp_path / "log")
    rewind = events(tmp_path / "runs/test", "rewind")[0]
    assert rewind["saved_step"] == (every if saved else 0)
    assert rewind["samples"] == [(steps[0] - left_out) * 8, steps[0] * 8 - 1]
    assert audit.main([str(tmp_path / "runs/test"), "--verify"]) == 0
