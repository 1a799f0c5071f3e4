"""A tuned classifier or tagger as transformers' own class: the same logits, padded or not, and usable by its card."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_runs import make_tuned_run
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from exports import FAMILIES
from launcher import checkpoint, export
from launcher.trained import open_checkpoint

LABELS = ["good", "bad", "so so"]
WORDS = ["O", "B-PER", "I-PER"]


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
@pytest.mark.parametrize("family", [*FAMILIES, "bert", "modernbert"])
def test_logits_are_those_of_the_run(family, kind, corpus, tmp_path):
    run_dir = make_tuned_run(tmp_path / "runs", corpus, family, TASKS[kind])
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
        assert logits.std() > 0.1
        assert torch.allclose(found, logits[-1] if kind == "classify" else logits, atol=1e-4)
    assert model.config.id2label == dict(enumerate(TASKS[kind]["labels"]))
    report = json.loads((folder / "export_report.json").read_text())
    assert report["logits"]["equal"]
    assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "classify"), ("llama", "tag"), ("bert", "tag"), ("modernbert", "tag")]
)
def test_its_card_says_how_to_use_it_and_names_no_place(family, kind, corpus, tmp_path, capsys):
    task = TASKS[kind] | ({"word_token": "first"} if "bert" in family else {})
    run_dir = make_tuned_run(tmp_path / "runs", corpus, family, task)
    folder = run_export(run_dir, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "\n24 targets, of:\n" in card
    capsys.readouterr()
    assert checkpoint.main(["list", str(run_dir)]) == 0
    assert "  24 targets\n" in capsys.readouterr().out
    assert "fine-tuned from `place` at step 7 (digest 0123)" in card
    assert "secret" not in card
    assert "private" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    if kind == "tag":
        assert f"[next(tags) for _ in of_word][{0 if 'bert' in family else -1}]]" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = eval(done.stdout.splitlines()[-1])  # a list of labels
    assert len(printed) == (2 if kind == "classify" else 4)
    assert set(printed) <= set(TASKS[kind]["labels"])


def test_a_damaged_head_shows(corpus, tmp_path, monkeypatch, capsys):
    run_dir = make_tuned_run(tmp_path / "runs", corpus, "gpt2", TASKS["classify"])
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
