"""The command: what it prints and its exit codes."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sysconfig.get_path("stdlib")
RECIPE = f"""
run: {{name: test}}
model: {{vocab_size: 512, seq_len: 32, d_model: 32, n_layers: 1, n_heads: 2, d_ff: 64}}
optim: {{warmup_steps: 0}}
train: {{steps: 1, global_batch_size: 2}}
data:
  source: {{kind: text, paths: ["{LIBRARY}/email/*.py"]}}
  tokenizer: {{vocab_size: 500, train_bytes: 131072}}
  shard_bytes: 65536
  valid_fraction: 0.2
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def command(recipe, *overrides):
    return [sys.executable, "launcher/prepare.py", "--config", str(recipe), *overrides]


def run(recipe, *overrides):
    return subprocess.run(
        command(recipe, *overrides),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_prepares_says_what_it_wrote_and_what_comes_next(recipe, tmp_path):
    override = f"data.corpus={tmp_path}/corpus"
    done = run(recipe, override)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/corpus: " in done.stdout
    assert f"next       deepspeed launcher/pretrain.py --config {recipe} {override}" in done.stdout
    assert (tmp_path / "corpus" / "manifest.json").is_file()
    again = run(recipe, override)
    assert again.returncode == 0
    assert "is finished; nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.seedd=1", 2, "seedd"),
        ("data.corpus={folder}", 2, "holds other things (recipe.yaml) and no plan.json"),
        ("data.source.paths=[/nowhere/*.txt]", 2, "'/nowhere/*.txt' matches no file"),
        ("data.corpus={folder}/recipe.yaml/corpus", 1, "finished shards are kept: run the same command to go on"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(recipe, tmp_path, override, code, message):
    corpus = [] if "corpus" in override else [f"data.corpus={tmp_path}/corpus"]
    done = run(recipe, *corpus, override.format(folder=tmp_path))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    with subprocess.Popen(
        command(recipe, f"data.corpus={tmp_path}/corpus"), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while not (tmp_path / "corpus" / "plan.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # to all, as a terminal does
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; finished shards are kept: run the same command to go on" in errors
    assert "Traceback" not in errors


def test_help_shows_an_example():
    done = subprocess.run(
        [sys.executable, "launcher/prepare.py", "--help"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "python launcher/prepare.py --config configs/R.yaml" in done.stdout
