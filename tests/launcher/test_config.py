"""Everything that can be wrong with a recipe is said at once, with the key, the value and what was expected."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from launcher.config import ConfigError, OriginConfig, contradictions, load_config, to_yaml
from launcher.origin_config import load_finetune_config
from launcher.start import refuse_other_config
from launcher.trained import build_model
from model.network import build_network
from parallel.deepspeed_config import check_passthrough

RECIPES = sorted(Path("configs").glob("*.yaml"))
FINETUNE_RECIPES = sorted(Path("configs/finetune").glob("*.yaml"))

GOOD = """
run: {name: x}
model: {vocab_size: 512, seq_len: 32, d_model: 32, n_layers: 2, n_heads: 4, d_ff: 64}
train: {steps: 1000, global_batch_size: 8}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads_and_its_model_can_be_built(path):
    cfg = load_config(str(path), [])
    assert check_passthrough(cfg.parallel) == []
    with torch.device("meta"):
        model = build_network(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == cfg.model.n_params


def test_the_recipes_are_found():
    assert len(RECIPES) >= 9
    assert len(FINETUNE_RECIPES) >= 2


@pytest.mark.parametrize("path", FINETUNE_RECIPES, ids=lambda p: p.name)
def test_every_fine_tuning_recipe_loads_and_its_model_can_be_built(path, monkeypatch):
    """With the run that `make pretrain` leaves in the place of whatever it begins with."""
    model = load_config("configs/embedded.yaml", []).model
    identity = OriginConfig(step=600, digest="", tokenizer="", model=model)
    tokenizer = SimpleNamespace(folder=Path("runs/embedded/tokenizer"), vocab_size=4096)
    origin = SimpleNamespace(identity=lambda: identity, tokenizer=tokenizer)
    monkeypatch.setattr("launcher.origin_config.open_origin", lambda init, step: origin)
    cfg = load_finetune_config(str(path), [f"run.folder={path}"])  # where no run is
    assert cfg.data.tokenizer.path == "runs/embedded/tokenizer"
    assert cfg.init.startswith("runs/")
    with torch.device("meta"):
        build_model(cfg)


def test_the_resolved_config_loads_as_itself(recipe, tmp_path):
    cfg = load_config(recipe, ["optim.lr=1e-4", "eval.prompts=['a: b', 'ü']"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_config(str(saved), []) == cfg


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"optim.lrr: no such key; did you mean optim.lr\?"),
        (["train.lr=1"], r"train.lr: no such key; did you mean optim.lr\?"),
        (["trian.steps=1"], r"trian: no such key; did you mean train\?"),
        (["model.d_modell=1"], r"model.d_modell: no such key; did you mean model.d_model\?"),
        (["data.tokenizer.vocab=300"], r"data.tokenizer.vocab: no such key; did you mean data.tokenizer.vocab_size\?"),
        (
            ["train.stop_at=1001"],
            "train: stop_at=1001 is behind the run's last step, steps=1000; leave it out, or make it smaller",
        ),
        (["train.stop_at=0"], "train.stop_at: got 0; input should be greater than 0"),
        (["optim.lr=fast"], "optim.lr: got 'fast'; input should be a valid number"),
        (["optim.lr=-1"], "optim.lr: got -1; input should be greater than 0"),
        (["optim.lr=.nan"], "optim.lr: got nan; input should be a finite number"),
        (["optim.lr=.inf"], "optim.lr: got inf; input should be a finite number"),
        (["optim.lr=true"], "optim.lr: got True; input should be a valid number"),
        (["train.steps=0"], "train.steps: got 0; input should be greater than 0"),
        (["train.steps=1.5"], "train.steps: got 1.5; input should be a valid integer"),
        (["train.steps='10'"], "train.steps: got '10'; input should be a valid integer"),
        (["train.steps=true"], "train.steps: got True; input should be a valid integer"),
        (["parallel.zero_stage=4"], "parallel.zero_stage: got 4; input should be 0, 1, 2 or 3"),
        (["parallel.precision=fp8"], "parallel.precision: got 'fp8'; input should be 'bf16', 'fp32' or 'fp16'"),
        (["run.name=../x"], r"run.name: got '../x'; string should match pattern"),
        (["train.tokens_per_step=64"], "train: global_batch_size=8 and tokens_per_step=64; give exactly one of the two"),
        (["train.global_batch_size=null"], "global_batch_size=None and tokens_per_step=None; give exactly one"),
        (
            ["train.global_batch_size=null", "train.tokens_per_step=100"],
            "train.tokens_per_step=100 is no multiple of model.seq_len=32; the nearest are 96 and 128",
        ),
        (["optim.warmup_steps=2000"], "optim.warmup_steps=2000 and .* do not fit into train.steps=1000; make them at most"),
        (["optim.schedule=wsd"], "schedule=wsd with decay_steps=0; wsd needs decay_steps of at least 1"),
        (["optim.decay_steps=5"], "schedule=cosine with decay_steps=5"),
        (
            ["parallel.grad_accum_dtype=fp32", "parallel.zero_stage=0"],
            "grad_accum_dtype=fp32 with precision=bf16 needs parallel.zero_stage 1, 2 or 3",
        ),
        (
            ["parallel.zero_stage=0", "parallel.precision=fp16"],
            "parallel: precision=fp16 with zero_stage=0: .* that it never applied, .*; use zero_stage 1, 2 or 3",
        ),
        (["parallel.grad_accum_dtype=fp16"], "grad_accum_dtype=fp16 with precision=bf16; use fp32 or bf16"),
        (
            ["parallel.offload_optimizer=cpu", "parallel.zero_stage=0"],
            "parallel: offload_optimizer=cpu with zero_stage=0; .* set parallel.zero_stage to one of them",
        ),
        (
            ["parallel.offload_param=cpu", "parallel.zero_stage=2"],
            "parallel: offload_param=cpu with zero_stage=2; .* set parallel.zero_stage to 3, or offload_param to none",
        ),
        (["parallel.offload_optimizer=nvme"], "parallel.offload_optimizer: got 'nvme'; checkpoints are written .*; use cpu"),
        (["parallel.offload_param=nvme"], "parallel.offload_param: got 'nvme'; checkpoints are written .*; use cpu"),
        (["parallel.offload_param=disk"], "parallel.offload_param: got 'disk'; input should be 'none' or 'cpu'"),
        (["model.n_kv_heads=3"], "model.n_heads=4 is not a multiple of model.n_kv_heads=3"),
        (["run.name=null"], "run.name: got None; input should be a valid string"),
        (["train.steps"], "'train.steps': expected section.key=value, for example train.steps=100"),
        (["steps=3"], "'steps=3': expected section.key=value"),
        (["train.steps.x=3"], "'train.steps.x=3': steps is 1000, not a section"),
        (["train.bad_steps.sigma=0"], "train.bad_steps.sigma: got 0; input should be greater than 0"),
        (["train.bad_steps.not_finite=log"], "not_finite: got 'log'; input should be 'skip' or 'rewind'"),
        (
            ["train.bad_steps.grad_spike=rewind", "data.stream={tokenizer: x, lanes: 4, dataset: x}"],
            "train.bad_steps: got rewind with data.stream; raw text that was read cannot be left out",
        ),
        (
            ["train.bad_steps.not_finite=rewind", "parallel.precision=fp16"],
            "train.bad_steps.not_finite: got rewind with parallel.precision=fp16; there gradients overflow by design",
        ),
        (["optim.lr=[1"], r"optim.lr=\[1: not YAML"),
    ],
)  # fmt: skip
@pytest.mark.fault(43)
def test_what_is_wrong_is_said(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.corpus=[https://me:hunter2@host", r"data.corpus=\[https://\*\*\*@host: not YAML: .* at line 1, column"),
        ("data.cache.options={secret: hunter2", r"data.cache.options=\*\*\*: not YAML: expected ',' or '}', but got"),
        ("data.sources=[{kind: texts, storage_options: {secret: hunter2}}]", "0.kind: got 'texts'; did you mean text[?] ex"),
        ("data.sources=[{paths: hunter2}]", "data.sources.0.kind: missing; it has no default"),
        ("data.sources={corpus: hunter2}", "data.sources: got a mapping; input should be a valid list"),
        ("data.sources=[{kind: text, paths: [s3://b/a], storage_options: {secret: [hunter2]}}]", "got a list; input should"),
        ("data.sources=[{kind: text, paths: [s3://b/a], storage_options: {secret: 1.5}}]", r"got \*\*\*; input should be a"),
        ("data.sources=[{kind: text, paths: [s3://b/a], storage_options: {secret: hunter2}}]", "storage_options has secret"),
        ("data.cache.options={secret: hunter2}", "data.cache.options has secret, which would be saved with the run; give"),
        ("run.name=https://me:hunter2@host", r"run.name: got 'https://\*\*\*@host'; string should match"),
        ("run.name=https://host?sig=hunter2", r"run.name: got 'https://host\?\*\*\*'; string should match"),
        ("data.{https://me:hunter2@host}=1", r"@host}: no such key"),
        ("https://me:hunter2@host/x", r"'https://\*\*\*@host/x': expected section.key=value"),
        ("https://me:hunter2@host/x?token=hunter2", r"'https://\*\*\*@host/x\?\*\*\*': expected section.key=value"),
        ("https://me:hunter2@host=token", r"'https://\*\*\*@host=\*\*\*': expected section.key=value"),
    ],
)  # fmt: skip
@pytest.mark.fault(53)
def test_credentials_are_not_shown(recipe, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(recipe, [override])
    assert "hunter2" not in str(error.value)


def test_a_section_that_is_none_is_not_shown_where_it_is_an_option(recipe, tmp_path):
    for text, key, got in (("{folder: 'https://me:hunter2@host'}", "folder", r"'https://\*\*\*@host'"),
                           ("{options: {secret: hunter2}}", "options.secret", r"\*\*\*")):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"is {got}, not a section") as error:
            load_config(recipe, [f"data.cache={text}", f"data.cache.{key}.x=1"])
        assert "hunter2" not in str(error.value)


@pytest.mark.fault(43)
def test_all_errors_come_at_once(recipe):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, ["optim.lr=-1", "train.stepz=3", "model.d_model=x", "checkpoint.every=0"])
    for key in ("optim.lr", "train.stepz", "model.d_model", "checkpoint.every"):
        assert re.search(rf"^  {key}: ", str(error.value), re.MULTILINE), key
    assert "4 wrong" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: x}\nrun: {name: y}\n", "the key 'run' is given twice"),
        ("- a\n- b\n", "expected sections such as run:, model:, train:; got list"),
        ("run: [", "r.yaml: not YAML: .* at line 1, column 7"),
        ("data: {corpus: 'https://me:hunter2@host\n", r"^(?!.*hunter2).*: not YAML: .* at line \d"),
        ("run: \0", "not YAML: unacceptable character"),
        ("run: !!python/object/apply:os.system ['true']\n", "not YAML: could not determine a constructor"),
        ("run: {name: x}\n", "model: missing; it has no default"),
    ],
)
@pytest.mark.fault(43)
def test_a_broken_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path), [])


@pytest.mark.fault(43)
def test_a_missing_recipe_lists_those_that_exist(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot read the recipe .*none.yaml: .*here: configs/.*, configs/finetune/chat.yaml"
    ):
        load_config(str(tmp_path / "none.yaml"), [])


def test_floats_are_read_as_yaml_1_2_has_them(recipe):
    cfg = load_config(recipe, ["optim.lr=1e-4", "optim.eps=1E-9", "optim.weight_decay=0"])
    assert (cfg.optim.lr, cfg.optim.eps, cfg.optim.weight_decay) == (1e-4, 1e-9, 0.0)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "accum"), [(8, 1, 8, 1), (8, 2, 2, 2), (512, 4, 64, 2), (24, 2, 3, 4)]
)
def test_accumulation_is_derived(recipe, batch, micro, ranks, accum):
    cfg = load_config(recipe, [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"])
    assert cfg.grad_accum_steps(ranks) == accum


@pytest.mark.fault(39, 43)
def test_a_batch_that_does_not_divide_names_the_two_nearest(recipe):
    cfg = load_config(recipe, ["train.global_batch_size=10", "train.micro_batch_size=2"])
    with pytest.raises(
        ConfigError, match=r"micro_batch_size=2 on 3 ranks; the nearest .* 6 \(192 tokens\) and 12 \(384"
    ):
        cfg.grad_accum_steps(3)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (24, 2, 5, r"numbers of ranks that do are 4 and 6$"),
        (24, 5, 4, r"micro_batch_size that do are 3 and 6$"),
        (12, 4, 4, r"on 4 ranks; .* are 16 .*; the nearest numbers of ranks that do are 3; .* that do are 3$"),
        (7, 2, 3, r"are 6 \(192 tokens\) and 12 \(384 tokens\)$"),
    ],
)  # fmt: skip
@pytest.mark.fault(39, 43)
def test_a_topology_that_does_not_divide_the_batch_names_those_that_do(recipe, batch, micro, ranks, message):
    cfg = load_config(recipe, [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"])
    with pytest.raises(ConfigError, match=message):
        cfg.grad_accum_steps(ranks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{gradient_clipp1ng: 1}", "parallel.deepspeed.gradient_clipp1ng: DeepSpeed has no such key"),
        ("{wall_clock_breakdwn: true}", r"DeepSpeed has no such key; did you mean wall_clock_breakdown\?"),
        ("{gradient_clipping: 1.0}", "this key is Longhaul's; set optim.grad_clip instead"),
        ("{train_batch_size: 8}", "this key is Longhaul's; set train.global_batch_size instead"),
        ("{zero_optimization: {stage: 3}}", "zero_optimization.stage: this key is Longhaul's; set parallel.zero_stage"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", "set parallel.offload_optimizer instead"),
        ("{zero_optimization: {cpu_offload_param: true}}", "set parallel.offload_param instead"),
        ("{zero_force_ds_cpu_optimizer: true}", "set nothing: offloaded state is updated by Longhaul's own AdamW"),
        ("{zero_optimization: {overlap_com: true}}", r"no such key; did you mean overlap_comm\?"),
        ("{zero_optimization: {reduce_bucket_size: -1}}", "reduce_bucket_size: got -1; Input should be greater than 0"),
        ("{zero_optimization: 3}", "got 3; expected a mapping"),
        ("{log_level: .nan}", "only what JSON can hold may be passed on"),
    ],
)
@pytest.mark.fault(43)
def test_deepspeed_keys_are_checked(recipe, given, message):
    cfg = load_config(recipe, [f"parallel.deepspeed={given}"])
    assert re.search(message, "\n".join(check_passthrough(cfg.parallel))), check_passthrough(cfg.parallel)


def test_good_deepspeed_keys_pass(recipe):
    cfg = load_config(
        recipe,
        ["parallel.deepspeed={wall_clock_breakdown: true, zero_optimization: {stage3_max_live_parameters: 1000}}"],
    )
    assert check_passthrough(cfg.parallel) == []


def test_a_resumed_run_may_change_where_it_runs_and_not_what_it_computes(recipe):
    old = load_config(recipe, []).model_dump(mode="json")

    def changed(*overrides, allowed=()):
        return contradictions(old, load_config(recipe, list(overrides)).model_dump(mode="json"), list(allowed))

    free = ["parallel.zero_stage=3", "train.micro_batch_size=4", "log.every=1", "checkpoint.every=7", "eval.windows=3"]
    assert changed(*free) == []
    stream = "data.stream={dataset: json, data_files: [a], tokenizer: t}"
    one, other = (
        load_config(recipe, [stream, *changes]).model_dump(mode="json")
        for changes in ([], ["data.stream.workers=3", "data.stream.lanes=4"])
    )
    assert contradictions(one, other, []) == ["data.stream.lanes: was 8, is 4"]
    assert changed("optim.lr=1.0") == ["optim.lr: was 0.0003, is 1.0"]
    assert changed("optim.lr=1.0", "model.d_ff=96") == ["model.d_ff: was 64, is 96", "optim.lr: was 0.0003, is 1.0"]
    assert changed("optim.lr=1.0", allowed=["optim.lr"]) == []
    assert changed("data.sources=[{kind: embedded, weight: 2.0}]") == [
        "data.sources.embedded.weight: was 'its size', is 2.0"
    ]
    assert changed("data.sources=[{kind: text, name: embedded, paths: [elsewhere]}]") == []  # its content decides
    more = "data.sources=[{kind: embedded, weight: 2.0}, {kind: text, weight: 1.0, paths: [a]}]"
    assert changed(more)[1] == "data.sources.text.weight: was None, is 1.0"
    assert changed("data.sources=[{kind: embedded}, {kind: text, paths: [a]}]") == [
        "data.sources.text.weight: was None, is 'its size'"
    ]
    assert changed(more, allowed=["data.sources"]) == []
    assert changed("data.skip=[{steps: [3, 4]}]") == ["data.skip: was [], is [{'steps': [3, 4], 'samples': None, "
                                                      "'source': None, 'shard': None, 'documents': None}]"]  # fmt: skip
    assert changed("train.global_batch_size=16") == ["train.global_batch_size: was 8, is 16"]


def test_the_saved_config_is_plain_yaml(recipe):
    assert yaml.safe_load(to_yaml(load_config(recipe, [])))["optim"]["lr"] == 0.0003


def test_a_run_from_before_a_key_goes_on(tmp_path):
    """Its config.yaml has none of the keys that came since; nobody asked for what they say."""
    cfg = load_config("configs/embedded.yaml", [f"run.folder={tmp_path}"])
    saved = cfg.model_dump(mode="json")
    for key in ("mask_token", "add_tokens"):
        del saved["data"]["tokenizer"][key]
    del saved["data"]["masking"]
    cfg.run_dir.mkdir()
    (cfg.run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    refuse_other_config(cfg, [])
