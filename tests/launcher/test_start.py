"""One run under every launcher: the same losses to the last digit at the same number of ranks."""

import pytest

from runs import PRETRAIN, SCRIPTS, assert_same_state, deepspeed, free_port, losses, run, start, torchrun, write_recipe

pytestmark = pytest.mark.slow

ARGUMENTS = ("train.steps=6", "parallel.zero_stage=2")


def python_command(recipe):
    return [str(SCRIPTS / "python"), PRETRAIN, "--config", str(recipe), *ARGUMENTS]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("expected")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *ARGUMENTS), folder / "log")
    return folder / "runs/test"


def test_deepspeed(expected, corpus, tmp_path):
    run(deepspeed(2, "--config", write_recipe(tmp_path, corpus), *ARGUMENTS), tmp_path / "log")
    assert losses(tmp_path / "runs/test") == losses(expected)
    assert_same_state(tmp_path / "runs/test", expected)


def test_slurm_variables_alone(expected, corpus, tmp_path):
    """Two processes as `srun -n 2 python launcher/pretrain.py` would start them."""
    recipe = write_recipe(tmp_path, corpus)
    shared = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [
        start(python_command(recipe), tmp_path / f"log{i}", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **shared)
        for i in range(2)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert losses(tmp_path / "runs/test") == losses(expected)
    assert_same_state(tmp_path / "runs/test", expected)


def test_plain_python_is_one_rank_of_the_same_run(expected, corpus, tmp_path):
    """Not to the last digit: one process adds the same samples up in another order, and dropout is off for that reason."""
    recipe = write_recipe(tmp_path, corpus)
    run([*python_command(recipe), "model.dropout=0.0"], tmp_path / "log")
    run(torchrun(2, "--config", recipe, *ARGUMENTS, "model.dropout=0.0", "run.name=two"), tmp_path / "log2")
    one, two = losses(tmp_path / "runs/test"), losses(tmp_path / "runs/two")
    assert one.keys() == two.keys()
    assert all(abs(one[step] - two[step]) < 1e-4 for step in one)
