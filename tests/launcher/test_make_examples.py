"""Examples of the embedded library: what a line is, and that nothing is there twice."""

import json

from launcher import make_examples

SOURCE = '''"""A module of some kind."""

import os  # not a comment of its own


# what follows is a function
def f(x):
    """Say what it is.

    At some length.
    """
    return """of several
    lines""", x
'''


def test_the_lines_of_a_file():
    assert list(make_examples.lines_of(SOURCE)) == [
        ("import os  # not a comment of its own", "code"),
        ("what follows is a function", "comment"),
        ("def f(x):", "code"),
        ("A module of some kind.", "docstring"),
        ("Say what it is.", "docstring"),
        ("", "docstring"),
        ("At some length.", "docstring"),
    ]
    assert list(make_examples.lines_of("def f(:")) == []


def test_written_whole_with_as_many_of_each_label(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_examples, "EACH", {"train": 60, "valid": 20})
    assert make_examples.main(["--output", str(tmp_path / "x")]) == 0
    assert "configs/finetune/classify.yaml" in capsys.readouterr().out
    texts = set()
    for part, each in make_examples.EACH.items():
        lines = [json.loads(line) for line in (tmp_path / f"x/{part}.jsonl").read_text().splitlines()]
        assert {
            label: sum(line["label"] == label for line in lines) for label in make_examples.LABELS
        } == dict.fromkeys(make_examples.LABELS, each)
        texts |= {line["text"] for line in lines}
    assert len(texts) == 3 * 80
    (tmp_path / "file").touch()
    assert make_examples.main(["--output", str(tmp_path / "file")]) == 2
    assert "make_examples: " in capsys.readouterr().err
