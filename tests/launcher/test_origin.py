"""What a fine-tuning begins with is what its origin holds, to the last bit, or the run is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_runs import tune
from transformers import AutoTokenizer

from data.tokenizer import TokenizerConfig, train
from exports import change_config, damage, make_run
from launcher import check as launcher_check
from launcher import export, finetune, prepare, pretrain
from launcher.config import ConfigError, FinetuneConfig, load_config
from launcher.finetune import FINETUNE
from launcher.origin import open_origin
from launcher.origin_config import load_finetune_config
from launcher.origin_weights import match, origin_weights
from launcher.pretrain import build_engine
from launcher.run_dir import save_config
from launcher.saving import resume
from launcher.start import check_run
from launcher.trained import open_checkpoint
from parallel.engine import Engine
from ranks import Alone, run_ranks, whole_state
from runs import run

RECIPE = """
init: {init}
task: {{kind: text}}
run: {{name: tuned, folder: {folder}}}
data: {{corpus: {corpus}, sources: [{{kind: text, paths: [-]}}]}}
optim: {{lr: 1e-3, warmup_steps: 3}}
parallel: {{zero_stage: 1, precision: fp32, timeout_s: 100}}
train: {{steps: 24, global_batch_size: 12, micro_batch_size: 2}}
checkpoint: {{every: 50, keep: 1}}
eval: {{every: 4, windows: 10}}
log: {{every: 1}}
"""


def write_recipe(folder, init, corpus):
    path = folder / "tune.yaml"
    path.write_text(RECIPE.format(init=init, folder=folder / "tuned", corpus=corpus))
    return str(path)


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """A run of a GPT-2, written by two ranks with ZeRO 3 at steps 1 and 2."""
    return make_run(tmp_path_factory.mktemp("runs"), corpus, "gpt2")


@pytest.fixture
def origin(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "origin")


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """Step 1 of the same, as a Hugging Face folder."""
    output = tmp_path_factory.mktemp("hf") / "gpt2"
    assert export.main([str(made), "--output", str(output), "--step", "1"]) == 0
    return output


def refused(capsys, recipe, *overrides, module=finetune):
    command = (FINETUNE,) if module is finetune else ()
    assert pretrain.main(["--config", recipe, *overrides], *command) == 2
    return capsys.readouterr().err


# -- weights ------------------------------------------------------------------------------------------------------------


def begin(mesh, recipe, overrides):
    """What one rank of a fine-tuning holds before its first step: (masters, weights that compute) by name."""
    cfg = load_finetune_config(recipe, overrides)
    initial = origin_weights(cfg, mesh)
    engine = build_engine(cfg, mesh, FINETUNE)
    resume(cfg, engine, initial)
    masters = {name: values for (name, kind), values in whole_state(engine).items() if kind == "weight"}
    moments = max(values.abs().max().item() for (_, kind), values in whole_state(engine).items() if kind != "weight")
    with engine.evaluating() as model:
        loss = model(torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32)).item()
    return masters, moments, loss, initial.told


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.zero_stage=0"]),
        pytest.param(3, ["parallel.zero_stage=2"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.zero_stage=3"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.zero_stage=3", "parallel.precision=bf16", "parallel.offload_param=cpu",
                         "parallel.offload_optimizer=cpu"], marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(2, ["parallel.zero_stage=1", "parallel.precision=bf16"],
                     marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)  # fmt: skip
def test_weights_are_those_of_the_step_that_was_asked_for(ranks, overrides, made, folder, corpus, tmp_path):
    """Not random ones, and not those of the newest checkpoint: DeepSpeed's own loading gives either, without a word.

    Written by two ranks at ZeRO 3, read at another topology, compared with the export of that step.
    """
    recipe = write_recipe(tmp_path, f"{made}@1", corpus)
    expected = open_origin(str(folder))  # the export of step 1
    tokens = torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32)
    with torch.inference_mode():
        loss = open_checkpoint(made, 1).model()(*tokens).item()
    newest = open_checkpoint(made, 2).reader
    for masters, moments, found_loss, told in run_ranks(ranks, begin, recipe, overrides):
        rows = expected.shapes["embed.weight"][0] * expected.shapes["embed.weight"][1]  # export cuts padded rows
        for name, values in masters.items():
            n = rows if name == "embed.weight" else len(values)
            assert torch.equal(values[:n], expected.read(name, 0, n)), name
        assert not torch.equal(masters["embed.weight"], newest.tensor("embed.weight").view(-1))
        assert moments == 0
        assert found_loss == pytest.approx(loss, rel=2e-2 if "parallel.precision=bf16" in overrides else 1e-5)
        assert told[0].startswith(f"loaded {len(masters)} tensors, {sum(map(len, masters.values())):,} numbers, from ")


def test_weights_of_a_hugging_face_folder(folder, corpus, tmp_path):
    """Also where its vocabulary is not that of the run that it came from: 512 of 576 rows."""
    cfg = load_finetune_config(write_recipe(tmp_path, folder, corpus), [])
    initial = origin_weights(cfg, Alone())
    exported = load_file(folder / "model.safetensors")
    assert cfg.model.vocab_size == 512
    assert torch.equal(
        initial.read("embed.weight", (512, 48), 7, 99), exported["transformer.wte.weight"].view(-1)[7:99]
    )
    turned = exported["transformer.h.1.mlp.c_fc.weight"].T.reshape(-1)
    assert torch.equal(initial.read("blocks.1.mlp.w_up.weight", (96, 48), 0, 96 * 48), turned)
    assert f"from {folder}" in initial.told[0]


@pytest.mark.slow
def test_a_load_that_gives_other_weights_is_an_error(made, corpus, tmp_path):
    """What DeepSpeed's module-only load does under ZeRO 3: success is told, and the model keeps what it had."""
    with pytest.raises(Exception, match="the model's .* is not what was loaded, on rank 0; this is a defect"):
        run_ranks(1, begin_without_refresh, write_recipe(tmp_path, f"{made}@1", corpus), ["parallel.precision=bf16"])


def begin_without_refresh(mesh, recipe, overrides):
    Engine._refresh_model = lambda self: None  # type: ignore[method-assign]
    return begin(mesh, recipe, overrides)


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_only_heads_may_be_new_or_dropped(made):
    opened = open_origin(str(made))
    shapes = dict(opened.shapes)
    assert match(shapes, opened) == ([], [])
    assert match(shapes | {"score.weight": (2, 48)}, opened) == (["score.weight"], [])
    for changed, message in [
        (shapes | {"blocks.9.attn.wq.weight": (48, 48)}, "blocks.9.attn.wq.weight has no value in it"),
        ({k: v for k, v in shapes.items() if k != "norm.bias"}, "its norm.bias has no place in the model"),
        (
            shapes | {"norm.bias": (49,)},
            r"its norm.bias is \(48,\), the model's \(49,\)\. A language model begins from one",
        ),
        (
            shapes | {"score.weight": (2, 48), "norm.bias": (49,)},
            r"\(49,\)\. A head for labels begins new from a language",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            match(changed, opened)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.d_ff=64"], "model.d_ff: got 64, and {init} has 96; leave it out"),
        (["model.seq_len=16"], "model.seq_len: got 16, and {init} has 32; leave it out"),
        (["model.dropuot=0.5"], "model.dropuot: no such key; did you mean model.dropout?"),
        (["init=nowhere/x"], "init=nowhere/x is neither a run's folder (with checkpoints/) nor a Hugging Face folder"),
        (["init={init}@7"], "has no checkpoint of step 7; it has: 1, 2"),
        (["task.kind=poem"], "task"),
        (["eval.keep_best=accuracy"], "eval.keep_best=accuracy is nothing that this run measures; it measures loss/valid, "),
        (["eval.patience=2"], "eval: patience=2 needs keep_best, the score that must become better"),
        (["eval.keep_best=loss/valid", "eval.patience=2", "eval.every=0"],
         "eval: patience=2 needs evaluations on the way; set every to more than 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_origin_is_refused(overrides, message, made, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path, made, corpus)
    told = refused(capsys, recipe, *(change.format(init=made) for change in overrides))
    assert message.format(init=made) in told
    assert not (tmp_path / "tuned").exists()


def test_each_command_names_the_other_for_the_other_s_recipe(made, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path, made, corpus)
    assert "has init and task, so it is of a fine-tuning: start it with launcher/finetune.py" in refused(
        capsys, recipe, module=pretrain
    )
    assert "so it is of a pretraining: start it with launcher/pretrain.py" in refused(capsys, "configs/embedded.yaml")
    text = (tmp_path / "tune.yaml").read_text().replace(f"init: {made}\n", "")
    (tmp_path / "tune.yaml").write_text(text)
    assert "init: got None; expected runs/NAME, runs/NAME@STEP or a Hugging Face folder" in refused(capsys, recipe)


def test_a_run_is_judged_before_it_is_queued(made, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path, made, corpus)
    assert launcher_check.main(["--config", recipe, "--ranks", "2", "--write-nothing"]) == 0
    judged = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (judged["command"], judged["finished"]) == ("finetune", False)
    assert launcher_check.main(["--config", recipe, "--ranks", "2", "init=nowhere", "--write-nothing"]) == 2
    assert "init=nowhere is neither a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["made", "folder"])
def test_a_corpus_of_ones_own_is_prepared_with_the_origins_tokenizer(kind, corpus, tmp_path, request, capsys):
    """By the recipe as it stands, and not with another, whatever data.tokenizer says."""
    (tmp_path / "own.txt").write_text("".join(f"Some words of my own, number {i}.\n" for i in range(999)))
    recipe = write_recipe(tmp_path, request.getfixturevalue(kind), tmp_path / "own")
    sources = f"data.sources=[{{kind: text, paths: [{tmp_path}/own.txt]}}]"
    for wrong, told in (
        ("vocab_size=300", "data.tokenizer.vocab_size: got 300, and "),
        ("train_bytes=5", "has one already; leave it out"),
    ):
        assert prepare.main(["--config", recipe, sources, f"data.tokenizer.{wrong}"]) == 2
        assert told in "".join(capsys.readouterr())
    assert prepare.main(["--config", recipe, sources, "data.valid_fraction=0"]) == 0
    cfg = load_finetune_config(recipe, [sources])
    assert check_run(cfg, [], 2, FINETUNE).tokenizer.fingerprint == cfg.origin.tokenizer


def test_a_corpus_of_another_tokenizer_is_refused(origin, corpus, tmp_path, capsys):
    shutil.rmtree(origin / "tokenizer")
    train([([f"other words {i}" for i in range(9999)], 2**16)], origin / "tokenizer",
          TokenizerConfig(vocab_size=280, train_bytes=2**16))  # fmt: skip
    told = refused(capsys, write_recipe(tmp_path, origin, corpus))
    assert f"data.corpus={corpus} has the tokenizer " in told
    assert "to which other ids mean other text; prepare a corpus for it" in told
    assert "A run and its export have two, as they are kept in other files: begin with the one that the corpus" in told


def test_an_origin_may_have_any_number_of_rows_beyond_its_tokenizer(made, corpus, tmp_path):
    """Qwen3's has 267, and 64 does not divide all."""
    cfg = load_finetune_config(write_recipe(tmp_path, made, corpus), [])
    for size in (1000, 512):
        larger = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": size})})
        assert check_run(larger, [], 2, FINETUNE).tokenizer.vocab_size == 512
    fewer = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": 511})})
    with pytest.raises(ConfigError, match="model.vocab_size=511 is smaller than the vocabulary of"):
        check_run(fewer, [], 2, FINETUNE)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def test_a_damaged_origin_is_refused_with_2(origin, folder, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path, origin, corpus)
    damage(origin, 2)
    told = refused(capsys, recipe)  # a flipped bit: all ranks look for it together before the model is built
    assert "step-00000002/rank-00001.safetensors: xxh3 " in told
    assert "name another as init: RUN@STEP" in told
    assert not (tmp_path / "tuned/tuned").exists()
    cut(origin / "checkpoints/step-00000002/rank-00001.safetensors")
    assert "name another as init: RUN@STEP" in refused(capsys, recipe)
    copy = shutil.copytree(folder, tmp_path / "copy")
    cut(copy / "model.safetensors")
    assert "model.safetensors cannot be read" in refused(capsys, recipe, f"init={copy}")
    (copy / "model.safetensors").unlink()
    assert (
        "has no weights, neither model.safetensors nor model.safetensors.index.json; fetch the folder whole"
        in refused(capsys, recipe, f"init={copy}")
    )


def test_a_folder_that_is_not_what_it_says_is_refused(folder, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path, tmp_path / "copy", corpus)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"n_inner": 95}))
    assert "size mismatch for blocks.0.mlp.w_" in refused(capsys, recipe)
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "m.M"}}))
    assert "demands code of its own (auto_map), which is never run" in refused(capsys, recipe)
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert "missing ['transformer.ln_f.bias']" in refused(capsys, recipe)
    assert "has no steps; leave @3 out" in refused(capsys, recipe, f"init={copy}@3")


def test_an_origin_that_changes_before_the_start_is_refused(origin, corpus, tmp_path):
    cfg = load_finetune_config(write_recipe(tmp_path, origin, corpus), [])
    change_config(origin, 2, run={"seed": 9})
    with pytest.raises(ConfigError, match="is not the one that the run names: its digest is"):
        origin_weights(cfg, Alone())


# -- config -----------------------------------------------------------------------------------------------------------------


def test_a_run_that_has_begun_needs_its_origin_no_more(origin, corpus, tmp_path):
    recipe = write_recipe(tmp_path, origin, corpus)
    cfg = load_finetune_config(recipe, ["model.dropout=0.25"])
    assert isinstance(cfg, FinetuneConfig)
    assert (cfg.model.dropout, cfg.origin.model.dropout, cfg.origin.step) == (0.25, 0.1, 2)
    assert cfg.data.tokenizer.path == str(origin / "tokenizer")
    check_run(cfg, [], 2, FINETUNE)
    cfg.run_dir.mkdir(parents=True)
    save_config(cfg)
    shutil.rmtree(origin)
    assert load_finetune_config(recipe, ["model.dropout=0.25"]) == cfg
    assert load_finetune_config(str(cfg.run_dir / "config.yaml"), []) == cfg
    with pytest.raises(ConfigError, match="is neither a run's folder"):
        load_finetune_config(recipe, [f"init={origin}@1"])


def test_a_recipe_of_a_pretraining_is_read_as_before():
    assert not isinstance(load_config("configs/embedded.yaml", []), FinetuneConfig)


def test_a_model_of_the_hub_comes_from_the_cache_or_is_told_to_be_missing(folder, monkeypatch, tmp_path):
    asked = []

    def cached(repository, *, revision, allow_patterns, local_files_only):
        asked.append((repository, revision, local_files_only))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("model.hf_folder.snapshot_download", cached)
    assert open_origin("hf://org/name@v2").digest == open_origin(str(folder)).digest
    assert asked == [("org/name", "v2", True)]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match="init: hf://org/name cannot be had: .*hf download org/name --local-dir FOLDER"
    ):
        open_origin("hf://org/name")
    with pytest.raises(ConfigError, match="init: hf://a/b/c cannot be had"):
        open_origin("hf://a/b/c")


# -- a vocabulary that grows ----------------------------------------------------------------------------------------------


ADD = "data.tokenizer.add_tokens=['<tool>', '</tool>']"


def grown_weights(masters, rows, told, opened):
    """Old rows are the origin's; the two new ones are the mean of those that have a token."""
    old = opened.read("embed.weight", 0, 576 * 48).view(576, 48)
    assert masters.shape == (rows, 48)
    assert torch.equal(masters[:512], old[:512])
    mean = old[:512].double().mean(0).float()
    assert torch.equal(masters[512], masters[513])
    assert torch.allclose(masters[512], mean, rtol=0, atol=1e-7)
    assert torch.equal(masters[514:576], old[514:576])  # padding stays
    assert "grown: rows 512 to 513 of embed.weight are the mean of those before, for '<tool>', '</tool>'" in told


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 0), pytest.param(2, 3, marks=[pytest.mark.slow, pytest.mark.long])]
)  # the reads of each are those of ranges
def test_new_tokens_begin_as_the_mean_of_the_old(ranks, stage, made, corpus, tmp_path):
    recipe = write_recipe(tmp_path, f"{made}@2", corpus)
    overrides = [ADD, f"parallel.zero_stage={stage}"]
    cfg = load_finetune_config(recipe, overrides)
    assert cfg.model.vocab_size == cfg.origin.model.vocab_size == 576  # rows that were padding are used first
    assert cfg.data.tokenizer.vocab_size == 514
    for masters, moments, _, told in run_ranks(ranks, begin, recipe, overrides):
        assert moments == 0
        grown_weights(masters["embed.weight"].view(-1, 48), 576, "\n".join(told), open_origin(str(made), 2))


def test_any_range_of_a_grown_weight_reads_alike(folder, corpus, tmp_path):
    """Of a folder without padding, whose weights get more rows."""
    cfg = load_finetune_config(write_recipe(tmp_path, folder, corpus), [ADD])
    assert cfg.model.vocab_size == 514
    initial = origin_weights(cfg, Alone())
    shape = (514, 48)
    whole = initial.read("embed.weight", shape, 0, 514 * 48)
    for start, stop in [
        (0, 10),
        (512 * 48 - 5, 512 * 48 + 5),
        (512 * 48 + 7, 513 * 48 + 9),
        (5, 5),
        (513 * 48, 514 * 48),
    ]:
        assert torch.equal(initial.read("embed.weight", shape, start, stop), whole[start:stop])
    assert torch.equal(whole[: 512 * 48], open_origin(str(folder)).read("embed.weight", 0, 512 * 48))


@pytest.mark.slow
def test_a_grown_run_is_tuned_exported_and_grown_no_more(made, corpus, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("".join(f"<tool>{i}</tool> of my own.\n" for i in range(999)))
    recipe = write_recipe(tmp_path, f"{made}@2", tmp_path / "own")
    own = [f"data.sources=[{{kind: text, paths: [{tmp_path}/own.txt]}}]", "data.valid_fraction=0", "train.steps=4"]
    assert "data.corpus=" in refused(capsys, write_recipe(tmp_path, f"{made}@2", corpus), ADD)
    recipe = write_recipe(tmp_path, f"{made}@2", tmp_path / "own")
    assert prepare.main(["--config", recipe, ADD, *own]) == 0
    run(tune(1, "--config", recipe, ADD, *own), tmp_path / "log")
    run_dir = tmp_path / "tuned/tuned"
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("a<tool>1").input_ids == open_checkpoint(run_dir, None).tokenizer().encode("a<tool>1").tolist()
    assert load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"].shape == (514, 48)
    capsys.readouterr()
    told = refused(capsys, recipe, *own)
    assert "data.tokenizer.add_tokens: got [], and the run began with ['<tool>', '</tool>']" in told


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("[' a']", "data.tokenizer: add_tokens has ' a'; expected each token once, without spaces around it"),
        ("['<a>', '<a>']", "data.tokenizer: add_tokens has '<a>'; expected each token once"),
        ("[3]", "data.tokenizer.add_tokens.0: got 3; input should be a valid string"),
        ("['def']", "data.tokenizer.add_tokens: 'def' is a token of "),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message, made, corpus, tmp_path, capsys):
    assert message in refused(capsys, write_recipe(tmp_path, made, corpus), f"data.tokenizer.add_tokens={tokens}")
