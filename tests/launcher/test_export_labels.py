"""A tuned classifier or tagger as transformers' own class: the same logits, padded or not, and usable by its card."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from exports import FAMILIES
from launcher import export
from launcher.config import validate
from launcher.trained import build_model, open_checkpoint
from model.init import initial_values
from parallel.checkpoint import Manifest
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig
from parallel.state import KINDS, Fragment
from ranks import Alone

LABELS = ["good", "bad", "so so"]
WORDS = ["O", "B-PER", "I-PER"]


class Lone:
    """What a save needs of an engine, of one process."""

    mesh, zero_stage, adam_steps = Alone(), 0, 1

    def __init__(self, weights):
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._weights = weights

    def owned_fragments(self):
        return [Fragment(name, kind, 0, weight.reshape(-1)) for name, weight in self._weights.items() for kind in KINDS]


def make_run(folder, corpus, family, task):
    """A run's folder as a fine-tuning leaves it."""
    model = FAMILIES[family][0].model_dump(mode="json")
    raw = {
        "run": {"name": family, "folder": str(folder)},
        "init": "runs/secret/place@7",
        "origin": {"step": 7, "digest": "0123", "tokenizer": "4567", "model": model},
        "task": {"train": ["private/*.tsv"], **task},
        "model": model,
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "global_batch_size": 12},
    }
    cfg = validate(raw, "a test")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(cfg).named_parameters()}
    weights = {name: initial_values(name, shape, cfg.model, 3).view(shape) for name, shape in shapes.items()}
    weights["score.weight"] *= 50  # as if it had learned something
    writer = CheckpointWriter(cfg.run_dir / "checkpoints", Alone(), CheckpointConfig(keep=0))
    engine = Lone(weights)
    listed = {name: list(shape) for name, shape in engine.shapes.items()}
    writer.save(engine, Manifest(2, 1, 1, 0, listed, {}, {}, cfg.model_dump(mode="json"), totals={"tokens": 24}))
    assert writer.wait().error is None
    shutil.copytree(corpus / "tokenizer", cfg.run_dir / "tokenizer")
    return cfg.run_dir


def run_export(run_dir, output, code=0):
    assert export.main([str(run_dir), "--output", str(output)]) == code
    return output


@pytest.fixture(autouse=True)
def short_proof(monkeypatch):
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    monkeypatch.setattr(export, "PROOF_TOKENS", 256)


TASKS = {
    "classify": {"kind": "classify", "labels": LABELS},
    "tag": {"kind": "tag", "labels": WORDS, "word_token": "last"},
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_run(family, kind, corpus, tmp_path):
    run_dir = make_run(tmp_path / "runs", corpus, family, TASKS[kind])
    folder = run_export(run_dir, tmp_path / "out")
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), open_checkpoint(run_dir, 2).model()
    texts = ["def f(x):\n    return x", "a", "import os, sys"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    auto = AutoModelForSequenceClassification if kind == "classify" else AutoModelForTokenClassification
    model = auto.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = model(**inputs).logits
        alone = [ours(torch.tensor([tokenizer(text).input_ids]))[0] for text in texts]
    for row, logits in enumerate(alone):
        found = theirs[row] if kind == "classify" else theirs[row, : len(logits)]
        assert torch.allclose(found, logits[-1] if kind == "classify" else logits, atol=1e-4)
    assert model.config.id2label == dict(enumerate(TASKS[kind]["labels"]))
    report = json.loads((folder / "export_report.json").read_text())
    assert report["logits"]["equal"]
    assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize("kind", TASKS)
def test_its_card_says_how_to_use_it_and_names_no_place(kind, corpus, tmp_path):
    folder = run_export(make_run(tmp_path / "runs", corpus, "llama", TASKS[kind]), tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "fine-tuned from `place` at step 7 (digest 0123)" in card
    assert "secret" not in card
    assert "private" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = eval(done.stdout.splitlines()[-1])  # a list of labels
    assert len(printed) == (2 if kind == "classify" else 4)
    assert set(printed) <= set(TASKS[kind]["labels"])


def test_a_damaged_head_shows(corpus, tmp_path, monkeypatch, capsys):
    run_dir = make_run(tmp_path / "runs", corpus, "gpt2", TASKS["classify"])
    write = export.write_weights

    def spoiled(folder, files, read):
        write(folder, files, read)
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"][0, 0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export, "write_weights", spoiled)
    run_export(run_dir, tmp_path / "out", code=1)
    assert "transformers' logits differ from the run's by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
