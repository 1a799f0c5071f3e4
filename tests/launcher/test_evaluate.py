"""The command gives a run's own numbers, and of texts those that plain arithmetic gives."""

import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import evaluate, export
from launcher.trained import load_trained
from runs import PRETRAIN, metrics, run, torchrun, write_recipe

TEXTS = ["def f(x):\n    return x\n" * 9, "x", "a \u2581 b, 中文 \n"]


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    """Two ranks under ZeRO 3, evaluated twice on the way."""
    folder = tmp_path_factory.mktemp("evaluate")
    arguments = ("train.steps=6", "checkpoint.every=3", "eval.every=3", "parallel.zero_stage=3")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *arguments), folder / "log")
    return folder / "runs/test"


@pytest.fixture(scope="module")
def mixed(mixture, tmp_path_factory):
    """Three sources, whose weights change after step 2; in bf16."""
    folder = tmp_path_factory.mktemp("mixed")
    recipe = write_recipe(folder, mixture)
    sources = ", ".join(
        f"{{kind: text, name: {name}, paths: [-], weight: {weight}}}"
        for name, weight in (("json", 0.5), ("email", 0.3), ("asyncio", 0.2))
    )
    changes = [f"data.sources=[{sources}]", "data.stages=[{from_tokens: 512, weights: {email: 0.9, json: 0.1}}]",
               "train.steps=4", "checkpoint.every=2", "eval.every=2", "parallel.precision=bf16"]  # fmt: skip
    run([sys.executable, PRETRAIN, "--config", str(recipe), *changes], folder / "log")
    return folder / "runs/test"


@pytest.fixture
def texts(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return tmp_path


def found_by(capsys, *arguments):
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logged(run_dir, step):
    (line,) = [line for line in metrics(run_dir) if "loss/valid" in line and line["step"] == step]
    return line


@pytest.mark.parametrize("step", [3, 6])
def test_a_runs_own_numbers(run_dir, step, capsys):
    """Equal but for the order of sums: two ranks read what is read by one here."""
    found, line = found_by(capsys, run_dir, "--step", step), logged(run_dir, step)
    assert found["step"] == step
    assert found["overall"]["loss"] == pytest.approx(line["loss/valid"], rel=1e-6)
    assert found["overall"]["perplexity"] == pytest.approx(line["loss/valid_perplexity"], rel=1e-6)
    assert found["overall"]["bits_per_byte"] == pytest.approx(line["loss/valid_bits_per_byte"], rel=1e-6)
    assert found["sources"]["text"]["loss"] == found["overall"]["loss"]
    assert found["sources"]["text"]["tokens"] == 320


@pytest.mark.parametrize("step", [2, 4])
def test_a_mixtures_own_numbers_with_the_weights_of_that_step(mixed, step, capsys):
    """bf16 as the run computed, on one rank as it had: the same numbers to the last bit but of the weights' rounding."""
    found, line = found_by(capsys, mixed, "--step", step), logged(mixed, step)
    assert found["dtype"] == "bf16"
    for name in ("json", "email", "asyncio"):
        assert found["sources"][name]["loss"] == pytest.approx(line[f"loss/valid_{name}"], rel=1e-6)
    assert found["overall"]["loss"] == pytest.approx(line["loss/valid"], rel=1e-6)
    assert found["overall"]["bits_per_byte"] == pytest.approx(line["loss/valid_bits_per_byte"], rel=1e-6)
    shares = {2: (0.5, 0.3), 4: (0.1, 0.9)}[step]
    expected = sum(s * line[f"loss/valid_{name}"] for s, name in zip(shares, ("json", "email"), strict=True))
    expected += 0.2 * line["loss/valid_asyncio"] if step == 2 else 0
    assert line["loss/valid"] == pytest.approx(expected, rel=1e-4)  # so that the weights differ between the steps


def test_a_copy_of_the_corpus_and_more_windows(run_dir, corpus, tmp_path, capsys):
    copy = shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copy2)
    assert found_by(capsys, run_dir, "--data", copy)["overall"] == found_by(capsys, run_dir)["overall"]
    more = found_by(capsys, run_dir, "--data", copy, "--windows", 20, "--batch-size", 5)
    assert more["sources"]["text"]["tokens"] == 640


def nats_of(trained, text):
    """Every token but the first, which begins a document, given all that is left of it in its stretch of seq_len."""
    ids, length = torch.tensor([2, *trained.tokenizer.encode(text).tolist(), 2]), trained.model.cfg.seq_len
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        stretch = ids[start : start + length + 1]
        logits = trained.model(stretch[:-1].unsqueeze(0))[0]
        total += F.cross_entropy(logits, stretch[1:], reduction="sum").item()
    return total, len(ids) - 1, len(text.encode())


def test_text_files_by_plain_arithmetic(run_dir, texts, capsys):
    paths = [texts / f"{i}.txt" for i in range(3)]
    found, trained = found_by(capsys, run_dir, "--data", *paths, "--batch-size", 2), load_trained(run_dir, None)
    with torch.inference_mode():
        expected = [nats_of(trained, text) for text in TEXTS]
    for path, (nats, tokens, n_bytes) in zip(paths, expected, strict=True):
        values = found["sources"][str(path)]
        assert values["tokens"] == tokens
        assert values["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    nats, tokens, n_bytes = (sum(column) for column in zip(*expected, strict=True))
    assert found["overall"]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["overall"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_json_lines_and_globs_are_the_same_texts(run_dir, texts, capsys):
    lines = found_by(capsys, run_dir, "--data", texts / "all.jsonl", "--field", "body")["overall"]
    files = found_by(capsys, run_dir, "--data", f"{texts}/*.txt")["overall"]
    assert lines == pytest.approx(files, rel=1e-6)


def test_windows_are_a_limit_of_whole_documents(run_dir, texts, capsys):
    found = found_by(capsys, run_dir, "--data", texts / "all.jsonl", "--field", "body", "--windows", 1)
    only = found_by(capsys, run_dir, "--data", texts / "0.txt")
    assert found["overall"] == pytest.approx(only["overall"], rel=1e-6)


def test_an_export_has_the_numbers_of_its_run(run_dir, texts, tmp_path, capsys):
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    theirs = found_by(capsys, tmp_path / "out", "--data", f"{texts}/*.txt")
    ours = found_by(capsys, run_dir, "--data", f"{texts}/*.txt")
    assert theirs["overall"] == pytest.approx(ours["overall"], rel=1e-6)
    assert (theirs["step"], ours["step"]) == (None, 6)


def test_a_table_for_people(mixed, capsys):
    assert evaluate.main([str(mixed)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{mixed} step 4, bf16, text held out"
    assert [row.split()[0] for row in rows] == ["json", "email", "asyncio", "all"]
    assert all("  perplexity " in row and "  bits_per_byte " in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], "has no checkpoint of step 4; it has: 3, 6"),
        (["--windows", "0"], "--windows 0; expected at least 1"),
        (["--batch-size", "-1"], "--batch-size -1; expected at least 1"),
        (["--data", "{}/none.txt"], "none.txt"),
        (["--data", "{}/all.jsonl"], "there is no field 'text' (there is 'body')"),
        (["--data", "{}/empty.txt"], "there is no text in {}/empty.txt"),
        (["--data", "{}/0.txt", "{corpus}"], "--data names the corpus {corpus} and more; evaluate them one by one"),
    ],
)
def test_requests_that_are_refused(run_dir, corpus, texts, capsys, arguments, message):
    (texts / "empty.txt").write_text("")
    arguments = [a.replace("{corpus}", str(corpus)).replace("{}", str(texts)) for a in arguments]
    assert evaluate.main([str(run_dir), *arguments]) == 2
    assert message.replace("{corpus}", str(corpus)).replace("{}", str(texts)) in capsys.readouterr().err


def test_corpora_that_do_not_fit(run_dir, mixture, corpus, tmp_path, capsys):
    assert evaluate.main([str(run_dir), "--data", str(mixture)]) == 2
    assert "holds nothing out for the run's sources; name text or JSONL files" in capsys.readouterr().err
    copy = shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copy2)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0123456789abcdef"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate.main([str(run_dir), "--data", str(copy)]) == 2
    assert "was prepared with another tokenizer (0123456789abcdef) than the run's" in capsys.readouterr().err


def test_a_run_whose_corpus_is_gone(run_dir, tmp_path, capsys, monkeypatch):
    from exports import change_config

    copy = shutil.copytree(run_dir, tmp_path / "run")
    change_config(copy, 6, data={"corpus": "no/such/corpus"})
    assert evaluate.main([str(copy)]) == 2
    assert "the run's corpus no/such/corpus is not here; name its copy, or text" in capsys.readouterr().err


def test_a_hugging_face_folder_needs_text(run_dir, corpus, tmp_path, capsys):
    assert export.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    for more in ([], ["--data", str(corpus)]):
        assert evaluate.main([str(tmp_path / "out"), *more]) == 2
        assert "a Hugging Face folder has no corpus of its own" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "out"), "--save", "x"]) == 2
    assert f"--save x: {tmp_path}/out is no run's folder, which results are kept in" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "example: python launcher/evaluate.py runs/embedded" in capsys.readouterr().out


def test_results_are_kept_and_drawn_in_the_order_of_their_steps(run_dir, texts, capsys):
    for step in (6, 3, 6):
        assert found_by(capsys, run_dir, "--step", step, "--save", "own", "--windows", 2)["step"] == step
    assert found_by(capsys, run_dir, "--data", texts / "0.txt", texts / "2.txt", "--save", "texts")["step"] == 6
    kept = {path: json.loads(path.read_text()) for path in sorted((run_dir / "evaluations").rglob("step-*.json"))}
    assert [(path.parent.name, found["step"]) for path, found in kept.items()] == [("own", 3), ("own", 6), ("texts", 6)]
    each = [f"evaluate/loss_{texts / name}" for name in ("0.txt", "2.txt")]
    for name, more in (("own", []), ("texts", ["evaluate/tokens", *each])):
        board = EventAccumulator(str(run_dir / "tensorboard/evaluations" / name)).Reload()
        tags = ["evaluate/loss", "evaluate/perplexity", "evaluate/bits_per_byte", *more]
        assert sorted(board.Tags()["scalars"]) == sorted(tags)
        points = [(event.step, event.value) for event in board.Scalars("evaluate/loss")]
        expected = [
            (found["step"], found["overall"]["loss"]) for path, found in kept.items() if path.parent.name == name
        ]
        assert points == [(step, pytest.approx(loss)) for step, loss in expected]
    assert evaluate.main([str(run_dir), "--save", "own", "--data", str(texts / "0.txt")]) == 2
    told = f"--save own: its results are of what the run holds out, not of {texts}/0.txt; choose another name"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("a/b", "--save 'a/b'; expected a name of letters"), (".x", "--save '.x'; expected a name")]
)
def test_names_that_are_none(tmp_path, name, message, capsys):
    assert evaluate.main([str(tmp_path), "--save", name]) == 2
    assert message in capsys.readouterr().err
