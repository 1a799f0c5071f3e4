"""Masked language models end to end: training that stops and goes on, evaluation, export, and what is refused."""

import json

import pytest
import torch
from masked_runs import make_corpus, write_recipe
from task_runs import make_bert
from task_runs import write_recipe as write_tuning
from transformers import AutoModelForMaskedLM, pipeline

from launcher import evaluate, export, generate, label, prepare, pretrain
from launcher.config import ConfigError, load_config
from launcher.trained import load_trained, open_checkpoint
from runs import assert_same_state, kill, losses, metrics, run, start, torchrun, wait_for_step


@pytest.fixture(scope="module")
def masked_corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def straight(masked_corpus, tmp_path_factory):
    """A run on two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    run(torchrun(2, "--config", write_recipe(folder, masked_corpus)), folder / "log")
    return folder / "runs/bert"


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_resumed_equals_never_stopped(straight, masked_corpus, tmp_path):
    """Dropout on, blocks recomputed, documents apart."""
    recipe = write_recipe(tmp_path, masked_corpus)
    command = torchrun(2, "--config", recipe)
    process = start(command, tmp_path / "log")
    wait_for_step(tmp_path / "runs/bert", 7, process)
    kill(recipe, process)
    assert "resumed from" in run(command, tmp_path / "log")
    assert losses(tmp_path / "runs/bert") == losses(straight)
    assert_same_state(tmp_path / "runs/bert", straight)
    held_out = [
        [m["loss/valid"] for m in metrics(folder) if "loss/valid" in m] for folder in (straight, tmp_path / "runs/bert")
    ]
    assert held_out[0][-1] == held_out[1][-1] < held_out[0][0]


@pytest.mark.slow
@pytest.mark.long
def test_one_rank_and_two_have_the_same_losses(masked_corpus, tmp_path):
    """1e-6: sums over ranks and micro-batches are taken in another order."""
    found = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        recipe = write_recipe(tmp_path / str(ranks), masked_corpus)
        still = [
            "model.config.hidden_dropout_prob=0.0",
            "model.config.attention_probs_dropout_prob=0.0",
            "train.steps=5",
        ]
        run(torchrun(ranks, "--config", recipe, *still), tmp_path / "log")
        values = [m for m in metrics(recipe.parent / "runs/bert") if "loss/valid" in m or "loss/train" in m]
        found.append([value for m in values for key, value in m.items() if key in ("loss/train", "loss/valid")])
        assert "loss/valid_perplexity" in values[-1]
        assert "loss/valid_bits_per_byte" not in values[-1]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_evaluated_exported_and_filled_in(straight, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    assert evaluate.main([str(straight), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = [m["loss/valid"] for m in metrics(straight) if "loss/valid" in m][-1]
    assert found["overall"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert "bits_per_byte" not in found["overall"]

    folder = tmp_path / "exported"
    assert export.main([str(straight), "--output", str(folder)]) == 0
    report = json.loads((folder / "export_report.json").read_text())
    assert (report["architecture"], report["logits"]["equal"]) == ("BertForMaskedLM", True)
    assert report["tokens_seen"] == 10 * 8 * 32
    model = AutoModelForMaskedLM.from_pretrained(folder)
    state = {name: open_checkpoint(straight, None).reader.tensor(name) for name, _ in model.named_parameters()}
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())

    fill = pipeline("fill-mask", model=str(folder))
    ids = fill.tokenizer("import [MASK]")["input_ids"]
    own = open_checkpoint(straight, None).tokenizer()
    assert ids == [own.cls_id, *own.encode("import ").tolist(), own.mask_id, own.sep_id]
    again = load_trained(folder, None)
    with torch.inference_mode():
        torch.testing.assert_close(
            again.model(torch.tensor([ids])), model(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5
        )
    best = again.model(torch.tensor([ids]))[0, -2].argmax().item()
    assert fill("import [MASK]")[0]["token"] == best
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "It fills in hidden tokens" in card

    for place in (straight, folder):
        assert generate.main([str(place), "--prompt", "def "]) == 2
        assert "is a masked model, which fills in hidden tokens and continues no text" in capsys.readouterr().err
    assert label.main([str(straight), "--text", "x"]) == 2
    assert (
        f"gives no labels; launcher/export.py {straight} --output FOLDER, then transformers" in capsys.readouterr().err
    )
    assert evaluate.main([str(straight), "--data", str(tmp_path / "x.txt")]) == 2
    assert "the loss of a masked model is on hidden tokens of a prepared corpus" in capsys.readouterr().err


def test_a_folder_says_what_to_do_with_it(tmp_path, capsys):
    folder = make_bert(tmp_path / "bert", ["import os"])
    use = f"use transformers.pipeline('fill-mask', model='{folder}')"
    assert generate.main([str(folder), "--prompt", "def "]) == 2
    assert f"fills in hidden tokens and continues no text; {use}" in capsys.readouterr().err
    assert label.main([str(folder), "--text", "a text"]) == 2
    assert f"fills in hidden tokens and gives no labels; {use}. For labels tune it" in capsys.readouterr().err
    for data in ([], ["--data", str(tmp_path / "x.txt")]):
        assert evaluate.main([str(folder), *data]) == 2
        assert (
            "does not say how they were hidden; evaluate the run that it was exported from" in capsys.readouterr().err
        )


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.masking=null", "data.masking: missing, and model.objective=masked needs it; data.masking={} hides 15 %"),
        ("data.tokenizer.mask_token=null", "data.tokenizer.mask_token: missing, and a masked model needs a tokenizer"),
        ("data.stream={dataset: text, tokenizer: x}", "data.stream: tokens of raw text cannot be hidden on the way"),
        ("eval.prompts=[a]", "eval.prompts: a masked model continues no text; leave them out, or give eval.prompts=[]"),
        ("data.masking.shar=0.2", "data.masking.shar: no such key; did you mean data.masking.share?"),
        ("model.config.hiden_size=3", "transformers' bert has no such key; did you mean hidden_size?"),
        (
            "model.config.hidden_act=gelo",
            "model.config.hidden_act: got 'gelo'; did you mean gelu? expected gelu, gelu_10",
        ),
        ("model.config.hidden_act=7", "model.config.hidden_act: got 7; expected gelu, gelu_10"),
        ("model.obective=causal", "model.obective: no such key; did you mean model.objective?"),
        ("model.family=bert", "model.family='bert'; expected hf"),
        ("model.objective=causal", "model.config.model_type='bert' is none that can be trained as a causal model here"),
    ],
)
def test_what_does_not_fit_a_masked_model_is_refused(override, message, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "corpus")
    changes = ["data.document_mask=false"] if "stream" in override else []
    with pytest.raises(ConfigError) as error:
        load_config(str(recipe), [override, *changes])
    assert message in str(error.value)


def test_padding_that_would_be_attended_to_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "corpus")
    with pytest.raises(ConfigError, match="best_fit pads rows, and a masked model would attend to the padding"):
        load_config(str(recipe), ["data.packing=best_fit", "data.document_mask=false"])
    assert load_config(str(recipe), ["data.packing=best_fit"]).data.packing == "best_fit"


def test_hidden_tokens_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="data.masking: set, and without effect on a model that is not masked"):
        load_config("configs/embedded.yaml", ["data.masking={}"])


def test_a_corpus_without_a_token_for_masks_is_refused(corpus, tmp_path, capsys):
    assert pretrain.main(["--config", str(write_recipe(tmp_path, corpus))]) == 2
    assert "lacks a token for masks, which a masked model needs" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_nothing_is_prepared_with_an_origins_tokenizer_that_has_none(tmp_path, capsys):
    origin = make_bert(tmp_path / "bert", ["import os"])
    config = origin / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"mask_token"', '"other"'))
    recipe = write_tuning(tmp_path, origin, {"kind": "text"})
    options = ["data.masking={}", f"data.corpus={tmp_path}/corpus", "eval.prompts=[]"]
    assert prepare.main(["--config", str(recipe), *options]) == 2
    said = capsys.readouterr().err
    assert f"prepare: the tokenizer of {origin} lacks a token for masks ({config} names no mask_token), " in said
    assert not (tmp_path / "corpus").exists()
