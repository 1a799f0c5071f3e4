"""Bad input: one clear message and exit code 2, before a process group or a model exists; nothing written."""

import shutil
import subprocess
import sys

import pytest

from launcher import pretrain
from launcher.config import load_config
from launcher.run_dir import save_config
from runs import ROOT, environment, run, start, torchrun, wait_for_step, write_recipe


@pytest.fixture
def recipe(tmp_path, corpus, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))
    return write_recipe(tmp_path, corpus)


def refused(capsys, recipe, *overrides):
    assert pretrain.main(["--config", str(recipe), *overrides]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "train.stepz: no such key; did you mean train.steps?"),
        ("parallel.deepspeed={gradient_clipp1ng: 1}", "DeepSpeed has no such key"),
        ("train.micro_batch_size=3", "into train.micro_batch_size=3 on 1 ranks; the nearest global batches that do are 6"),
        ("data.corpus=nowhere", "nowhere"),
        ("model.vocab_size=300", "model.vocab_size=300 is smaller than the vocabulary"),
        ("model.vocab_size=520", "model.vocab_size=520 is larger than the vocabulary"),
        ("model.vocab_size=1024", "model.vocab_size=1024 is larger than the vocabulary"),
        ("train.global_batch_size=500000", "one step takes 500000; use a larger corpus"),
    ],
)  # fmt: skip
@pytest.mark.fault(43)
def test_refused_before_anything_is_started(capsys, recipe, override, message):
    assert message in refused(capsys, recipe, override)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(("vocab_size", "compared"), [(300, "smaller"), (1024, "larger")])
def test_the_vocabulary_of_a_stream_is_its_tokenizers(capsys, recipe, corpus, tmp_path, vocab_size, compared):
    stream = f"data.stream={{dataset: text, data_files: ['x.txt'], tokenizer: {corpus}/tokenizer}}"
    message = refused(capsys, recipe, f"model.vocab_size={vocab_size}", stream, f"data.corpus={tmp_path}/none")
    assert f"is {compared} than the vocabulary of data.stream.tokenizer={corpus}/tokenizer, 512; set it to" in message
    assert "none" not in message
    message = refused(capsys, recipe, f"model.vocab_size={vocab_size}")
    assert f"is {compared} than the vocabulary of data.corpus={corpus}, 512; set it to" in message


def test_a_padded_vocabulary_is_allowed(recipe):
    args = pretrain.parse_arguments(["--config", str(recipe), "model.vocab_size=576"])
    assert pretrain.check(args)[0].model.vocab_size == 576


def test_fp16_is_refused_where_the_device_lacks_it(capsys, recipe):
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device computes in fp16")
    assert "parallel.precision=fp16: the device" in refused(capsys, recipe, "parallel.precision=fp16")


@pytest.mark.fault(39, 43)
def test_more_ranks_than_the_batch_has_sequences(capsys, recipe, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    message = refused(capsys, recipe)
    assert "on 16 ranks; the nearest global batches that do are 32 (1024 tokens)" in message
    assert "the nearest numbers of ranks that do are 4" in message


@pytest.mark.fault(43)
def test_a_corpus_without_manifest_or_with_a_cut_shard(capsys, recipe, corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = next(copy.rglob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in refused(capsys, recipe, f"data.corpus={copy}")
    (copy / "manifest.json").unlink()
    assert "manifest.json" in refused(capsys, recipe, f"data.corpus={copy}")


@pytest.mark.fault(40)
def test_a_run_folder_of_another_config(capsys, recipe):
    run_dir = recipe.parent / "runs/test"
    run_dir.mkdir(parents=True)
    from launcher.config import load_config, to_yaml

    (run_dir / "config.yaml").write_text(to_yaml(load_config(str(recipe), ["optim.lr=0.5", "model.d_ff=96"])))
    text = refused(capsys, recipe)
    assert "holds a run of another config" in text
    assert "model.d_ff: was 96, is 64" in text
    assert "optim.lr: was 0.5, is 0.001" in text
    args = pretrain.parse_arguments(
        ["--config", str(recipe), "--allow-change", "optim.lr", "--allow-change", "model.d_ff"]
    )
    pretrain.check(args)
    assert pretrain.main(["--config", str(recipe), "run.seed=3", "--allow-change", "optim.lrr", "run.name=test"]) == 2
    assert "--allow-change optim.lrr: no such key" in capsys.readouterr().err
    (run_dir / "checkpoints/step-00000005").mkdir(parents=True)
    (run_dir / "checkpoints/step-00000005/manifest.json").write_text("{}")
    text = refused(capsys, recipe, "--allow-change", "model.d_ff")
    assert (
        "holds a run of another model, whose checkpoints cannot be read into this one:\n  model.d_ff: was 96, is 64"
        in text
    )
    assert "--allow-change" not in text
    text = refused(capsys, recipe, "model.d_ff=96", "model.dropout=0.2")  # which changes no weight
    assert "model.dropout: was 0.1, is 0.2" in text
    assert "allow each on purpose with --allow-change KEY" in text
    (run_dir / "config.yaml").write_text("[")
    assert "config.yaml cannot be read" in refused(capsys, recipe)


@pytest.mark.fault(40)
def test_another_mixture_is_refused_unless_it_is_allowed(capsys, tmp_path, mixture, recipe):
    recipe = write_recipe(tmp_path, mixture, "mixed")

    def sources(**weights):
        return f"data.sources={[{'kind': 'text', 'paths': ['-'], 'name': n, 'weight': w} for n, w in weights.items()]}"

    cfg = load_config(str(recipe), [sources(email=0.6, json=0.4)])
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    stage = "data.stages=[{from_tokens: 99, weights: {email: 1.0}}]"
    text = refused(capsys, recipe, sources(email=0.5, asyncio=0.4), "data.temperature=2.0", stage)
    assert "holds a run of another config" in text
    for line in (
        "data.sources.email.weight: was 0.6, is 0.5",
        "data.sources.json.weight: was 0.4, is None",
        "data.sources.asyncio.weight: was None, is 0.4",
        "data.temperature: was 1.0, is 2.0",
    ):
        assert f"  {line}\n" in text
    text = refused(capsys, recipe, sources(email=0.6, json=0.4), stage)
    assert "data.stages: was [], is [{'from_tokens': 99, 'weights': {'email': 1.0}}]" in text
    allowed = ["--allow-change", "data.sources"]
    pretrain.check(pretrain.parse_arguments(["--config", str(recipe), sources(email=0.5, asyncio=0.4), *allowed]))


@pytest.mark.fault(19)
def test_a_folder_that_cannot_be_written(capsys, recipe, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written: " in refused(capsys, recipe)


@pytest.mark.fault(19)
def test_a_read_only_file_system(tmp_path, corpus):
    """A real one: the kernel mounts an empty tmpfs read-only for this command alone."""
    text = in_mount(tmp_path, corpus, "size=1m,ro")
    assert "cannot be written: Read-only file system; choose another place with run.folder" in text


@pytest.mark.fault(17)
def test_a_disk_that_is_too_small(tmp_path, corpus):
    text = in_mount(tmp_path, corpus, "size=400k")
    assert "one checkpoint of this model takes 0.00 GB" in text


def in_mount(tmp_path, corpus, options):
    """The command's messages with its runs in a tmpfs of its own; skipped where mounts are not allowed."""
    target = tmp_path / "mounted"
    target.mkdir()
    recipe = write_recipe(tmp_path, corpus)
    mount = f"mount -t tmpfs -o {options} none {target}"
    allowed = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"needs the right to mount: {allowed.stderr.decode().strip()}")
    command = f"{mount} && {sys.executable} launcher/pretrain.py --config {recipe} run.folder={target}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr[-3000:]
    return done.stderr


@pytest.mark.fault(22)
def test_a_run_that_another_job_holds(tmp_path, corpus):
    recipe = write_recipe(tmp_path, corpus)
    holder = start(torchrun(1, "--config", recipe, "train.steps=100000", "run.seed=1"), tmp_path / "holder.log")
    try:
        wait_for_step(tmp_path / "runs/test", 2, holder)
        code = (
            "import launcher.pretrain as p, launcher.lease as l, functools, sys; "
            "p.sole_writer = functools.partial(l.sole_writer, wait_s=0.5); "
            f"sys.exit(p.main(['--config', {str(recipe)!r}, 'train.steps=100000', 'run.seed=1']))"
        )
        text = run([sys.executable, "-c", code], tmp_path / "second.log", code=2)
    finally:
        from runs import kill

        kill(recipe, holder)
    assert "is in use by another job (host " in text
    assert "stop that one first, or use another run.name" in text
