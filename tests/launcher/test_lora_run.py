"""LoRA as a user types it: a section of the recipe; its run stops, resumes, is scored, exported and tuned on."""

import json
import shutil

import pytest
import torch
import yaml
from masked_runs import RECIPE as MASKED
from masked_runs import make_corpus
from task_runs import make_origin, tune, write_lines, write_recipe
from test_task_run import LABELS, LINES, evaluated, logged
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from exports import FAMILIES
from launcher import export, finetune, generate, pretrain
from launcher.config import ConfigError, load_config, validate
from launcher.origin import open_origin
from launcher.origin_config import load_finetune_config
from launcher.origin_weights import origin_weights
from launcher.run_dir import Ledger, save_config
from launcher.saving import checkpoint_bytes
from launcher.trained import build_model, open_checkpoint, told_too_many, told_trained
from model.init import initial_values
from model.lora import is_adapter, plain_name
from parallel.checkpoint import Manifest, read_manifest
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig
from parallel.state import KINDS, Fragment
from ranks import Alone
from runs import assert_same_state, kill, losses, run, start, wait_for_step

TASK = {"kind": "classify", "labels": LABELS, "train": ["t.jsonl"]}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"), [f"{line['text']} # " * 30 for line in LINES])


def with_lora(recipe, **lora):
    text = json.dumps(lora)
    recipe.write_text(recipe.read_text() + f"\nlora: {text}\n")
    return recipe


class Lone:
    """What a save needs of an engine, of one process that trained in bf16."""

    mesh, zero_stage, adam_steps = Alone(), 0, 1

    def __init__(self, weights):
        self._weights = weights

    def owned_fragments(self):
        for name, weight in self._weights.items():
            trained = is_adapter(name) or name.startswith("score.")
            for kind in KINDS if trained else KINDS[:1]:
                yield Fragment(name, kind, 0, weight.flatten() if trained else weight.flatten().bfloat16())


def make_run(folder, corpus, family, task, data=None, model=None, **lora):
    """A run's folder as a tuning with LoRA leaves it: in bf16, its adapters of some size."""
    model = model or FAMILIES[family][0].model_dump(mode="json")
    raw = {
        "run": {"name": family, "folder": str(folder)},
        "init": "runs/base@7",
        "origin": {"step": 7, "digest": "0123", "tokenizer": "4567", "model": model},
        "task": task,
        "data": data or {},
        "lora": {"rank": 4, **lora},
        "model": model,
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "global_batch_size": 12},
    }
    cfg = validate(raw, "a test")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(cfg).named_parameters()}
    weights = {name: initial_values(plain_name(name), shape, cfg.model, 3) for name, shape in shapes.items()}
    for name in weights:
        if "lora_B" in name:
            weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(len(name))) / 20
    writer = CheckpointWriter(cfg.run_dir / "checkpoints", Alone(), CheckpointConfig(keep=0))
    listed = {name: list(shape) for name, shape in shapes.items()}
    writer.save(Lone(weights), Manifest(2, 1, 1, 0, listed, {}, {}, cfg.model_dump(mode="json"), totals={"tokens": 24}))
    assert writer.wait().error is None
    shutil.copytree(corpus / "tokenizer", cfg.run_dir / "tokenizer")
    save_config(cfg)
    return cfg.run_dir


@pytest.fixture
def short_proof(monkeypatch):
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    monkeypatch.setattr(export, "PROOF_TOKENS", 256)


# -- what is made of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_an_export_is_one_plain_model_and_computes_what_the_run_did(
    family, dtype, corpus, tmp_path, short_proof, capsys
):
    run_dir, output = make_run(tmp_path / "runs", corpus, family, {"kind": "text"}), tmp_path / "out"
    assert export.main([str(run_dir), "--output", str(output), "--dtype", dtype]) == 0
    assert "the run trained LoRA matrices of rank 4, which are merged into the weights" in capsys.readouterr().out
    report = json.loads((output / "export_report.json").read_text())
    merge = report["lora"]["merged"]
    assert report["lora"]["rank"] == 4
    assert 0 < merge["largest_difference"] < merge["tolerance"] * merge["largest_logit"]
    card = (output / "README.md").read_text()
    assert "LoRA matrices of rank 4" in card
    assert "lora:\n  rank: 4\n" in card
    cfg = open_checkpoint(run_dir, None).cfg
    assert report["parameters"] < sum(p.numel() for p in build_model(cfg).parameters())
    assert generate.main([str(output), "--prompt", "def ", "--temperature", "0", "--tokens", "8"]) == 0
    of_export = capsys.readouterr().out
    assert generate.main([str(run_dir), "--prompt", "def ", "--temperature", "0", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == of_export or dtype == "bf16"  # then of other weights, by their rounding


@pytest.mark.slow
def test_a_masked_model_of_transformers_is_merged_and_exported_as_well(tmp_path, short_proof):
    corpus, recipe = make_corpus(tmp_path), yaml.safe_load(MASKED.format(folder="", corpus=tmp_path / "prepared"))
    run_dir = make_run(tmp_path / "runs", corpus, "bert", {"kind": "text"}, recipe["data"], recipe["model"])
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/export_report.json").read_text())
    assert report["architecture"] == "BertForMaskedLM"
    assert report["lora"]["merged"]["largest_difference"] > 0


def test_an_export_that_leaves_the_adapters_out_is_refused(corpus, tmp_path, short_proof, capsys, monkeypatch):
    run_dir = make_run(tmp_path / "runs", corpus, "llama", {"kind": "text"})
    monkeypatch.setattr("launcher.trained.merged", lambda weight, a, b, scaling, start: weight)
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 1
    assert "with its adapters merged the run's model gives other logits, by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tuning_begins_with_the_merged_weights_of_such_a_run(corpus, tmp_path):
    run_dir = make_run(tmp_path / "runs", corpus, "qwen3", {"kind": "text"}, targets=["wv", "w_up"])
    opened, ours = open_origin(str(run_dir)), open_checkpoint(run_dir, None)
    needed = checkpoint_bytes(ours.cfg, build_model)  # 2 bytes for a frozen parameter
    assert needed < sum(entry["bytes"] for entry in ours.reader.manifest.files.values()) < needed + 20_000  # headers
    model = ours.merged_model()
    assert opened.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, weight in model.named_parameters():
        n = weight.numel()
        both = torch.cat([opened.read(name, 0, n // 3), opened.read(name, n // 3, n)])
        assert torch.equal(both, weight.detach().flatten()), name
    tokens = torch.arange(40, 60).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), ours.model()(tokens), rtol=1e-4, atol=1e-5)


def test_a_run_begins_as_its_origin_computes(origin, tmp_path):
    write_lines(tmp_path / "t.jsonl", LINES)
    task = {**TASK, "train": [str(tmp_path / "t.jsonl")]}
    recipe = with_lora(write_recipe(tmp_path, origin, task), rank=2, targets=["wq"])
    cfg = load_finetune_config(str(recipe), [])
    initial, model = origin_weights(cfg, Alone()), build_model(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial.read(name, tuple(p.shape), 0, p.numel()).view(p.shape))
    assert initial.told[1:] == (
        "  new, with values drawn: score.weight (3, 48)",
        "  new beside them: 4 matrices of LoRA, rank 2, that add 0 as yet",
    )
    tokens = torch.arange(30).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(origin)
    with torch.inference_mode():
        torch.testing.assert_close(model.hidden(tokens), theirs.model(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    told = told_trained(cfg, shapes, trained)
    assert told == "trains 528 of 64,224 parameters (0.82 %), LoRA rank 2 on wq, and score.weight in full"
    assert checkpoint_bytes(cfg, build_model) == 12 * 528 + 4 * (64_224 - 528)
    # of the matrices' three products, forward, of gradients of inputs and of weights, the last is not made
    in_full = cfg.model_copy(update={"lora": None}).flops_per_token
    assert in_full - cfg.flops_per_token == 2 * cfg.model.n_matrix_params


# -- a whole run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_resumed_without_its_origin_scored_and_exported(origin, tmp_path, capsys):
    own = shutil.copytree(origin, tmp_path / "origin")
    file = write_lines(tmp_path / "t.jsonl", LINES)
    task = {"kind": "classify", "labels": LABELS, "train": [file], "valid": [file]}
    recipe = with_lora(write_recipe(tmp_path, own, task, steps=24), rank=4, dropout=0.1)
    run_dir, log = tmp_path / "runs/tuned", tmp_path / "log"
    text = run(tune(2, "--config", recipe, "parallel.zero_stage=3", "train.stop_at=4"), log, code=1)  # torchrun's own
    assert "  trains 6,672 of 70,368 parameters (9.5 %), LoRA rank 4 on w_down, w_gate, w_up, wk, wo, wq, wv" in text
    [start] = [event for event in Ledger(run_dir).events() if event["event"] == "start"]
    assert (start["parameters"], start["trained_parameters"]) == (70_368, 6_672)
    manifest = read_manifest(run_dir / "checkpoints/step-00000004")
    assert sum(entry["bytes"] for entry in manifest.files.values()) < 4 * 70_368 + 8 * 6_672 + 40_000
    shutil.rmtree(own)
    run(tune(1, "--config", recipe, "parallel.activation_checkpointing=full"), log)
    assert logged(run_dir, "valid/accuracy")[24] == 1.0
    found = evaluated(capsys, run_dir)["overall"]
    assert found["loss/valid"] == pytest.approx(logged(run_dir, "loss/valid")[24], rel=1e-4)
    # what never trained is what it was
    first, last = (open_checkpoint(run_dir, step).reader for step in (4, 24))
    frozen = [name for name in manifest.shapes if not is_adapter(name) and not name.startswith("score.")]
    assert frozen
    assert all(torch.equal(first.tensor(name), last.tensor(name)) for name in frozen)
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        chosen = [model(**tokenizer(line["text"], return_tensors="pt")).logits.argmax().item() for line in LINES]
    assert [LABELS[i] for i in chosen] == [line["label"] for line in LINES]


@pytest.mark.slow
@pytest.mark.long  # three starts
def test_killed_and_resumed_equals_never_stopped(origin, tmp_path):
    """Dropout in the adapters on, blocks recomputed."""
    file = write_lines(tmp_path / "t.jsonl", LINES)
    task = {"kind": "classify", "labels": LABELS, "train": [file], "valid": [file]}
    recipe = with_lora(write_recipe(tmp_path, origin, task, steps=60), rank=4, dropout=0.1)
    options = ["parallel.zero_stage=2", "parallel.activation_checkpointing=full", "checkpoint.every=5"]
    command, log = tune(2, "--config", recipe, *options), tmp_path / "log"
    process = start(command, log)
    wait_for_step(tmp_path / "runs/tuned", 12, process)
    kill(recipe, process)
    assert "resumed from" in run(command, log)
    run(tune(2, "--config", recipe, *options, "run.name=straight"), log)
    assert losses(tmp_path / "runs/tuned") == losses(tmp_path / "runs/straight")
    assert_same_state(tmp_path / "runs/tuned", tmp_path / "runs/straight")


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "lora.rank: got 0; input should be greater than 0"),
        ({"rnak": 8}, "lora.rnak: no such key; did you mean lora.rank?"),
        ({"targets": []}, "lora.targets: got a list; list should have at least 1 item"),
        (
            {"targets": ["wq", "head"]},
            "lora.targets: head names no linear layer of the model's blocks; they are w_down",
        ),
    ],
)
def test_a_section_that_cannot_be_used_is_refused(lora, message, origin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))
    recipe = with_lora(write_recipe(tmp_path, origin, TASK), **lora)
    assert pretrain.main(["--config", str(recipe)], finetune.FINETUNE) == 2
    assert message in capsys.readouterr().err


def test_tokens_whose_rows_would_not_be_trained_are_refused(origin, tmp_path):
    recipe = with_lora(write_recipe(tmp_path, origin, TASK), rank=4)
    with pytest.raises(
        ConfigError, match=r"add_tokens: got \['<tool>'\] with lora, which would leave their rows at the mean"
    ):
        load_finetune_config(str(recipe), ["data.tokenizer.add_tokens=[<tool>]"])


def test_a_pretraining_has_no_such_section(tmp_path):
    recipe = tmp_path / "pretrain.yaml"
    recipe.write_text("run: {name: x}\nmodel: {}\ntrain: {steps: 1, global_batch_size: 1}\nlora: {rank: 8}\n")
    with pytest.raises(ConfigError, match="lora: no such key"):
        load_config(str(recipe), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=4", "lora.rank: was 8, is 4"),
        ("lora.alpha=4.0", "lora.alpha: was 16.0, is 4.0"),
        ("lora.targets=[wq]", "lora.targets: was None, is ['wq']"),
    ],
)
def test_another_section_on_resume_is_refused_key_by_key(change, message, origin, tmp_path, capsys):
    write_lines(tmp_path / "t.jsonl", LINES)
    task = {**TASK, "train": [str(tmp_path / "t.jsonl")]}
    recipe = with_lora(write_recipe(tmp_path, origin, task), rank=8)
    cfg = load_finetune_config(str(recipe), [])
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    assert pretrain.main(["--config", str(recipe), change], finetune.FINETUNE) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=4", "lora.rank: was 8, is 4"),
        ("lora.targets=[wq]", "lora.targets: was None, is ['wq']"),
        ("task.labels=[a, b]", f"task.labels: was {LABELS}, is ['a', 'b']"),
    ],
)
def test_what_gives_other_weights_is_refused_though_it_is_allowed(change, message, origin, tmp_path, capsys):
    write_lines(tmp_path / "t.jsonl", LINES)
    task = {**TASK, "train": [str(tmp_path / "t.jsonl")]}
    recipe = with_lora(write_recipe(tmp_path, origin, task), rank=8)
    cfg = load_finetune_config(str(recipe), [])
    (cfg.run_dir / "checkpoints/step-00000004").mkdir(parents=True)
    (cfg.run_dir / "checkpoints/step-00000004/manifest.json").write_text("{}")
    save_config(cfg)
    allowed = ["--allow-change", "task.labels" if "labels" in change else change.partition("=")[0]]
    assert pretrain.main(["--config", str(recipe), change, *allowed], finetune.FINETUNE) == 2
    said = capsys.readouterr().err
    assert f"whose checkpoints cannot be read into this one:\n  {message}\n" in said
    assert f"or use another run.name, which may begin with what this one has learned: init={cfg.run_dir}\n" in said


def test_a_rank_with_which_most_is_trained_is_told(origin, tmp_path):
    recipe = with_lora(write_recipe(tmp_path, origin, TASK), rank=40)
    for rank, told in ((40, True), (4, False)):
        cfg = load_finetune_config(str(recipe), [f"lora.rank={rank}"])
        with torch.device("meta"):
            parameters = dict(build_model(cfg).named_parameters())
        trained = frozenset(name for name, p in parameters.items() if p.requires_grad)
        warning = told_too_many(cfg, {name: tuple(p.shape) for name, p in parameters.items()}, trained)
        expected = "lora.rank=40 trains 65,424 parameters, more than half of the model's 63,840; lower it, or leave the"
        assert warning.startswith(expected) if told else warning == ""
