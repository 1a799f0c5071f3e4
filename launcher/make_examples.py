"""Labelled examples without a download: lines of Python's own library, each code, a comment or part of a docstring.

    python launcher/make_examples.py        # writes corpora/embedded-lines/train.jsonl and valid.jsonl

The marks of a comment and the quotes of a docstring are taken off, so that the words must tell. Lines of a file are all
to train on or all held out, and no text is there twice.
"""

import argparse
import ast
import io
import json
import os
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash

from data.errors import DataError
from data.sources import Document, EmbeddedConfig, Limits, documents, open_source

LABELS = ("code", "comment", "docstring")
EACH = {"train": 2500, "valid": 300}  # lines of each label
SHORTEST, LONGEST = 20, 200  # characters of a line


def lines_of(source: str) -> Iterator[tuple[str, str]]:
    """(line, label) of a Python file; nothing of one that this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return
    inside = set[int]()  # lines that some string goes over
    for token in tokens:
        if token.type == tokenize.STRING and token.end[0] > token.start[0]:
            inside.update(range(token.start[0], token.end[0] + 1))
    for number, line in enumerate(source.split("\n"), 1):
        if (text := line.strip()) and number not in inside and '"""' not in text and "'''" not in text:
            yield (text.lstrip("# "), "comment") if text.startswith("#") else (text, "code")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for line in (ast.get_docstring(node) or "").split("\n"):
                yield line.strip(), "docstring"


def examples() -> dict[str, list[dict[str, str]]]:
    """By part, a fixed order of files, and as many of each label."""
    files = [
        found
        for unit in open_source(EmbeddedConfig(), Limits()).units(2**23)
        for found in documents(unit)
        if isinstance(found, Document)
    ]
    files.sort(key=lambda file: xxhash.xxh3_64_intdigest(file.name.encode()))
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in EACH}
    left = {(part, label): n for part, n in EACH.items() for label in LABELS}
    seen = set[str]()
    for number, file in enumerate(files):
        part = "valid" if number % 8 == 0 else "train"
        of_file = dict.fromkeys(LABELS, 40)  # at most so many of one file
        for text, label in lines_of(file.text):
            wanted = SHORTEST <= len(text) <= LONGEST and of_file[label] and left[part, label]
            if wanted and text not in seen:
                seen.add(text)
                of_file[label] -= 1
                left[part, label] -= 1
                parts[part].append({"text": text, "label": label})
        if not any(left.values()):
            break
    return parts


def write(folder: Path) -> list[str]:
    """Write the files, each whole or not at all. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in examples().items():
        staging = folder / f"{part}.jsonl.tmp"
        staging.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(staging, folder / f"{part}.jsonl")
    return [str(folder / f"{part}.jsonl") for part in EACH]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python launcher/make_examples.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("corpora/embedded-lines"))
    args = parser.parse_args(argv)
    try:
        paths = write(args.output)
    except (DataError, OSError) as error:
        print(f"make_examples: {error}", file=sys.stderr)
        return 2
    print(f"examples   {', '.join(paths)}: lines of {', '.join(LABELS)}")
    print("next       deepspeed launcher/finetune.py --config configs/finetune/classify.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
