"""Text from a sharded checkpoint without its engine; a run whose numbers break."""

import json

import pytest
import torch

from launcher import generate
from launcher.sampling import sample
from runs import metrics, run, torchrun, write_recipe


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, corpus):
    """A short run of two ranks under ZeRO 3."""
    folder = tmp_path_factory.mktemp("generate")
    arguments = ("train.steps=6", "checkpoint.every=3", "parallel.zero_stage=3")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *arguments), folder / "log")
    return folder / "runs/test"


def test_the_model_read_from_fragments_has_the_loss_that_the_engine_logged(run_dir, corpus):
    from data.corpus import Corpus
    from data.loader import eval_batches

    model, _ = generate.load_model(run_dir, None)
    total = count = 0
    with torch.inference_mode():
        for tokens, targets, _ in eval_batches(Corpus.open(corpus, "valid", 32), 10, 2, 0, 1):
            total += model(tokens, targets).item()
            count += int((targets != -100).sum())
    logged = [line["loss/valid"] for line in metrics(run_dir) if "loss/valid" in line][-1]
    assert total / count == pytest.approx(logged, rel=1e-5)


def test_a_run_can_be_used_from_anywhere_and_without_its_corpus(run_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(run_dir), "--prompt", "class ", "--tokens", "3", "--temperature", "1e-300"]) == 0
    assert capsys.readouterr().out.startswith("class ")


def test_text_is_printed_and_a_seed_repeats_it(run_dir, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate.main([str(run_dir), "--prompt", "def ", "--tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], r"has no checkpoint of step 4; it has: 3, 6"),
        (["--tokens", "0"], "n_tokens=0, temperature=0.8, top_k=50; expected at least 1, 0 and 0, and finite"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--temperature", "inf"], "temperature=inf"),
        (["--step", "0"], "has no checkpoint of step 0; it has: 3, 6"),
        (["--top-k", "-1"], "top_k=-1"),
    ],
)
def test_bad_requests_are_refused(run_dir, capsys, arguments, message):
    assert generate.main([str(run_dir), "--prompt", "x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert generate.main([str(tmp_path), "--prompt", "x"]) == 2
    assert "has no checkpoint; it has: none" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    file = copy / "checkpoints/step-00000006/rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert generate.main([str(copy), "--prompt", "x"]) == 2
    assert "is damaged: " in (text := capsys.readouterr().err)
    assert "choose another with --step" in text


def test_sampling_draws_from_the_right_tokens():
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0, 9.0])  # id 4 is a padded row that no tokenizer knows

    def model(tokens):
        return logits.expand(1, tokens.shape[1], 5)

    options = {"seq_len": 4, "eos_id": 0, "vocab_size": 4, "stop_at_eos": True}
    assert sample(model, [2], 3, temperature=0, **options) == [2, 1, 1, 1]
    drawn = {i for seed in range(20) for i in sample(model, [2], 5, temperature=3.0, top_k=2, seed=seed, **options)[1:]}
    assert drawn == {1, 2}
    drawn = sample(model, [2], 400, temperature=5.0, top_k=0, seed=1, **options)[1:]
    assert drawn[-1] == 0
    assert len(drawn) < 400


@pytest.mark.fault(35)
def test_numbers_that_break_are_reported_and_end_the_run(corpus, tmp_path):
    """A learning rate that throws the weights to 1e30: the second step breaks."""
    recipe = write_recipe(tmp_path, corpus)
    changes = (
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "train.bad_steps.max_skipped_in_a_row=3",
        "parallel.zero_stage=0",
    )
    text = run(torchrun(2, "--config", recipe, *changes), tmp_path / "log", code=None)
    assert "step 2 is bad (not_finite), update skipped: its loss is " in text
    assert "[rank 1] step 2 is bad (not_finite), update skipped" in text
    assert "documents of text/train-" in text
    assert "3 updates in a row were skipped, up to step 4, the last one because its loss is " in text
    ledger = [json.loads(line) for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
    assert ledger[-1]["event"] == "failed"
    assert not (tmp_path / "runs/test/checkpoints").exists()
