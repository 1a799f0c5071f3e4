"""A run that learns from a larger one, as a user types it: stopped, resumed, used; and what cannot teach is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from task_runs import Lone, make_origin, make_tuned_run, tune

from exports import LLAMA, SIZES, change_config
from launcher import check, evaluate, model_card, pretrain
from launcher.config import ConfigError, load_config, validate
from launcher.import_hf import load_import_config, open_folder
from launcher.origin import open_origin
from launcher.origin_config import load_finetune_config
from launcher.run_dir import Ledger, save_config
from launcher.start import check_run, refuse_other_config
from launcher.teacher import load_teacher, with_teacher
from launcher.trained import build_model, load_trained, open_checkpoint
from model.config import ModelConfig
from model.distill import Student
from model.init import initial_values
from parallel.checkpoint import CheckpointError, Manifest
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig
from ranks import Alone
from runs import assert_same_state, kill, losses, metrics, run, start, torchrun, wait_for_step, write_recipe

MODEL = {"vocab_size": 576, **SIZES, "n_layers": 3, **LLAMA}


def make_teacher(folder, corpus, steps=(2,)):
    """The folder of a larger run, with drawn weights; the corpus has 512 ids."""
    cfg = validate(
        {
            "run": {"name": "large", "folder": str(folder)},
            "model": MODEL,
            "optim": {"warmup_steps": 0},
            "train": {"steps": 2, "global_batch_size": 12},
        },
        "a test",
    )
    writer = CheckpointWriter(cfg.run_dir / "checkpoints", Alone(), CheckpointConfig(keep=0))
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(cfg).named_parameters()}
    listed = {name: list(shape) for name, shape in shapes.items()}
    for step in steps:
        weights = {name: initial_values(name, shape, cfg.model, step).view(shape) for name, shape in shapes.items()}
        writer.save(Lone(weights), Manifest(step, 1, 1, 0, listed, {}, {}, cfg.model_dump(mode="json"), totals={}))
        assert writer.wait().error is None
    shutil.copytree(corpus / "tokenizer", cfg.run_dir / "tokenizer")
    return cfg.run_dir


@pytest.fixture
def teacher(corpus, tmp_path):
    return make_teacher(tmp_path / "theirs", corpus)


@pytest.fixture
def recipe(teacher, corpus, tmp_path):
    path = write_recipe(tmp_path, corpus)
    path.write_text(path.read_text() + f"distill: {{teacher: {teacher}, weight: 0.6, temperature: 2.0}}\n")
    return path


def refused(capsys, recipe, *overrides):
    assert pretrain.main(["--config", str(recipe), *overrides]) == 2
    return capsys.readouterr().err


# -- runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_run_that_never_stopped(recipe, teacher, tmp_path, capsys):
    """Two ranks of ZeRO 3 with dropout; then what was made of it is used, and the teacher is gone."""
    zero3 = ["parallel.zero_stage=3", "train.steps=12", "eval.every=6"]
    straight, run_dir = tmp_path / "runs/straight", tmp_path / "runs/test"
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    run(torchrun(2, "--config", recipe, "run.name=straight", *zero3), tmp_path / "log")
    command = torchrun(2, "--config", recipe, *zero3)
    process = start(command, tmp_path / "log2")
    wait_for_step(run_dir, 7, process)
    kill(recipe, process)
    text = run(command, tmp_path / "log2")
    assert f"learns from {teacher} at step 2 (digest " in text
    assert_same_state(straight, run_dir)
    assert losses(straight) == losses(run_dir)
    assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before
    parts = {
        line["step"]: (line["distill/kl"], line["distill/text"]) for line in metrics(run_dir) if "distill/kl" in line
    }
    for step, loss in losses(run_dir).items():
        assert 0.6 * 4 * parts[step][0] + 0.4 * parts[step][1] == pytest.approx(loss, rel=1e-9)
    held_out = next(line["loss/valid"] for line in reversed(metrics(run_dir)) if "loss/valid" in line)
    digest = open_origin(str(teacher)).digest
    starts = [event for event in Ledger(run_dir).events() if event["event"] == "start"]
    assert [(e["teacher"], e["teacher_step"], e["teacher_digest"]) for e in starts] == [(str(teacher), 2, digest)] * 2
    shutil.rmtree(teacher)
    assert evaluate.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["overall"]
    assert found["loss"] == pytest.approx(held_out, rel=1e-5)
    made = model_card._made(open_checkpoint(run_dir, 12))
    assert made == f"pretrained while learning from `large` at step 2 (digest {digest})"
    assert pretrain.main(["--config", str(recipe), *zero3]) == 0
    assert "is finished: 12 of 12 steps" in capsys.readouterr().out
    assert "distill.teacher=" in refused(capsys, recipe, *zero3, "train.steps=13", "--allow-change", "train.steps")


@pytest.mark.slow
@pytest.mark.long  # two starts
def test_conversations_with_adapters_and_a_folder_as_teacher(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(9)
    ]
    large = make_origin(tmp_path / "large", [json.dumps(line) for line in lines])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(
        f"""
run: {{name: tuned, folder: {tmp_path / "runs"}}}
init: {large}
task: {{kind: chat, train: [{tmp_path / "t.jsonl"}]}}
lora: {{rank: 2}}
distill: {{teacher: {large}, weight: 1.0}}
optim: {{lr: 1e-3, warmup_steps: 0}}
parallel: {{zero_stage: 2, precision: fp32, timeout_s: 60}}
train: {{steps: 3, global_batch_size: 4, micro_batch_size: 2}}
log: {{every: 1}}
"""
    )
    run(tune(2, "--config", recipe), tmp_path / "log")
    found = losses(tmp_path / "runs/tuned")
    assert found[1] == pytest.approx(0.0, abs=1e-5)  # it is its own teacher yet
    assert len(found) == 3


# -- the teacher ---------------------------------------------------------------------------------------------------------


def test_it_is_what_the_run_or_folder_holds_in_the_runs_precision(recipe, teacher, tmp_path):
    mesh = SimpleNamespace(device=torch.device("cpu"), dp_size=2, rank=0, world_size=1, gather=lambda value: [value])
    for place in (teacher, make_origin(tmp_path / "hf", ["a text"])):
        cfg = with_teacher(load_config(str(recipe), [f"distill.teacher={place}", "parallel.precision=bf16"]))
        loaded, expected = load_teacher(cfg, mesh), load_trained(place, None, torch.bfloat16)
        assert (loaded.n_ids, loaded.share, loaded.temperature) == (expected.tokenizer.vocab_size, 0.6, 2.0)
        assert loaded.kl.maxlen == cfg.grad_accum_steps(2) == 2
        for ours, theirs in zip(loaded.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == torch.bfloat16
            assert not ours.requires_grad
        assert not loaded.model.training
        with torch.device("meta"):
            assert isinstance(build_model(cfg), Student)


def test_the_work_of_a_step_is_that_of_both(recipe):
    cfg = with_teacher(load_config(str(recipe), []))
    assert cfg.flops_per_token == cfg.model.flops_per_token(32) + ModelConfig(**MODEL).flops_per_token(32) // 3
    assert cfg.begun_with["teacher_step"] == 2


def test_a_run_holds_to_the_step_that_it_learned_from(teacher, corpus, recipe, tmp_path):
    cfg = with_teacher(load_config(str(recipe), []))
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    shutil.rmtree(teacher)
    make_teacher(tmp_path / "theirs", corpus, steps=(2, 4))  # it went on
    assert with_teacher(load_config(str(recipe), [])) == cfg
    shutil.move(teacher, tmp_path / "moved")
    moved = with_teacher(load_config(str(recipe), [f"distill.teacher={tmp_path / 'moved'}"]))
    assert moved.distill.origin == cfg.distill.origin
    refuse_other_config(moved, [])


def test_a_finished_run_needs_its_teacher_no_more(teacher, recipe, monkeypatch, capsys):
    cfg = with_teacher(load_config(str(recipe), []))
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    shutil.rmtree(teacher)
    assert with_teacher(load_config(str(recipe), []), needed=False) == cfg
    assert "is neither a run's folder" in refused(capsys, recipe)
    monkeypatch.setattr("launcher.start.is_finished", lambda cfg: True)
    monkeypatch.setattr("launcher.pretrain.is_finished", lambda cfg: True)
    monkeypatch.setattr("launcher.pretrain.committed_steps", lambda folder: [24])
    assert pretrain.main(["--config", str(recipe)]) == 0
    monkeypatch.setattr("launcher.check.is_finished", lambda cfg: True)
    assert check.main(["--config", str(recipe), "--ranks", "1", "--write-nothing"]) == 0


def test_an_imported_run_has_its_teacher_from_the_beginning(tmp_path):
    folder, path = make_origin(tmp_path / "hf", ["a text"]), tmp_path / "more.yaml"
    train = {"steps": 9000, "global_batch_size": 8}
    raw = {"run": {"name": "more"}, "data": {"corpus": "-"}, "train": train, "distill": {"teacher": str(folder)}}
    path.write_text(yaml.safe_dump(raw))
    cfg, _ = load_import_config(str(path), [], open_folder(str(folder)))
    assert cfg.distill.origin == open_origin(str(folder)).identity()


def test_an_old_run_that_says_nothing_of_a_teacher_goes_on(corpus, tmp_path):
    cfg = load_config(str(write_recipe(tmp_path, corpus)), [])
    cfg.run_dir.mkdir(parents=True)
    saved = cfg.model_dump(mode="json")
    assert saved.pop("distill") is None
    (cfg.run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    check_run(cfg, [], 1, pretrain.PRETRAIN)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.teacher=runs/none"], "distill.teacher=runs/none is neither a run's folder"),
        (["distill.weight=0.0"], "distill.weight: got 0.0; input should be greater than 0"),
        (["distill.weight=1.5"], "distill.weight: got 1.5; input should be less than or equal to 1"),
        (["distill.temperature=0.0"], "distill.temperature: got 0.0; input should be greater than 0"),
        (["distill.techer=x"], "distill.techer: no such key; did you mean distill.teacher?"),
        (["model.seq_len=64"], "reads 32 tokens, and the student's rows have model.seq_len=64; make it at most 32"),
    ],
)
def test_a_section_that_cannot_be_used(overrides, message, recipe, tmp_path, capsys):
    assert message in refused(capsys, recipe, *overrides)
    assert not (tmp_path / "runs").exists()


def test_a_student_that_transformers_builds(recipe, capsys):
    raw = yaml.safe_load(recipe.read_text())
    model = {"family": "hf", "objective": "causal", "vocab_size": 512, "seq_len": 32, "config": {"model_type": "gpt2"}}
    recipe.write_text(yaml.safe_dump({**raw, "model": model}))
    assert "distill: got model.family=hf, objective=causal; only Longhaul's own decoder" in refused(capsys, recipe)


@pytest.mark.parametrize("kind", ["classify", "tag", "preference"])
def test_tasks_without_a_next_token(kind, teacher, tmp_path):
    labels = {} if kind == "preference" else {"labels": ["a", "b"] if kind == "classify" else ["O", "B-X"]}
    path = tmp_path / "tune.yaml"
    raw = {"init": str(teacher), "task": {"kind": kind, "train": ["-"], **labels}, "distill": {"teacher": str(teacher)},
           "run": {"name": "x", "folder": str(tmp_path)}, "train": {"steps": 9000, "global_batch_size": 8}}  # fmt: skip
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=f"distill: got task.kind={kind}; a teacher tells the next token"):
        load_finetune_config(str(path), [])


def test_teachers_that_cannot_teach(corpus, recipe, teacher, tmp_path, capsys):
    labels = make_tuned_run(tmp_path, corpus, "llama", {"kind": "classify", "labels": ["a", "b"]})
    assert "is no language model, by its " in refused(capsys, recipe, f"distill.teacher={labels}")
    bert = make_tuned_run(tmp_path / "b", corpus, "bert", {"kind": "classify", "labels": ["a", "b"]})
    assert "is of family hf; expected a run of the own decoder" in refused(capsys, recipe, f"distill.teacher={bert}")
    other = make_origin(tmp_path / "other", ["another text"])
    assert "to which other ids mean other text; name another teacher" in refused(
        capsys, recipe, f"distill.teacher={other}"
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "m.M"}}))
    assert "distill.teacher: " in (text := refused(capsys, recipe, f"distill.teacher={other}"))
    assert "demands code of its own" in text
    assert check.main(["--config", str(recipe), "--ranks", "1", "--write-nothing", "distill.teacher=runs/none"]) == 2
    assert "distill.teacher=runs/none is neither" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_section_that_comes_or_goes_is_told_and_allowed_as_one(recipe):
    learns = with_teacher(load_config(str(recipe), []))
    alone = learns.model_copy(update={"distill": None})
    learns.run_dir.mkdir(parents=True)
    for before, after, told in (
        (alone, learns, "was left out, is there"),
        (learns, alone, "was there, is left out"),
    ):
        save_config(before)
        with pytest.raises(ConfigError, match=f"another config:\n  distill: {told}\nuse another"):
            refuse_other_config(after, [])
        refuse_other_config(after, ["distill"])


def test_another_teacher_or_weight_at_a_resume(recipe, teacher, tmp_path, capsys):
    cfg = with_teacher(load_config(str(recipe), []))
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    assert "distill.weight: was 0.6, is 0.5" in refused(capsys, recipe, "distill.weight=0.5")
    change_config(teacher, 2, run={"seed": 9})
    text = refused(capsys, recipe)
    assert "is not what the run learned from before: another digest; restore it, or use another run.name" in text
    saved = yaml.safe_load((cfg.run_dir / "config.yaml").read_text())
    saved["distill"]["origin"] = {"digest": 3}
    (cfg.run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    assert "config.yaml does not say what it learned from" in refused(capsys, recipe)


@pytest.mark.parametrize("error", [OSError("stale file handle"), torch.OutOfMemoryError("no room")])
def test_a_teacher_that_one_rank_cannot_load_ends_all(error, recipe, monkeypatch):
    cfg, word = with_teacher(load_config(str(recipe), [])), f"{type(error).__name__}: {error}"

    def fail(model, read):
        raise error

    mesh = SimpleNamespace(device=torch.device("cpu"), dp_size=2, rank=1, world_size=1, gather=lambda value: [value])
    monkeypatch.setattr("launcher.teacher.filled", fail)
    with pytest.raises(CheckpointError, match=f"distill.teacher=.* cannot be loaded by rank 1: {word}"):
        load_teacher(cfg, mesh)
    monkeypatch.undo()
    theirs = iter(["", f"rank 1: {word}"])  # it opens there, too
    mesh.gather = lambda value: [value, next(theirs)] if isinstance(value, str) else [value]
    with pytest.raises(CheckpointError, match=word):
        load_teacher(cfg, mesh)


def test_a_teacher_whose_weights_are_damaged(recipe, teacher, tmp_path):
    cfg = with_teacher(load_config(str(recipe), []))
    [file] = (teacher / "checkpoints/step-00000002").glob("*.safetensors")
    payload = bytearray(file.read_bytes())
    payload[-100] ^= 1
    file.write_bytes(payload)
    with pytest.raises(
        ConfigError, match=r"distill.teacher=.* is damaged: .*name another as distill.teacher: RUN@STEP"
    ):
        load_teacher(cfg, Alone())
