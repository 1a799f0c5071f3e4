"""What a run will read, known before it starts, wherever it stands and whatever is left out."""

import pytest

from data.dataset import DatasetError
from launcher import pretrain
from launcher.config import ConfigError, load_config
from launcher.run_data import open_data
from launcher.run_dir import Ledger
from parallel.checkpoint import Manifest, manifest_text
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
        return open_data(load_config(str(recipe), list(overrides)), cursor, step, dp_size=1)

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


def test_a_changed_mixture_is_announced(opened):
    cursor = opened(MIX).dataset.cursor(80)
    lines, _ = opened(sources(email=1.0, json=1.0), step=10, cursor=cursor).announce(14 * G)
    assert "the mixture of sources changes at sample 80: email 50.00%, json 50.00%" in lines
    stages = "data.stages=[{from_tokens: 1280, weights: {json: 1.0}}]"
    cursor = opened(MIX, stages).dataset.cursor(80)
    lines, warnings = opened(sources(email=1.0, json=1.0), stages, step=10, cursor=cursor).announce(14 * G)
    assert not any("the mixture of sources" in line for line in lines)
    assert any("at sample 80 the stage from_tokens=1280 of data.stages governs" in line for line in warnings)


def test_the_command_takes_step_and_sample_from_the_newest_checkpoint(opened, recipe, capsys):
    n = windows_of(opened(ONCE))
    steps = n // G
    cursor = opened(ONCE).dataset.cursor(16 * 2)
    folder = recipe.parent / "runs/test/checkpoints/step-00000002"
    folder.mkdir(parents=True)
    manifest = Manifest(step=2, adam_steps=2, world_size=1, zero_stage=1, shapes={}, files={}, cursor=cursor, config={})
    (folder / "manifest.json").write_text(manifest_text(manifest))
    assert pretrain.main(["--config", str(recipe), ONCE, f"train.steps={steps}"]) == 2
    assert f"needs up to {(steps + 2) * G} samples" in capsys.readouterr().err
    pretrain.check(pretrain.parse_arguments(["--config", str(recipe), ONCE, f"train.steps={steps - 2}"]))


# -- data.skip of a run that has begun ---------------------------------------------------------------------------------


def note_start(recipe, step, batch, skip=()):
    folder = recipe.parent / "runs/test"
    folder.mkdir(parents=True, exist_ok=True)
    Ledger(folder).add("start", number=1, step=step, global_batch_size=batch, skip=list(skip))


def test_steps_are_refused_after_another_batch_size(opened, recipe, capsys):
    """Their numbers would be taken at the present batch, and other samples left out without a word."""
    skip = "data.skip=[{steps: [3, 4]}, {samples: [7, 8]}, {steps: [6, 6]}]"
    note_start(recipe, 0, G)
    opened(MIX, skip)
    note_start(recipe, 5, 16)
    note_start(recipe, 9, G)
    with pytest.raises(ConfigError, match=r"data.skip names steps \[3, 4\], \[6, 6\], but .* steps of 8, 16 sequences"):
        opened(MIX, skip)
    assert pretrain.main(["--config", str(recipe), MIX, skip]) == 2
    assert f"name samples instead: launcher/audit.py {recipe.parent}/runs/test --step K says" in capsys.readouterr().err
    opened(MIX, "data.skip=[{samples: [7, 8]}]")


def test_what_was_read_before_it_was_to_be_left_out_is_told(opened, recipe):
    cursor = opened(MIX).dataset.cursor(80)
    old = {"samples": [30, 39]}
    note_start(recipe, 0, G)
    note_start(recipe, 5, G, [old])
    skip = [old, {"steps": [2, 3]}, {"samples": [76, 85]}, {"samples": [80, 89]}]
    data = opened(MIX, f"data.skip={skip}", step=10, cursor=cursor)
    note_start(recipe, 10, G, skip)  # as pretrain does before it announces
    _, warnings = data.announce(14 * G)
    assert warnings == [
        f"data.skip has {{'{key}': {pair}}}, but samples {low} to {high} were read before this checkpoint (of sample 80) "
        "and stay in the run; to leave them out, go on from a checkpoint before them: move the later ones away"
        for key, pair, low, high in (("steps", [2, 3], 8, 23), ("samples", [76, 85], 76, 79))
    ]
