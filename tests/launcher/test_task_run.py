"""Fine-tuning for a task, as a user types it: labels, tags and conversations, from start to scores and answers."""

import io
import json
import re

import pytest
from task_runs import CHATML, make_origin, tune, write_lines, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import audit, evaluate, finetune, generate, pretrain
from launcher.task_report import plot, score_table, write_report
from runs import metrics, run

LABELS = ["import", "define", "return"]
TEXTS = {
    "import": ["import json", "import os, sys", "from email import policy", "import asyncio"],
    "define": ["def main():", "class Error(Exception):", "async def read(self):", "def close(self):"],
    "return": ["return None", "return self._value", "raise ValueError(text)", "yield from parts"],
}
LINES = [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]


@pytest.fixture(scope="module")
def texts():
    return [f"{line['text']} # " * 30 for line in LINES] + ["### System:\n### User:\n### Assistant:\n" * 40]


@pytest.fixture(scope="module")
def origin(texts, tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"), texts)


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(recipe, ...) -> the message of a fine-tuning that is refused before anything is started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))

    def start(recipe, *overrides):
        assert pretrain.main(["--config", str(recipe), *overrides], finetune.FINETUNE) == 2
        return capsys.readouterr().err

    return start


def logged(run_dir, name):
    """step -> value"""
    return {line["step"]: line[name] for line in metrics(run_dir) if name in line}


def evaluated(capsys, *arguments):
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_labels_from_two_ranks_to_one_and_into_scores(origin, tmp_path, capsys, refused):
    files = {
        "train": [write_lines(tmp_path / "t.jsonl", LINES)],
        "valid": [write_lines(tmp_path / "v.jsonl", LINES[:11])],
    }
    recipe = write_recipe(tmp_path, origin, {"kind": "classify", "labels": LABELS, **files}, steps=60)
    run_dir, log = tmp_path / "runs/tuned", tmp_path / "log"
    text = run(tune(2, "--config", recipe, "parallel.zero_stage=3", "train.stop_at=6"), log, code=1)  # torchrun's own
    assert "12 texts, 12 targets; 30.00 epochs in all (held out: 11)" in text
    assert "labels: import 33.3%, define 33.3%, return 33.3%" in text
    assert "11 of the held-out texts are in the training files, too" in text
    # 11 examples on two ranks, each counted once: one process gives the same
    found = evaluated(capsys, run_dir)
    assert found["overall"]["loss/valid"] == pytest.approx(logged(run_dir, "loss/valid")[6], rel=1e-5)
    assert found["overall"]["valid/accuracy"] == logged(run_dir, "valid/accuracy")[6]
    table = found["table"].splitlines()
    assert found["labels"] == LABELS
    assert [line.split()[1:] for line in table[-3:]] == [[str(n) for n in row] for row in found["confusion"]]
    assert sum(int(n) for line in table[-3:] for n in line.split()[1:]) == 11

    write_lines(tmp_path / "t.jsonl", LINES[:-1])
    message = refused(recipe)
    assert re.search("other data: its checkpoint has examples '[0-9a-f]{16}', the files of task.train", message)
    write_lines(tmp_path / "t.jsonl", LINES)
    message = refused(recipe, "--allow-change", "task.labels", f"task.labels={[*LABELS, 'more']}")
    assert (
        "holds a run of another model, whose checkpoints cannot be read into this one:\n  task.labels: was" in message
    )
    message = refused(recipe, "--allow-change", "task.labels", f"task.labels={LABELS[::-1]}")
    assert f"the run's head has a row for each of the labels {LABELS}, in this order, and task.labels is" in message

    text = run(tune(1, "--config", recipe), log)
    assert "true \\ predicted  import  define  return" in text
    assert logged(run_dir, "valid/accuracy")[60] == 1.0
    assert logged(run_dir, "valid/f1")[60] == logged(run_dir, "valid/f1_import")[60] == 1.0
    assert sorted(logged(run_dir, "loss/train")) == list(range(1, 61))
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert {"valid/accuracy", "valid/f1_return"} <= set(board.Tags()["scalars"])
    assert "valid/report/text_summary" in board.Tags()["tensors"]
    page = (run_dir / "report.html").read_text()
    assert "true \\ predicted  import  define  return" in page
    assert page.count("<svg") == 7  # training loss, held-out loss, accuracy, F1 and that of each label

    given = write_lines(tmp_path / "given.jsonl", [LINES[0], {"text": "import json", "label": "define"}])
    assert evaluated(capsys, run_dir, "--data", given)["overall"]["valid/accuracy"] == 0.5
    assert evaluate.main([str(run_dir)]) == 0
    assert "tuned step 60, fp32, 11 examples held out" in capsys.readouterr().out
    assert evaluate.main([str(run_dir), "--windows", "3"]) == 2
    assert "--windows is for text; of a task every example counts" in capsys.readouterr().err
    assert evaluate.main([str(run_dir), "--field", "content"]) == 2
    assert "--field content is for text; the columns of a task are those of the run" in capsys.readouterr().err
    assert generate.main([str(run_dir), "--prompt", "x"]) == 2
    assert "gives labels and no text" in capsys.readouterr().err
    assert audit.main([str(run_dir), "--verify"]) == 2
    assert "was fine-tuned on the examples of task.train (task.kind: classify)" in capsys.readouterr().err


CHATS = [("name a module", "import json"), ("name a function", "def main():"), ("say no", "raise ValueError(text)")]


def messages(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.slow
def test_a_tuned_model_gives_the_answers_that_it_was_taught(origin, tmp_path, capsys, monkeypatch):
    two = [*CHATS[0], "and another", "import os, sys"]
    file = write_lines(tmp_path / "c.jsonl", [{"messages": messages(*chat)} for chat in (two, *CHATS[1:])])
    task = {"kind": "chat", "train": [file], "valid": [file]}
    recipe = write_recipe(tmp_path, origin, task, steps=100, global_batch_size=2, micro_batch_size=1)
    text = run(tune(1, "--config", recipe), tmp_path / "log")
    assert "3 conversations in 3 sequences" in text or "3 conversations in 2 sequences" in text
    run_dir = tmp_path / "runs/tuned"
    assert logged(run_dir, "loss/valid")[100] < 0.05
    found = evaluated(capsys, run_dir)["overall"]
    assert found["loss/valid"] == pytest.approx(logged(run_dir, "loss/valid")[100], rel=1e-4)
    assert found["loss/valid_bits_per_byte"] < 0.1

    asked = [word for question, _ in CHATS for word in ("--prompt", question)]
    assert generate.main([str(run_dir), "--chat", "--temperature", "0", *asked]) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for _, answer in CHATS)
    monkeypatch.setattr("sys.stdin", io.StringIO("name a module\n\nand another\n"))  # one conversation
    assert generate.main([str(run_dir), "--chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "import json\nimport os, sys\n"
    assert generate.main([str(run_dir), "--chat", "--prompt", "name " * 80]) == 2
    assert "and the model reads 64 at most; begin another one" in capsys.readouterr().err
    assert generate.main([str(run_dir), "--chat", "--prompt", " "]) == 2
    assert "the message is empty; say something" in capsys.readouterr().err


def test_chat_is_refused_where_no_template_is_known(origin, capsys):
    assert generate.main([str(origin), "--chat", "--prompt", "x"]) == 2
    assert f"{origin} cannot chat: its tokenizer comes with no chat template" in capsys.readouterr().err
    assert generate.main([str(origin)]) == 2
    assert "there is nothing to continue; give --prompt TEXT, or --chat" in capsys.readouterr().err
    assert generate.main([str(origin), "--prompt", "x", "--system", "y"]) == 2
    assert "--system has no effect without --chat" in capsys.readouterr().err


def test_a_folder_with_a_chat_template_can_be_talked_to(texts, tmp_path, capsys):
    folder = make_origin(tmp_path, texts, CHATML)
    assert generate.main([str(folder), "--chat", "--system", "Be brief.", "--prompt", "x", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


SENTENCES = [
    ("Ada Byron wrote to Mary", "B-PER I-PER O O B-PER"),
    ("Charles Babbage of London read", "B-PER I-PER O B-LOC O"),
    ("the engine was in London", "O O O O B-LOC"),
]


@pytest.mark.slow
@pytest.mark.long  # the loop is that of labels
def test_tags_become_entities(origin, tmp_path, capsys):
    file = tmp_path / "t.conll"
    sentences = [zip(words.split(), tags.split(), strict=True) for words, tags in SENTENCES]
    file.write_text("\n\n".join("\n".join(f"{word} {tag}" for word, tag in sentence) for sentence in sentences))
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    task = {"kind": "tag", "labels": labels, "train": [str(file)], "valid": [str(file)]}
    recipe = write_recipe(tmp_path, origin, task, steps=80)
    text = run(tune(2, "--config", recipe), tmp_path / "log")
    run_dir = tmp_path / "runs/tuned"
    assert "3 sentences, 15 targets" in text
    assert logged(run_dir, "valid/entity_f1")[80] == logged(run_dir, "valid/entity_f1_LOC")[80] == 1.0
    found = evaluated(capsys, run_dir)
    assert found["overall"]["valid/entity_recall"] == 1.0
    assert "PER        1.0000  1.0000  1.0000      3" in found["table"]


# -- refusals ------------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
REFUSED = {
    "label": (
        ["text", "label"],
        [{"text": "a", "label": "other"}],
        "t.jsonl, line 1: the label 'other' is not in task.labels",
    ),
    "empty": ([], [LINES[0], {"text": "", "label": "import"}], "t.jsonl, line 2: its text is empty"),
    "long": (
        [],
        [{"text": "import " * 99, "label": "import"}],
        "model.seq_len=64 is the longest; say task.too_long: cut",
    ),
    "column": (
        [],
        [{"review": "a", "label": "import"}],
        "t.jsonl, line 1: there is no field 'text', there is 'review'",
    ),
    "nothing": ([], [], "there is no example in it; name files with examples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_examples_are_refused_before_anything_is_started(origin, tmp_path, refused, case):
    _, lines, message = REFUSED[case]
    task = {"kind": "classify", "labels": LABELS, "train": [write_lines(tmp_path / "t.jsonl", lines)]}
    assert message in refused(write_recipe(tmp_path, origin, task))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "t.jsonl, line 1, message 1 has the role 'bot'; expected one of",
        ),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "message 2, of the assistant, is ''; expected a string"),
        ({"messages": [{**USER, "content": "x " * 99}, ANSWER]}, "tokens, model.seq_len=64 is the longest"),
    ],
)
def test_bad_conversations_are_refused_before_anything_is_started(origin, tmp_path, refused, changes, message):
    task = {"kind": "chat", "train": [write_lines(tmp_path / "t.jsonl", [changes])]}
    assert message in refused(write_recipe(tmp_path, origin, task))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.labels=[a]", "task.labels"),
        ("task.lables=[a]", "task.lables: no such key; did you mean task.labels?"),
        (
            "task.valid_fraction=1e-9",
            "of 12 examples leaves 12 to train on and 0 held out; use another fraction or more",
        ),
        ("data.skip=[{samples: [0, 1]}]", "data.skip: set, and without effect on task.kind=classify, which reads"),
        ("eval.windows=3", "eval.windows: set, and without effect on task.kind=classify"),
        ("eval.keep_best=valid/f2", "eval.keep_best=valid/f2 is nothing that this run measures; it measures"),
        ("task.template=plain", "task.template: no such key; it is a key of another task than this one"),
    ],
)
def test_options_that_cannot_be_are_refused(origin, tmp_path, refused, override, message):
    task = {"kind": "classify", "labels": LABELS, "train": [write_lines(tmp_path / "t.jsonl", LINES)]}
    assert message in refused(write_recipe(tmp_path, origin, task), override)


# -- the report ----------------------------------------------------------------------------------------------------------


def test_a_report_has_tables_and_curves(tmp_path):
    lines = [
        {"step": 1, "loss/train": 2.0},
        {"step": 2, "loss/train": "nan"},
        {"step": 3, "loss/train": 1.0, "valid/f1": 0.5},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_report(tmp_path, 3, {"valid/f1": 0.5}, "a < b", tmp_path / "metrics.jsonl")
    page = (tmp_path / "report.html").read_text()
    assert "valid/f1  0.5000" in page
    assert "a &lt; b" in page
    assert page.count("<svg") == 2
    assert page.count("<circle") == 3
    assert plot("x", []) == ""
    assert score_table("label", {}) == "label  precision  recall  f1  count"
