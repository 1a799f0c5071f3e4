"""A Hugging Face folder becomes step 0 of a run: the same weights, to go on from with a recipe of one's own."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_runs import make_bert
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertForPreTraining, BertModel

from exports import contents, make_run
from launcher import evaluate, export, import_hf, prepare, pretrain
from launcher.config import load_config
from launcher.pretrain import build_engine
from launcher.run_dir import Ledger
from launcher.saving import never_saved, resume
from launcher.start import check_run
from launcher.trained import open_checkpoint
from parallel import step_zero
from parallel.checkpoint import committed_steps, folder_name
from ranks import Alone, run_ranks, whole_state
from runs import losses, run, torchrun

RECIPE = """
run: {{folder: {folder}, name: more}}
data: {{corpus: {corpus}, sources: [{{kind: text, paths: [-]}}]}}
optim: {{lr: 1e-3, warmup_steps: 1}}
parallel: {{zero_stage: 1, precision: fp32, timeout_s: 60}}
train: {{steps: 4, global_batch_size: 4, micro_batch_size: 2}}
log: {{every: 1}}
eval: {{every: 4, windows: 4}}
"""
TEXTS = ["to be or not to be , that is the question", "the rest is silence"] * 20


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """family -> a folder of it, exported from a run."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("hf") / family
            run_dir = make_run(tmp_path_factory.mktemp("runs"), corpus, family)
            assert export.main([str(run_dir), "--output", str(made[family])]) == 0
        return made[family]

    return get


@pytest.fixture(autouse=True)
def short_proof(monkeypatch):
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    monkeypatch.setattr(export, "PROOF_TOKENS", 256)


@pytest.fixture
def recipe(tmp_path, corpus):
    path = tmp_path / "more.yaml"
    path.write_text(RECIPE.format(folder=tmp_path / "runs", corpus=corpus))
    return path


@pytest.fixture
def refused(recipe, tmp_path, capsys):
    def refuse(place, *overrides):
        assert import_hf.main([str(place), "--config", str(recipe), *overrides]) == 2
        assert not list(tmp_path.glob("runs/*")), "something is half-written"
        return capsys.readouterr().err

    return refuse


def bring_in(folder, recipe, *overrides):
    assert import_hf.main([str(folder), "--config", str(recipe), *overrides]) == 0
    return recipe.parent / "runs/more"


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
def test_a_masked_model_comes_in_without_its_other_heads(kind, recipe, tmp_path, capsys):
    folder = make_bert(tmp_path / "bert", TEXTS, kind)
    run_dir = bring_in(folder, recipe, "data.masking={}")
    told = capsys.readouterr().out
    assert ("dropped: bert.pooler.dense.bias" in told) == (kind is BertForPreTraining)
    weights = load_file(folder / "model.safetensors")
    model = open_checkpoint(run_dir, None).model()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_masked_model_without_its_head_is_refused(refused, tmp_path):
    folder = make_bert(tmp_path / "bert", TEXTS, BertModel)
    assert "cls.predictions.bias has no value in it" in refused(folder, "data.masking={}")


# -- what comes in goes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=[pytest.mark.slow, pytest.mark.long]), "llama"])
def test_export_gives_the_folder_back(family, folders, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_zero, "FILE_BYTES", 40_000)  # several files
    run_dir = bring_in(folders(family), recipe)
    assert f"deepspeed launcher/pretrain.py --config {run_dir}/config.yaml" in capsys.readouterr().out
    assert not (tmp_path / "runs/more.importing").exists()
    assert len(list((run_dir / "checkpoints" / folder_name(0)).glob("weights-*.safetensors"))) > 2
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    before, after = load_file(folders(family) / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    card = (tmp_path / "out/README.md").read_text()
    assert f"pretrained from the weights of `{family}` (digest " in card
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folders(family))(tokens).logits
        ours = open_checkpoint(run_dir, None).model()(tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def own_corpus(folder):
    """Overrides for a corpus of one's own, of 40 documents."""
    for i in range(40):
        (folder / f"own-{i}.txt").write_text("".join(f"def number_{i}(x):\n    return x + {j}\n" for j in range(50)))
    return [f"data.sources=[{{kind: text, paths: ['{folder}/own-*.txt']}}]", f"data.corpus={folder}/own",
            "data.valid_fraction=0.2"]  # fmt: skip


def begin(mesh, config, overrides):
    """What one rank of the run's first start holds: masters, the largest moment, what the loop is told."""
    cfg = load_config(config, overrides)
    assert not never_saved(cfg, mesh)
    engine = build_engine(cfg, mesh)
    progress, cursor = resume(cfg, engine, None)
    state = whole_state(engine)
    moment = max(values.abs().max().item() for (_, kind), values in state.items() if kind != "weight")
    return {name: values for (name, kind), values in state.items() if kind == "weight"}, moment, progress.step, cursor


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_start_has_its_weights_and_no_moments(ranks, stage, folders, recipe):
    run_dir = bring_in(folders("llama"), recipe)
    reader = open_checkpoint(run_dir, 0).reader
    for weights, moment, step, cursor in run_ranks(
        ranks, begin, str(run_dir / "config.yaml"), [f"parallel.zero_stage={stage}"]
    ):
        assert (moment, step, cursor) == (0, 0, None)
        for name, values in weights.items():
            assert torch.equal(values, reader.tensor(name).view(-1)), name


@pytest.mark.slow
@pytest.mark.long  # three starts of two ranks
def test_pretraining_goes_on_from_it_without_the_folder(folders, recipe, tmp_path, capsys):
    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    run_dir = bring_in(folder, recipe, *own_corpus(tmp_path))
    shutil.rmtree(folder)
    assert prepare.main(["--config", str(run_dir / "config.yaml")]) == 0
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--json"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert before["step"] == 0
    config = run_dir / "config.yaml"
    text = run(torchrun(2, "--config", config, "train.stop_at=2"), tmp_path / "log", code=1)  # torchrun's
    assert f"begun with the weights of {run_dir}/checkpoints/step-00000000" in text
    run(torchrun(2, "--config", config, "train.stop_at=null"), tmp_path / "log")  # it is in config.yaml now
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    # drawn weights give ln(512) = 6.24; the origin's two steps at a high rate give something else
    assert losses(run_dir)[1] == pytest.approx(before["overall"]["loss"], abs=0.2)
    assert committed_steps(run_dir / "checkpoints")[-1] == 4
    assert [event["step"] for event in Ledger(run_dir).events() if event["event"] == "start"] == [0, 2]


def test_its_vocabulary_grows_where_the_recipe_adds_tokens(folders, recipe, capsys):
    run_dir = bring_in(folders("llama"), recipe, "data.tokenizer.add_tokens=['<tool>']")
    assert "grown: rows 512 to 512 of embed.weight and head.weight are the mean" in capsys.readouterr().out
    found = open_checkpoint(run_dir, 0)
    assert found.cfg.model.vocab_size == found.tokenizer().vocab_size == 513
    assert found.cfg.data.tokenizer.add_tokens is None  # the run's own tokenizer has them
    for name in ("embed.weight", "head.weight"):
        rows = found.reader.tensor(name)
        assert torch.allclose(rows[512], rows[:512].mean(0), rtol=0, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_an_import_that_lost_its_checkpoint_is_not_begun_with_drawn_weights(folders, recipe):
    run_dir = bring_in(folders("llama"), recipe)
    shutil.rmtree(run_dir / "checkpoints")
    assert not never_saved(load_config(str(run_dir / "config.yaml"), []), Alone())


def test_text_of_another_tokenizer_is_refused(folders, recipe, tmp_path):
    run_dir = bring_in(folders("llama"), recipe)
    cfg = load_config(str(run_dir / "config.yaml"), [])
    with pytest.raises(ValueError, match=r"has the tokenizer .*, the run has .* prepare a corpus for it"):
        # the corpus has SentencePiece's own file, the folder a tokenizer.json of the same pieces
        check_run(cfg, [], 2, pretrain.PRETRAIN)
    config, overrides = str(run_dir / "config.yaml"), own_corpus(tmp_path)
    assert prepare.main(["--config", config, *overrides]) == 0
    check_run(load_config(config, overrides), ["data.sources"], 2, pretrain.PRETRAIN)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_ff=64", "model.d_ff: got 64, and {folder} has 96; leave it out"),
        ("data.tokenizer.vocab_size=300", "data.tokenizer.vocab_size: got 300, and {folder} has 512; leave it out"),
        ("init=x", "so it is of a fine-tuning, which begins with a folder by itself"),
        ("train.stepss=3", "train.stepss: no such key; did you mean train.steps?"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(override, message, folders, refused):
    assert message.format(folder=folders("llama")) in refused(folders("llama"), override)


def test_a_folder_that_cannot_be_used_is_refused(folders, refused, tmp_path):
    copy = shutil.copytree(folders("llama"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "m.M"}}))
    assert "demands code of its own (auto_map), which is never run" in refused(copy)
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    assert "size mismatch for embed.weight" in refused(copy)
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    small = {k: v[:500] if "embed" in k or "head" in k else v for k, v in tensors.items()}
    save_file(small, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    assert "has 512 ids, its config.json says vocab_size=500; they are not of one model" in refused(copy)
    (copy / "config.json").write_text(json.dumps(config))
    broken = dict(tensors) | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], torch.nan)}
    save_file(broken, copy / "model.safetensors", {"format": "pt"})
    assert "norm.weight is not finite" in refused(copy)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-8])
    assert "model.safetensors cannot be read" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "has no weights" in refused(copy)


def test_what_is_no_folder_of_theirs_is_refused(folders, refused, recipe, tmp_path, capsys):
    assert "nowhere is no Hugging Face folder, as it has no config.json" in refused("nowhere")
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    assert "it is a run's folder: go on from it by its own recipe, or name it as init" in refused(tmp_path / "other")
    run_dir = bring_in(folders("llama"), recipe)
    before = contents(run_dir)
    assert import_hf.main([str(folders("llama")), "--config", str(recipe)]) == 2
    assert "nothing is overwritten: choose another run.name" in capsys.readouterr().err
    assert contents(run_dir) == before
