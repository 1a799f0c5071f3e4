"""New texts are labelled as the evaluation does, from a run and from its export, and as transformers' pipeline does."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_runs import make_origin, make_tuned_run, write_lines
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from launcher import evaluate, export, generate, label

LABELS = ["good", "bad", "so so"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = ["def f(x):\n    return x", "a", "import os, sys", "中文 text"]
SENTENCES = [["import", "os", "and", "sys"], ["x"], ["class", "Error", "of", "json"]]


@pytest.fixture(scope="module", params=["llama", "bert"])
def runs(request, corpus, tmp_path_factory):
    """kind -> (the run's folder, that of its export)"""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    tasks = {
        "classify": {"kind": "classify", "labels": LABELS},
        "tag": {"kind": "tag", "labels": TAGS, "word_token": "last", "too_long": "cut"},
    }
    for kind, task in tasks.items():
        run_dir, output = make_tuned_run(folder / kind, corpus, request.param, task), folder / f"{kind}-out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "PROOF_CHARACTERS", 2**14)
            patch.setattr(export, "PROOF_TOKENS", 256)
            assert export.main([str(run_dir), "--output", str(output)]) == 0
        made[kind] = run_dir, output
    return made


@pytest.fixture
def labelled(capsys):
    """labelled(model, ...) -> what is said of each text"""

    def call(*arguments):
        capsys.readouterr()
        assert label.main([*map(str, arguments), "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]

    return call


def texts(*given):
    return [word for text in given for word in ("--text", text)]


@pytest.mark.parametrize("which", [0, 1])
def test_labels_and_probabilities_are_those_of_the_pipeline(runs, labelled, which):
    found = labelled(runs["classify"][which], *texts(*TEXTS), "--dtype", "fp32", "--batch-size", "3")
    theirs = pipeline("text-classification", str(runs["classify"][1]), top_k=None)(TEXTS)
    assert [line["text"] for line in found] == TEXTS
    for line, scores in zip(found, theirs, strict=True):
        assert line["label"] == scores[0]["label"]
        expected = {score["label"]: score["score"] for score in scores}
        assert line["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert len({round(line["probabilities"]["good"], 3) for line in found}) > 1


@pytest.mark.parametrize("which", [0, 1])
def test_tags_are_those_of_transformers(runs, labelled, tmp_path, which):
    given = write_lines(tmp_path / "w.jsonl", [{"tokens": words} for words in SENTENCES])
    found = labelled(runs["tag"][which], "--file", given, "--dtype", "fp32")
    folder = runs["tag"][1]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder)
    for words, line in zip(SENTENCES, found, strict=True):
        spelled = [(" " if at else "") + word for at, word in enumerate(words)]
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in spelled]
        row, last = [number for of in ids for number in of], torch.tensor([len(of) for of in ids]).cumsum(0) - 1
        if model.config.model_type == "bert":
            row, last = [tokenizer.cls_token_id, *row, tokenizer.sep_token_id], last + 1
        with torch.inference_mode():
            best = model.eval()(torch.tensor([row])).logits[0, last].softmax(-1).max(-1)
        assert line["tags"] == [TAGS[number] for number in best.indices]
        assert line["probabilities"] == pytest.approx(best.values.tolist(), abs=1e-5)
        for entity in line["entities"]:
            assert " ".join(words)[entity["start"] : entity["end"]] == entity["text"]
            assert entity["kind"] in ("PER", "LOC")
    assert sum(len(line["entities"]) for line in found) > 1
    spoken = labelled(runs["tag"][which], *texts(*(" ".join(words) for words in SENTENCES)), "--dtype", "fp32")
    assert [line["entities"] for line in spoken] == [line["entities"] for line in found]


def test_an_entity_is_as_sure_as_its_words_are_on_average(runs, labelled):
    (line,) = labelled(runs["tag"][0], *texts(" ".join(f"w{i} x" for i in range(9))))
    longest = max(line["entities"], key=lambda entity: len(entity["text"]))
    first = len(line["text"][: longest["start"]].split())
    of_words = line["probabilities"][first : first + len(longest["text"].split())]
    assert len(of_words) > 1
    assert longest["probability"] == pytest.approx(sum(of_words) / len(of_words))


def test_what_is_labelled_is_what_evaluation_counts(runs, labelled, tmp_path, capsys):
    lines = [{"text": text, "label": LABELS[at % 3]} for at, text in enumerate(TEXTS)]
    given = write_lines(tmp_path / "v.jsonl", lines)
    assert evaluate.main([str(runs["classify"][0]), "--data", given, "--dtype", "fp32", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["overall"]
    found = labelled(runs["classify"][0], "--file", given, "--dtype", "fp32")
    right = [line["label"] == said["label"] for line, said in zip(lines, found, strict=True)]
    assert scores["valid/accuracy"] == sum(right) / len(right)
    nats = [-torch.tensor(said["probabilities"][line["label"]]).log() for line, said in zip(lines, found, strict=True)]
    assert scores["loss/valid"] == pytest.approx(sum(nats).item() / len(nats), rel=1e-4)


def test_words_behind_a_cut_have_no_tag(runs, labelled, capsys):
    text = " ".join(["word"] * 40)
    (line,) = labelled(runs["tag"][0], *texts(text))
    tagged = [tag is not None for tag in line["tags"]]
    assert len(tagged) == 40
    tokenizer = AutoTokenizer.from_pretrained(runs["tag"][1])
    first, other = (len(tokenizer(word, add_special_tokens=False).input_ids) for word in ("word", " word"))
    room = 32 - len(tokenizer("").input_ids)
    assert sum(tagged) == 1 + (room - first) // other < 40  # whose last token is not cut off
    assert tagged == sorted(tagged, reverse=True)
    assert [probability is not None for probability in line["probabilities"]] == tagged
    assert label.main([str(runs["tag"][1]), *texts(text)]) == 2  # the folder does not say that the run cuts
    assert (
        "model.seq_len=32 is the longest; say task.too_long: cut (launcher/label.py: --cut)" in capsys.readouterr().err
    )
    assert label.main([str(runs["tag"][1]), *texts(text), "--cut"]) == 0
    assert "1 of 1 texts are cut at 32 tokens" in capsys.readouterr().err


def test_texts_from_files_and_to_a_file(runs, labelled, tmp_path, capsys, monkeypatch):
    run_dir = runs["classify"][0]
    (tmp_path / "t.txt").write_text("one\r\ntwo\u2028lines\n")
    (tmp_path / "t.csv").write_text('body,x\n"three, ""3""",1\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("four\n"))
    files = ["--file", tmp_path / "t.txt", "--file", "-"]
    assert [line["text"] for line in labelled(run_dir, *files, "--text", "zero")] == [
        "zero",
        "one",
        "two\u2028lines",
        "four",
    ]
    output = tmp_path / "out.jsonl"
    given = [str(run_dir), "--file", str(tmp_path / "t.csv"), "--field", "body", "--output", str(output)]
    assert label.main(given) == 0
    assert f"1 texts labelled, written to {output}" in capsys.readouterr().out
    assert json.loads(output.read_text())["text"] == 'three, "3"'
    assert label.main(given) == 2
    assert f"--output {output} is there already" in capsys.readouterr().err
    assert label.main([str(run_dir), "--text", "x"]) == 0
    assert capsys.readouterr().out.split()[0] in [*LABELS, "so"]
    assert label.main([str(runs["tag"][0]), "--text", "x y"]) == 0
    assert capsys.readouterr().out.startswith("x y\n")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("classify", [], "there is nothing to label; give --text TEXT or --file FILE"),
        ("classify", texts("a", " "), "--text 2: the text is empty; expected a text with something in it"),
        ("classify", [*texts("a"), "--batch-size", "0"], "--batch-size 0; expected at least 1"),
        ("classify", ["--file", "{}/empty.txt"], "empty.txt, line 2: the text is empty"),
        ("classify", ["--file", "{}/none.txt"], "none.txt"),
        ("classify", ["--file", "{}/t.jsonl"], "t.jsonl, line 1: there is no field 'text', there is 'tokens'"),
        ("classify", ["--file", "{}/t.jsonl", "--field", "tokens"], "t.jsonl, line 1: is 'None'; expected a text"),
        (
            "classify",
            ["--file", "{}/t.conll"],
            "a conll file cannot hold what is read; expected one that ends with .tsv, ",
        ),
        (
            "tag",
            ["--file", "{}/v.tsv"],
            "v.tsv: a tsv file cannot hold what is read; expected one that ends with .jsonl, ",
        ),
        (
            "tag",
            ["--file", "{}/v.doc"],
            "v.doc: its name does not say what it is; expected one that ends with .jsonl, ",
        ),
        ("classify", ["--file", "{}/empty.txt", "--field", "x"], "--field x: has no effect on "),
        ("classify", [*texts("a"), "--field", "x"], "--field x: has no effect on texts of the command line, of which"),
        ("classify", [*texts("a"), "--output", "{}/no/o.jsonl"], "no/o.jsonl: there is no folder "),
        ("tag", ["--file", "{}/t.jsonl"], "t.jsonl, line 1: is 'None'; expected a text or a list of words"),
        ("tag", ["--file", "{}/w.jsonl"], "w.jsonl, line 1: '' is no word; expected strings with something in them"),
        ("tag", [*texts("a"), "--step", "7"], "has no checkpoint of step 7; it has: 2"),
    ],
)
def test_what_cannot_be_labelled_is_refused(runs, tmp_path, capsys, kind, arguments, message):
    (tmp_path / "empty.txt").write_text("x\n\ny\n")
    (tmp_path / "t.conll").write_text("x O\n")
    for name in ("v.tsv", "v.doc"):
        (tmp_path / name).write_text("x\ty\n")
    write_lines(tmp_path / "t.jsonl", [{"tokens": None}])
    write_lines(tmp_path / "w.jsonl", [{"tokens": ["a", ""]}])
    arguments = [word.format(tmp_path) for word in arguments]
    assert label.main([str(runs[kind][0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_labels_is_refused_and_a_folder_with_labels_elsewhere(runs, tmp_path, capsys):
    language_model = make_origin(tmp_path, TEXTS)
    assert label.main([str(language_model), "--text", "x"]) == 2
    assert "gives text and no labels; continue texts with launcher/generate.py" in capsys.readouterr().err
    folder = str(runs["classify"][1])
    assert evaluate.main([folder, "--data", "x.txt"]) == 2
    assert "gives labels, and does not say of which files; evaluate the run" in capsys.readouterr().err
    assert generate.main([folder, "--prompt", "x"]) == 2
    assert f"gives labels and no text; label texts with launcher/label.py {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id2label": {"0": "good", "2": "bad"}},
            "config.json: id2label={'0': 'good', '2': 'bad'}; expected a label for",
        ),
        ({"id2label": {"0": "good"}}, "expected a label for each number from 0, at least two"),
        ({"problem_type": "regression"}, "config.json: problem_type='regression' is not one label of several"),
        ({"id2label": {"0": "good", "1": "bad"}}, "its config.json says (2"),
        ({"bias": 0.5}, "the bias of its head for labels is not 0, and the one here has none"),
    ],
)
def test_a_folder_with_another_head_is_refused(runs, tmp_path, capsys, changes, message):
    copy = shutil.copytree(runs["tag"][1], tmp_path / "copy")
    if "bias" in changes:
        tensors = load_file(copy / "model.safetensors")
        is_bert = "score.bias" not in tensors
        tensors["classifier.bias" if is_bert else "score.bias"][1] = changes["bias"]
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        if is_bert:  # whose head has a bias here, too
            assert label.main([str(copy), "--text", "x"]) == 0
            return
    else:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))
    assert label.main([str(copy), "--text", "x"]) == 2
    assert message in capsys.readouterr().err
