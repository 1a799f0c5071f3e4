"""What a run will read, known before it starts, wherever it stands and whatever is left out."""

import pytest

from data.dataset import DatasetError
from launcher import pretrain
from launcher.config import load_config
from launcher.run_data import open_data
from parallel.checkpoint import Manifest, _commit
from runs import RECIPE

G = 8
SOURCES = ("email", "json", "asyncio")


def sources(**given):
    """data.sources=[...] of the mixture; by name a weight, or a mapping."""
    entries = [
        {"kind": "text", "name": name, "paths": ["-"], **(more if isinstance(more, dict) else {"weight": more})}
        for name, more in given.items()
    ]
    return f"data.sources={entries}"


MIX = sources(email=0.6, json=0.3, asyncio=0.1)
ONCE = sources(json={"max_epochs": 1.0})


@pytest.fixture
def recipe(tmp_path, mixture, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))
    path = tmp_path / "test.yaml"
    path.write_text(RECIPE.format(name="test", folder=tmp_path / "runs", corpus=mixture))
    return path


@pytest.fixture
def opened(recipe):
    """opened(overrides, step, cursor) -> PreparedData."""

    def make(*overrides, step=0, cursor=None):
        return open_data(load_config(str(recipe), list(overrides)), cursor, step)

    return make


def windows_of(data, name="json"):
    return data.dataset.corpora[name].n_windows


def test_the_check_of_the_length_counts_left_out_samples(opened):
    n = windows_of(opened(ONCE))
    steps = n // G
    opened(ONCE, f"train.steps={steps}")
    with pytest.raises(DatasetError, match=f"needs up to {steps * G + 8} samples, left-out ones counted, but .* {n};"):
        opened(ONCE, f"train.steps={steps}", "data.skip=[{samples: [0, 7]}]")
    opened(ONCE, f"train.steps={steps}", f"data.skip=[{{samples: [{n}, {n + 9}]}}]")  # never reached


def test_the_check_of_the_length_begins_where_the_run_stands(opened):
    n = windows_of(opened(ONCE))
    steps = n // G
    cursor = opened(ONCE).dataset.cursor(16 * 2)  # two steps of 16 sequences
    with pytest.raises(DatasetError, match=f"needs up to {(steps + 2) * G} samples, left-out ones counted"):
        opened(ONCE, f"train.steps={steps}", step=2, cursor=cursor)
    cursor = opened(ONCE).dataset.cursor(4 * 2)  # two steps of 4
    opened(ONCE, f"train.steps={steps + 1}", step=2, cursor=cursor)


def test_what_is_announced_is_the_whole_run(opened):
    """Its shares and epochs are those at its true end: 30 steps of 8 after 10 of 16, and 40 samples left out."""
    data = opened(MIX)
    cursor = data.dataset.cursor(160)
    data = opened(MIX, "train.steps=40", "data.skip=[{samples: [200, 239]}]", step=10, cursor=cursor)
    lines, warnings = data.announce(30 * G)
    epochs = data.dataset.epochs(160 + 30 * G + 40)
    for name in SOURCES:
        assert any(line.startswith(f"{name}: ") and f", {epochs[name]:.2f} epochs of" in line for line in lines)
    assert warnings == []


def test_the_command_takes_step_and_sample_from_the_newest_checkpoint(opened, recipe, capsys):
    n = windows_of(opened(ONCE))
    steps = n // G
    cursor = opened(ONCE).dataset.cursor(16 * 2)
    folder = recipe.parent / "runs/test/checkpoints"
    staging = folder / "step-00000002.staging"
    staging.mkdir(parents=True)
    manifest = Manifest(step=2, adam_steps=2, world_size=1, zero_stage=1, shapes={}, files={}, cursor=cursor, config={})
    _commit(staging, folder / "step-00000002", manifest)
    assert pretrain.main(["--config", str(recipe), ONCE, f"train.steps={steps}"]) == 2
    assert f"needs up to {(steps + 2) * G} samples" in capsys.readouterr().err
    pretrain.check(pretrain.parse_arguments(["--config", str(recipe), ONCE, f"train.steps={steps - 2}"]))
