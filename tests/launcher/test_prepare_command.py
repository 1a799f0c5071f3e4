"""The command: what it prints and its exit codes."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from launcher.config import ConfigError
from launcher.prepare import main, part_of

ROOT = Path(__file__).parents[2]
LIBRARY = sysconfig.get_path("stdlib")
RECIPE = f"""
run: {{name: test}}
model: {{vocab_size: 512, seq_len: 32, d_model: 32, n_layers: 1, n_heads: 2, d_ff: 64}}
optim: {{warmup_steps: 0}}
train: {{steps: 1, global_batch_size: 2}}
data:
  sources: [{{kind: text, paths: ["{LIBRARY}/email/*.py"]}}]
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


def environment(**more):
    """Ours without what a job of SLURM may have left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "PYTHONPATH": str(ROOT), **more
    }  # fmt: skip


def run(recipe, *overrides, **more):
    return subprocess.run(
        command(recipe, *overrides),
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
    )


def test_prepares_says_what_it_wrote_and_what_comes_next(recipe, tmp_path):
    override = f"data.corpus={tmp_path}/corpus"
    done = run(recipe, override)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/corpus: " in done.stdout
    assert "left out: " in done.stdout
    assert f"next       deepspeed launcher/pretrain.py --config {recipe} {override}" in done.stdout
    assert (tmp_path / "corpus" / "manifest.json").is_file()
    again = run(recipe, override)
    assert again.returncode == 0
    assert "is finished; nothing to do" in again.stdout


def test_verify_proves_or_names_what_differs(recipe, tmp_path):
    override = f"data.corpus={tmp_path}/corpus"
    assert run(recipe, override).returncode == 0
    files = sorted(path for path in (tmp_path / "corpus" / "text").iterdir())
    n_bytes = sum(path.stat().st_size for path in files)
    done = run(recipe, override, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == (
        f"verified   {tmp_path}/corpus: {len(files)} files, {n_bytes:,} bytes of tokens, and the tokenizer are as they "
        "were written"
    )
    for path in files[:2]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    failed = run(recipe, override, "--verify")
    assert failed.returncode == 1
    assert [line.split(" ")[0] for line in failed.stderr.splitlines()] == [*map(str, files[:2]), f"{tmp_path}/corpus:"]
    assert failed.stderr.endswith(f"2 wrong among {len(files)} files and the tokenizer\n")
    assert "verified" not in failed.stdout
    refused = run(recipe, "data.corpus=s3://bucket/c", "--verify")
    assert refused.returncode == 2
    assert "is a URL, and what lies there is compared with its hashes whenever it is fetched" in refused.stderr


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.seedd=1", 2, "seedd"),
        (
            "data.corpus=s3://bucket/corpus",
            2,
            "data.corpus=s3://bucket/corpus is a URL, and prepare writes to a folder",
        ),
        ("data.corpus={folder}", 2, "holds other things (recipe.yaml) and no plan.json"),
        ("data.sources=[{{kind: text, paths: [/nowhere/*.txt]}}]", 2, "'/nowhere/*.txt' matches no file"),
        ("--part=2/2", 2, "part 2/2 does not exist; parts are numbered 0/2 to 1/2"),
        ("--part=1of2", 2, "--part 1of2; expected I/N such as 0/4, the first of four parts"),
        ("data.corpus={folder}/recipe.yaml/corpus", 1, "finished shards are kept: run the same command to go on"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(recipe, tmp_path, override, code, message):
    corpus = [] if "corpus" in override else [f"data.corpus={tmp_path}/corpus"]
    done = run(recipe, *corpus, override.format(folder=tmp_path))
    assert done.returncode == code
    assert done.stderr.startswith("prepare: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


CANARY = "hunter2canary"


@pytest.mark.parametrize(
    "override",
    [
        "data.corpus=https://me:{canary}@host/corpus",
        "data.corpus='https://host/corpus?X-Amz-Signature={canary}'",
        "data.sources=[{{kind: text, paths: ['s3://AKIA:{canary}@bucket/*']}}]",
        "data.sources=[{{kind: text, paths: 's3://AKIA:{canary}@bucket/*'}}]",
        "data.sources=[{{kind: dataset, field: text, path: 'https://{canary}@host/x'}}]",
        "data.sources=[{{kind: corpus, path: 'https://host/x?sig={canary}'}}]",
        "data.sources=[{{kind: megatron, prefix: ['https://host/x?token={canary}']}}]",
        "data.sources=[{{kind: text, paths: [s3://b/a], storage_options: {{secret: {canary}}}}}]",
        "data.cache.folder=ftp://me:{canary}@host/x",
        "data.cache.options={{password: {canary}}}",
        "data.stream={{dataset: json, data_files: ['https://host/x?key={canary}'], tokenizer: t}}",
        "data.stream={{dataset: 'https://me:{canary}@host/x', tokenizer: t}}",
        "data.tokenizer.path=https://me:{canary}@host/x",
        "data.corpus=[https://me:{canary}@host/corpus",
        "run.name=https://me:{canary}@host/corpus",
        "--data.corpus=https://me:{canary}@host/corpus",
    ],
)
@pytest.mark.fault(53)
def test_credentials_are_neither_shown_nor_written(recipe, tmp_path, monkeypatch, capfd, override):
    monkeypatch.chdir(tmp_path)
    corpus = [] if "corpus=" in override else ["data.corpus=corpus"]
    try:
        code = main(["--config", str(recipe), *corpus, override.format(canary=CANARY)])
    except SystemExit as left:  # by argparse
        code = left.code
    said = "".join(capfd.readouterr())
    assert (code, CANARY in said) == (2, False)
    assert said
    assert [path for path in tmp_path.rglob("*") if path.is_file() and CANARY in path.read_text()] == []


@pytest.mark.fault(53)
def test_credentials_in_the_command_itself(recipe, tmp_path):
    done = run(recipe, f"data.corpus=https://me:{CANARY}@host/c", f"data.tokenizer.path=https://host/t?token={CANARY}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.corpus is a URL with a user or password in it, which would be saved with the run; give" in done.stderr
    assert "data.tokenizer.path is a URL with token in its query, which would be saved" in done.stderr
    assert CANARY not in done.stderr


def test_parts_share_the_work_and_the_last_writes_the_manifest(recipe, tmp_path):
    """The first part is asked for, the second comes from a SLURM array; and srun under sbatch counts, sbatch does not."""
    override = f"data.corpus={tmp_path}/corpus"
    first = run(recipe, override, "--part", "0/2")
    assert (first.returncode, first.stderr) == (0, "")
    assert "part 0/2 is done; " in first.stdout
    assert "start it. The part that finishes last writes the manifest" in first.stdout
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    second = run(recipe, override, SLURM_ARRAY_TASK_ID="8", SLURM_ARRAY_TASK_MIN="7", SLURM_ARRAY_TASK_COUNT="2")
    assert (second.returncode, second.stderr) == (0, "")
    assert "next       deepspeed launcher/pretrain.py --config" in second.stdout
    assert (tmp_path / "corpus" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"ARRAY_TASK_COUNT": 4, "ARRAY_TASK_ID": 3, "ARRAY_TASK_MIN": 0}, (3, 4)),
        ({"ARRAY_TASK_COUNT": 3, "ARRAY_TASK_ID": 9, "ARRAY_TASK_MIN": 1, "ARRAY_TASK_STEP": 4}, (2, 3)),
        ({"ARRAY_TASK_COUNT": 1, "ARRAY_TASK_ID": 5, "ARRAY_TASK_MIN": 5}, (0, 1)),
        ({"PROCID": 0, "NTASKS": 8}, (0, 1)),  # the batch script of sbatch -n 8: it runs once
        ({"PROCID": 5, "NTASKS": 8, "STEP_ID": 0}, (5, 8)),
        (
            {"ARRAY_TASK_COUNT": 2, "ARRAY_TASK_ID": 1, "ARRAY_TASK_MIN": 0, "PROCID": 2, "NTASKS": 3, "STEP_ID": 1},
            (5, 6),
        ),
    ],
)
def test_part_from_slurm(variables, expected):
    environment = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    assert part_of(None, environment) == expected
    assert part_of("1/7", environment) == (1, 7)


def test_an_array_with_gaps_is_refused():
    environment = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1"}
    with pytest.raises(
        ConfigError, match=r"SLURM_ARRAY_TASK_ID=9 is none of 3 equal steps from 1; use an array without"
    ):
        part_of(None, environment)


def test_malformed_documents_are_told_of(recipe, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "some text"}\n{"text": \n' + '{"text": "some other text"}\n' * 20)
    source = f"data.sources=[{{kind: jsonl, paths: [{tmp_path}/some.jsonl], field: text}}]"
    overrides = [source, f"data.corpus={tmp_path}/corpus", "data.valid_fraction=0", "data.tokenizer.vocab_size=290"]
    stopped = run(recipe, *overrides)
    assert stopped.returncode == 2
    assert "some.jsonl" in stopped.stderr
    assert "data.on_bad=skip" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    done = run(recipe, *overrides, "data.on_bad=skip")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"malformed  {tmp_path}/corpus/bad.jsonl: 1 documents left out" in done.stdout


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    with subprocess.Popen(
        command(recipe, f"data.corpus={tmp_path}/corpus"), cwd=ROOT, env=environment(),
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
        [sys.executable, "launcher/prepare.py", "--help"], cwd=ROOT, env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "python launcher/prepare.py --config configs/R.yaml" in done.stdout
    assert "--part 0/4" in done.stdout
