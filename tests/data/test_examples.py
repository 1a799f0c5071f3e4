"""Files of labelled examples and conversations: what is read of them, and how each kind of bad input is told."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.chat import read_conversations
from data.errors import DataError
from data.examples import hold_out, read_examples, read_sentences, shares
from data.task import ChatTask, ClassifyTask, TagTask

TAGS = ["O", "B-PER", "I-PER"]


def write(tmp_path, name, text):
    path = tmp_path / name
    payload = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(payload) if name.endswith(".gz") else payload)
    return str(path)


def classified(path, **options):
    task = ClassifyTask(kind="classify", labels=["0", "1"], train=[path], **options)
    return [(example.text, example.label) for example in read_examples(task, task.train)]


def tagged(path, **options):
    task = TagTask(kind="tag", labels=TAGS, train=[path], **options)
    return [(sentence.words, sentence.tags) for sentence in read_sentences(task, task.train)]


def chat(path):
    task = ChatTask(kind="chat", train=[path])
    return read_conversations(task, task.train)


def test_every_format_gives_the_same_examples(tmp_path):
    expected = [("good, very", "1"), ('a "bad" one', "0")]
    files = {
        "a.tsv": 'good, very\t1\r\na "bad" one\t0\r\n',
        "a.tsv.gz": 'good, very\t1\na "bad" one\t0\n\n',
    }
    for name, text in files.items():
        assert classified(write(tmp_path, name, text), text=0, label=-1) == expected
    named = {
        "b.tsv": '\ufefflabel\ttext\n1\tgood, very\n0\ta "bad" one\n',
        "b.csv": 'label,text\n1,"good, very"\n0,"a ""bad"" one"\n',
        "b.jsonl": '{"text": "good, very", "label": 1}\n\n{"label": "0", "text": "a \\"bad\\" one"}\n',
    }
    for name, text in named.items():
        assert classified(write(tmp_path, name, text)) == expected
    table = pa.table({"text": [text for text, _ in expected], "label": [1, 0]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert classified(str(tmp_path / "b.parquet")) == expected


def test_a_csv_row_may_go_over_lines_and_is_named_by_its_first(tmp_path):
    path = write(tmp_path, "a.csv", 'label,text\n1,"two\nlines"\n2,x\n')
    with pytest.raises(
        DataError, match=r"a\.csv, line 4: the label '2' is not in task.labels, '0', '1'.*have '1', '2'"
    ):
        classified(path)


BAD_ROWS = {
    "label": ("a.tsv", "text\tlabel\nx\t1\ny\tgood\n", r"line 3: the label 'good' is not in task.labels"),
    "empty text": ("a.tsv", "text\tlabel\nx\t1\n \t1\n", r"line 3: its text is empty"),
    "empty label": ("a.tsv", "text\tlabel\nx\t\n", r"line 2: its label is ''; expected a string or"),
    "no column": ("a.csv", "review,label\nx,1\n", r"a.csv, line 1: has 0 columns 'text'; .*there are 'review', 'label'"),
    "ragged": ("a.csv", "text,label\nx,y,1\n", r"line 2 has 3 columns; expected 2: text, label"),
    "quotes": ("a.csv", 'text,label\n"x" y,1\n', r"line 2: is no row of CSV"),
    "no field": ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', r"line 2: there is no field 'label', there is 't"),
    "no object": ("a.jsonl", "[1]\n", r"line 1: is list; expected an object with 'text' and 'label'"),
    "no JSON": ("a.jsonl", "{\n", r"line 1: is not JSON"),
    "a number": ("a.jsonl", '{"text": 5, "label": 1}\n', r"line 1: its text is 5; expected a string"),
    "a fraction": ("a.jsonl", '{"text": "x", "label": 0.5}\n', r"line 1: its label is 0.5; expected a string or a whole"),
    "encoding": ("a.tsv", "text\tlabel\n好\t1\n".encode("gb18030"), r"a.tsv, line 2: 0xBA is not UTF-8"),
    "ending": ("a.doc", "x", r"a.doc: its name does not say what it is; .*\.tsv, \.csv.* task.format instead"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line(tmp_path, case):
    name, text, message = BAD_ROWS[case]
    with pytest.raises(DataError, match=message):
        classified(write(tmp_path, name, text))


def test_other_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"a\.tsv, line 1 has 1 columns; expected one of number 1 \(counted from 0\)"):
        classified(write(tmp_path, "a.tsv", "x\n"), text=0, label=1)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has 0 columns 'label'; expected one, and there are 'text'"):
        classified(str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"b\.parquet is no whole parquet file"):
        classified(str(tmp_path / "b.parquet"))
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(b"x\t1\n" * 1000)[:20])
    with pytest.raises(DataError, match=r"c\.tsv\.gz: the packed file is cut short"):
        classified(str(tmp_path / "c.tsv.gz"))
    with pytest.raises(DataError, match="matches no file"):
        classified(str(tmp_path / "none.tsv"))


def test_empty_texts_can_be_left_out(tmp_path):
    path = write(tmp_path, "a.csv", "label,text\n1,x\n0,\n")
    assert classified(path, empty="leave_out") == [("x", "1"), ("", "0")]  # the encoder counts it


def test_sentences_of_every_format(tmp_path):
    expected = [(["Ada", "Byron", "wrote"], ["B-PER", "I-PER", "O"]), (["Yes"], ["O"])]
    conll = "-DOCSTART- -X- O\n\nAda NNP B-PER\nByron NNP I-PER\nwrote VBD O\n\n\nYes UH O"
    assert tagged(write(tmp_path, "a.conll", conll)) == expected
    assert tagged(write(tmp_path, "a.txt.gz", conll)) == expected
    lines = "".join(json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in expected)
    assert tagged(write(tmp_path, "a.jsonl", lines)) == expected
    pq.write_table(pa.table({"w": [w for w, _ in expected], "t": [t for _, t in expected]}), tmp_path / "a.parquet")
    assert tagged(str(tmp_path / "a.parquet"), words="w", tags="t") == expected


BAD_SENTENCES = {
    "tag": ("a.conll", "Ada B-PER\n\nRome B-LOC\n", r"a.conll, line 3: the label 'B-LOC' is not in task.labels"),
    "one column": ("a.conll", "Ada B-PER\nByron\n", r"a.conll, line 2 has one column, 'Byron'; expected a word and its tag"),
    "lengths": ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', r"line 1: 2 words and 1 tags"),
    "no list": ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', r"line 1: its words are 'a'; expected a list"),
    "empty word": ("a.jsonl", '{"tokens": [" "], "tags": ["O"]}', r"line 1: its word is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SENTENCES)
def test_bad_sentences_are_refused_with_file_and_line(tmp_path, case):
    name, text, message = BAD_SENTENCES[case]
    with pytest.raises(DataError, match=message):
        tagged(write(tmp_path, name, text))


def test_names_do_not_go_with_conll(tmp_path):
    with pytest.raises(DataError, match=r"columns of conll files are numbers, from 0 \(-1: the last\); got 'tokens'"):
        tagged(write(tmp_path, "a.conll", "Ada B-PER\n"), words="tokens")


def test_conversations(tmp_path):
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")]
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})
    (found,) = chat(write(tmp_path, "a.jsonl", line))
    assert [tuple(message) for message in found.messages] == messages
    assert found.where.endswith("a.jsonl, line 1")


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
BAD_CHATS = {
    "role": ([{"role": "human", "content": "Hi"}], r"line 2, message 1 has the role 'human'; expected one of system, user"),
    "empty": ([USER, {"role": "assistant", "content": " "}], r"line 2, message 2, of the assistant, is ' '; expected a str"),
    "no answer": ([USER], r"line 2: the last message is of the user; expected one of the assistant"),
    "system": ([USER, {"role": "system", "content": "x"}, ANSWER], r"message 2 is of the system; expected that of the"),
    "no content": ([{"role": "user"}], r"message 1 is {'role': 'user'}; expected {\"role\""),
    "more": ([{**USER, "tool_calls": ["f"]}, ANSWER], r"message 1 has tool_calls, which would be ignored"),
    "none": ([], r"line 2: its messages are \[\]; expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_conversations_are_refused_with_file_and_line(tmp_path, case):
    messages, message = BAD_CHATS[case]
    text = "".join(json.dumps({"messages": of}) + "\n" for of in ([USER, ANSWER], messages))
    with pytest.raises(DataError, match=message):
        chat(write(tmp_path, "a.jsonl", text))


def test_copies_of_a_text_are_held_out_together(tmp_path):
    path = write(tmp_path, "a.tsv", "".join(f"text {n % 500}\t1\n" for n in range(1000)))
    task = ClassifyTask(kind="classify", labels=["0", "1"], train=[path], text=0, label=1)
    rest, held = hold_out(read_examples(task, task.train), 0.2, seed=7)
    assert len(rest) + len(held) == 1000
    assert 100 < len(held) < 300
    assert not {example.text for example in rest} & {example.text for example in held}
    assert shares("aab") == "a 66.7%, b 33.3%"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "conll"}, "format=conll cannot hold what this task needs; use one of tsv, csv"),
        ({"valid": ["b"], "valid_fraction": 0.1}, "valid and valid_fraction=0.1 are both given"),
        ({"labels": ["a", "b", "a"]}, "labels names 'a' more than once"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValidationError, match=message):
        ClassifyTask(**{"kind": "classify", "labels": ["0", "1"], "train": ["a"], **options})
