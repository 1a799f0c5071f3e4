"""Labels and tags from a BERT: what is loaded, new and dropped; and a real fine-tuning up to transformers' own pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_runs import make_bert, tune, write_lines, write_recipe
from transformers import BertForPreTraining, BertForSequenceClassification, BertModel, pipeline

from launcher import evaluate, export, finetune, label, pretrain
from launcher.config import ConfigError
from launcher.origin import open_origin
from launcher.origin_config import load_finetune_config
from launcher.origin_weights import origin_weights
from model.init import initial_values
from ranks import Alone
from runs import assert_same_state, losses, metrics, run

LABELS = ["import", "define", "return"]
LINES = [
    {"text": text, "label": kind}
    for kind, texts in {
        "import": ["import json", "import os, sys", "from email import policy", "import asyncio"],
        "define": ["def main():", "class Error(Exception):", "async def read(self):", "def close(self):"],
        "return": ["return None", "return self._value", "raise ValueError(text)", "yield from parts"],
    }.items()
    for text in texts
]
TEXTS = [line["text"] for line in LINES]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = [
    ("ada byron wrote to mary", "B-PER I-PER O O B-PER"),
    ("charles babbage of london read", "B-PER I-PER O B-LOC O"),
    ("the engine was in london", "O O O O B-LOC"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    words = [words for words, _ in SENTENCES]
    return make_bert(tmp_path_factory.mktemp("bert") / "m", [*TEXTS, *words] * 10)


def recipe_for(folder, origin, kind="classify", **train):
    if kind == "classify":
        task = {"kind": kind, "labels": LABELS, "train": [write_lines(folder / "t.jsonl", LINES)]}
    else:
        file = folder / "t.conll"
        pairs = [zip(words.split(), tags.split(), strict=True) for words, tags in SENTENCES]
        file.write_text("\n\n".join("\n".join(f"{word} {tag}" for word, tag in of) for of in pairs))
        task = {"kind": kind, "labels": TAGS, "train": [str(file)]}
    return write_recipe(folder, origin, {**task, "valid": task["train"]}, **train)


# -- what is loaded --------------------------------------------------------------------------------------------------------


def values_of(cfg):
    """What a run begins with, and the lines that tell of it."""
    initial = origin_weights(cfg, Alone())
    return initial.read, "\n".join(initial.told)


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_every_weight_is_the_origins_but_the_head(bert, tmp_path, kind):
    cfg = load_finetune_config(str(recipe_for(tmp_path, bert, kind)), [])
    assert (cfg.model.config["model_type"], cfg.model.objective) == ("bert", "masked")
    read, told = values_of(cfg)
    there = load_file(bert / "model.safetensors")
    body = {name: tensor for name, tensor in there.items() if name.startswith("bert.")}
    assert f"loaded {len(body)} tensors" in told
    for name, tensor in body.items():
        assert torch.equal(read(name, tuple(tensor.shape), 0, tensor.numel()), tensor.flatten()), name
    shape = (len(LABELS), 48)
    assert torch.equal(
        read("classifier.weight", shape, 3, 9), initial_values("classifier.weight", shape, cfg.model, 0, 3, 9)
    )
    new = "new, with values drawn: "
    pooler = "bert.pooler.dense.bias (48,), bert.pooler.dense.weight (48, 48), "
    n = len(LABELS) if kind == "classify" else len(TAGS)
    assert f"{new}{pooler if kind == 'classify' else ''}classifier.bias ({n},), classifier.weight ({n}, 48)" in told
    assert "dropped: cls.predictions.bias (" in told
    assert "decoder" not in told  # a second name of the embedding


def test_a_pooler_that_is_there_is_loaded(tmp_path):
    folder = make_bert(tmp_path / "m", TEXTS, BertForPreTraining)
    _, told = values_of(load_finetune_config(str(recipe_for(tmp_path, folder)), []))
    assert "new, with values drawn: classifier.bias (3,), classifier.weight (3, 48)" in told
    assert "cls.seq_relationship.weight (2, 48)" in told


def test_folders_without_a_head_and_with_names_of_2018_are_read(bert, tmp_path):
    folder = make_bert(tmp_path / "m", TEXTS, BertModel)
    assert any(name.startswith("embeddings.") for name in load_file(folder / "model.safetensors"))
    _, told = values_of(load_finetune_config(str(recipe_for(tmp_path, folder)), []))
    assert "dropped" not in told
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(old | {"embeddings.position_ids": torch.arange(64)}, folder / "model.safetensors", {"format": "pt"})
    opened = open_origin(str(folder))
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    assert torch.equal(opened.read(name, 0, 48), tensors[name.removeprefix("bert.")])
    assert all(name.startswith("bert.") for name in opened.shapes)


def test_text_needs_the_head_that_a_folder_may_not_have(tmp_path):
    folder = make_bert(tmp_path / "m", TEXTS, BertModel)
    recipe = write_recipe(tmp_path, folder, {"kind": "text"})
    cfg = load_finetune_config(str(recipe), ["data.masking={}"])
    with pytest.raises(
        ConfigError,
        match=r"cls.predictions.bias has no value in it.*\. A language model begins from one that has its head for tokens",
    ):
        origin_weights(cfg, Alone())


def test_a_kind_that_is_none_is_refused_with_the_nearest(bert, tmp_path):
    message = "task.kind: got 'clasify'; did you mean classify[?] expected text, chat, preference, classify, tag"
    with pytest.raises(ConfigError, match=message):
        load_finetune_config(str(recipe_for(tmp_path, bert)), ["task.kind=clasify"])


def change(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (
            {"bert.encoder.layer.1.output.dense.bias": None},
            {},
            "missing bert.encoder.layer.1.output.dense.bias, unex",
        ),
        (
            {"bert.encoder.layer.2.output.dense.bias": torch.ones(48)},
            {},
            "missing none, unexpected bert.encoder.layer.2",
        ),
        (
            {"cls.predictions.decoder.weight": torch.ones(3, 48)},
            {},
            "decoder.weight differs from bert.embeddings.word_",
        ),
        ({}, {"intermediate_size": 95}, r"size mismatch for bert.encoder.layer.0.intermediate.dense.bias: \(96,\)"),
        ({}, {"is_decoder": True}, "is_decoder=True makes another kind of model"),
        ({}, {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is none that"),
        ({}, {"model_type": "roberta"}, "model_type 'roberta' has no equal here; expected gpt2, llama, qwen3, bert"),
    ],
)
def test_folders_that_are_not_what_they_say_are_refused(tmp_path, changes, config, message):
    folder = make_bert(tmp_path / "m", TEXTS)
    change(folder, **changes)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    with pytest.raises(ConfigError, match=message):
        load_finetune_config(str(recipe_for(tmp_path, folder)), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.seq_len=32", "model.seq_len: got 32, and .* has 64; leave it out"),
        (
            "task.kind=chat",
            "task.kind: got chat, and the model is a masked one, which answers nothing; expected classify",
        ),
    ],
)
def test_what_a_masked_model_cannot_be_is_refused(bert, tmp_path, override, message):
    recipe = recipe_for(tmp_path, bert)
    if "chat" in override:
        recipe, override = write_recipe(tmp_path, bert, {"kind": "chat", "train": ["c.jsonl"]}), "train.steps=9"
    with pytest.raises(ConfigError, match=message):
        load_finetune_config(str(recipe), [override])


def test_a_causal_model_of_family_hf_has_no_head_for_labels(bert, tmp_path):
    cfg = load_finetune_config(str(recipe_for(tmp_path, bert)), [])
    model = {"family": "hf", "objective": "causal", "vocab_size": 500, "seq_len": 64, "config": {"model_type": "gpt2"}}
    with pytest.raises(ValueError, match="task.kind: got classify, and the model is of family hf and causal"):
        type(cfg).model_validate({**cfg.model_dump(mode="json"), "model": model})


def test_a_model_of_family_hf_learns_no_preference(bert, tmp_path):
    recipe = write_recipe(tmp_path, bert, {"kind": "preference", "train": ["pairs.jsonl"]})
    with pytest.raises(
        ConfigError, match="task.kind: got preference, and the model is of family hf; expected a run of"
    ):
        load_finetune_config(str(recipe), [])


# -- real runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long  # three starts; the loop and its resume are those of other models
def test_labels_from_a_bert_stopped_and_resumed_and_as_transformers_gives_them(bert, tmp_path, capsys):
    recipe, log = recipe_for(tmp_path, bert, steps=14), tmp_path / "log"
    options = ["parallel.zero_stage=3", "parallel.activation_checkpointing=full", "eval.every=7"]
    run(tune(2, "--config", recipe, *options, "run.name=straight"), log)
    run(tune(2, "--config", recipe, *options, "train.stop_at=6"), log, code=1)  # torchrun's own
    run(tune(2, "--config", recipe, *options), log)
    run_dir = tmp_path / "runs/tuned"
    assert losses(run_dir) == losses(tmp_path / "runs/straight")
    assert_same_state(run_dir, tmp_path / "runs/straight")
    logged = {name: value for line in metrics(run_dir) if line["step"] == 14 for name, value in line.items()}
    assert logged["valid/accuracy"] > 0.8
    assert evaluate.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["overall"]
    assert found["loss/valid"] == pytest.approx(logged["loss/valid"], rel=1e-4)

    folder = tmp_path / "out"
    assert export.main([str(run_dir), "--output", str(folder)]) == 0
    classify = pipeline("text-classification", str(folder), top_k=None)
    assert isinstance(classify.model, BertForSequenceClassification)
    capsys.readouterr()
    for place in (run_dir, folder):
        assert label.main([str(place), "--json", *(word for text in TEXTS for word in ("--text", text))]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for line, scores in zip(said, classify(TEXTS), strict=True):
            expected = {score["label"]: score["score"] for score in scores}
            assert line["probabilities"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_tags_from_a_bert_are_those_of_the_pipeline(bert, tmp_path, capsys):
    run(tune(1, "--config", recipe_for(tmp_path, bert, "tag", steps=40)), tmp_path / "log")
    run_dir, folder = tmp_path / "runs/tuned", tmp_path / "out"
    assert [line["valid/entity_f1"] for line in metrics(run_dir) if "valid/entity_f1" in line][-1] > 0.8
    assert export.main([str(run_dir), "--output", str(folder)]) == 0
    tag = pipeline("token-classification", str(folder), aggregation_strategy="first")
    capsys.readouterr()
    for words, _ in SENTENCES:
        assert label.main([str(folder), "--json", "--text", words]) == 0
        said = json.loads(capsys.readouterr().out)["entities"]
        theirs = tag(words)
        assert [(e["kind"], e["start"], e["end"]) for e in said] == [
            (e["entity_group"], e["start"], e["end"]) for e in theirs
        ]
        assert [e["probability"] for e in said] == pytest.approx([float(e["score"]) for e in theirs], abs=1e-4)


def test_a_text_is_refused_before_anything_is_started(bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))
    recipe = recipe_for(tmp_path, bert)
    write_lines(tmp_path / "t.jsonl", [{"text": "import " * 63, "label": "import"}])  # with [CLS] and [SEP] 65
    assert pretrain.main(["--config", str(recipe)], finetune.FINETUNE) == 2
    assert "the text has 65 tokens, model.seq_len=64 is the longest" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
