"""Documents of a gigabyte: refused by place in little memory, or taken in memory that is known."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards import Shard

ROOT = Path(__file__).parents[2]
LINES = [b'{"text": "line %d, of a few words"}\n' % number for number in range(2000)]
WORDS = b"some words of a long, long story; " * 2**15
SCRIPT = """
import json, resource, sys
from data.config import DataConfig
from data.prepare import prepare

if __name__ == "__main__":
    manifest = prepare(DataConfig.model_validate_json(sys.argv[1]))
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024  # of the largest of the workers
    documents = {name: source.splits["train"].documents for name, source in manifest.sources.items()}
    print(json.dumps([peak_mib, documents, {name: source.left_out for name, source in manifest.sources.items()}]))
"""


def prepare_apart(folder, **changes):
    """[peak memory of the workers in MiB, documents by source, left out by source] of lines.jsonl and *.txt."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "small.txt").write_bytes(b"".join(LINES))
    cfg = {
        "corpus": str(folder / "corpus"),
        "sources": [
            {"kind": "jsonl", "field": "text", "paths": [str(folder / "lines.jsonl")]},
            {"kind": "text", "paths": [f"{folder}/*.txt"]},
        ],
        "tokenizer": {"vocab_size": 300, "train_bytes": 2**16},
        "valid_fraction": 0.0, "on_bad": "skip", "workers": 2, **changes,
    }  # fmt: skip
    command = [sys.executable, str(folder / "script.py"), json.dumps(cfg)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path):
    """Emptied afterwards, where pytest would keep it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.fault(49)
def test_a_gigabyte_is_named_and_costs_a_quarter_of_it(folder):
    """Of the default limit, 256 MiB, a worker holds at most as much and then nothing; the files are holes mostly."""
    with open(folder / "lines.jsonl", "wb") as stream:
        stream.writelines(LINES)
        begin = stream.tell()
        stream.write(b'{"text": "')
        stream.seek(2**30, 1)
        stream.write(b'"}\n')
        stream.writelines(LINES)
    with open(folder / "large.txt", "wb") as stream:
        stream.truncate(2**30)
    peak_mib, documents, left_out = prepare_apart(folder)
    assert documents == {"jsonl": 2 * len(LINES), "text": 1}
    assert left_out == {"jsonl": {"bad:too_long": 1}, "text": {"bad:too_long": 1}}
    assert [json.loads(line)["message"] for line in (folder / "corpus" / "bad.jsonl").read_text().splitlines()] == [
        f"{folder}/lines.jsonl, line {len(LINES) + 1}, byte {begin}: the line is longer than 268435456 bytes; cut it up "
        "or raise data.max_document_bytes",
        f"{folder}/large.txt: the text is longer than 268435456 bytes; cut it up or raise data.max_document_bytes",
    ]
    assert peak_mib < 400  # 313 here, of which 57 are Python and its modules


@pytest.mark.slow
@pytest.mark.fault(49)
def test_a_large_document_is_taken_in_a_multiple_of_its_size(folder):
    """The line, its text, the text in UTF-8 and in parts, and its ids: 6 times its size for words."""
    size = 128 * len(WORDS)
    with open(folder / "lines.jsonl", "wb") as stream:
        stream.write(b'{"text": "')
        stream.writelines([WORDS] * 128)
        stream.write(b'"}\n')
    with open(folder / "large.txt", "wb") as stream:
        stream.writelines([WORDS] * 128)
    peak_mib, documents, left_out = prepare_apart(folder, max_document_bytes=size + 100, workers=1)
    assert (documents, left_out) == ({"jsonl": 1, "text": 2}, {"jsonl": {}, "text": {}})
    assert peak_mib < 7 * size / 2**20 + 100
    line, text = (Shard(folder / "corpus" / name) for name in ("jsonl/train-00000-000", "text/train-00000-000"))
    assert line.document(0).tolist() == text.document(0).tolist()
