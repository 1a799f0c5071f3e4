"""Label new texts with a model that was tuned for it: a label for each text, or the entities that its words name.

    python launcher/label.py runs/NAME --text 'a text' --text 'another'
    python launcher/label.py exports/NAME --file texts.txt --output labels.jsonl
    zcat more.jsonl.gz | python launcher/label.py runs/NAME --file - --json

Takes a run that launcher/finetune.py tuned with task.kind classify or tag, or the folder that it was exported to. Texts
are encoded and read as at the run's evaluations, so what is given here is what was scored there. A tagger is given words:
those between white space, or where the run's task.join is "" every character. Exit code 2 when something cannot be read.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from data.classify import Placed, place_texts
from data.errors import DataError
from data.records import RecordError, read_records, text_lines
from data.row_loader import RowSet, eval_rows
from data.tag import place_words
from data.task import ClassifyTask, Column, Format, TagTask, WordToken
from launcher.config import ConfigError, FinetuneConfig
from launcher.scores import entities, kinds_of
from launcher.tally import label_log_probs
from launcher.task_examples import frame_for
from launcher.trained import Trained, how_to_fill, load_trained
from model.hf_config import is_masked
from model.hf_folder import DTYPES
from parallel.checkpoint import CheckpointError

BATCH = 32  # texts a forward
_LINES = re.compile(r"\.txt(\.gz|\.zst)?$")  # ends of names of files with a text a line


class Text(NamedTuple):
    """What is to be labelled."""

    where: str
    text: str
    words: list[str]  # empty for a label of the whole
    spans: list[tuple[int, int]]  # of each word in the text


class Labeller:
    """A model with a head for labels, and how its texts are encoded."""

    def __init__(self, trained: Trained, place: Path) -> None:
        """Raises ValueError where the model gives no labels."""
        if trained.head is None and is_masked(trained.model.cfg):
            raise ValueError(
                f"{place} is a masked model, which fills in hidden tokens and gives no labels; "
                f"{how_to_fill(trained, place)}. For labels tune it: launcher/finetune.py and task.kind classify or tag"
            )
        if trained.head is None:
            raise ValueError(
                f"{place} gives text and no labels; continue texts with launcher/generate.py, or tune it with "
                "launcher/finetune.py and task.kind classify or tag"
            )
        self.trained, self.head = trained, trained.head
        self.join = self.head.words.get("join", " ")
        self.word_token: WordToken = "last" if self.head.words.get("word_token") == "last" else "first"
        checkpoint = trained.checkpoint
        task = checkpoint.cfg.task if checkpoint and isinstance(checkpoint.cfg, FinetuneConfig) else None
        self.task = task if isinstance(task, ClassifyTask | TagTask) else None  # None: of an exported folder

    def text(self, where: str, value: Any) -> Text:
        """value: a text, or for a tagger also a list of words. Raises RecordError for what is empty or something else."""
        if self.head.per_token and isinstance(value, list) and value:
            if wrong := [word for word in value if not isinstance(word, str) or not word.strip()]:
                raise RecordError(f"{where}: {wrong[0]!r} is no word; expected strings with something in them")
            starts = [sum(map(len, value[:at])) + len(self.join) * at for at in range(len(value))]
            return Text(
                where, self.join.join(value), value, [(at, at + len(w)) for at, w in zip(starts, value, strict=True)]
            )
        expected = "a text or a list of words" if self.head.per_token else "a text"
        if not isinstance(value, str):
            raise RecordError(f"{where}: is {str(value)[:40]!r}; expected {expected}")
        if not value.strip():
            raise RecordError(f"{where}: the text is empty; expected {expected} with something in it")
        found = list(re.finditer(r"\S+" if self.join else r"\S", value)) if self.head.per_token else []
        return Text(where, value, [word[0] for word in found], [word.span() for word in found])

    def columns(self, fmt: Format, field: str | None) -> list[Column]:
        """The column, or field, of a file that has the texts."""
        if field is not None:
            return [int(field) if re.fullmatch(r"-?\d+", field) and fmt != "jsonl" else field]
        if isinstance(self.task, ClassifyTask):
            return [self.task.text]
        if isinstance(self.task, TagTask) and self.task.words is not None:
            return [self.task.words]
        return [0 if fmt == "conll" else "tokens" if self.head.per_token else "text"]

    def place(self, texts: Sequence[Text], cut: bool) -> list[Placed]:
        """Raises RecordError for a text that is too long and not to be cut."""
        too_long = "cut" if cut or (self.task is not None and self.task.too_long == "cut") else "refuse"
        where, seq_len, tokenizer = (
            [text.where for text in texts],
            self.trained.model.cfg.seq_len,
            self.trained.tokenizer,
        )
        frame = frame_for(self.trained.model.cfg, tokenizer)
        if self.head.per_token:
            words = [text.words for text in texts]
            return place_words(words, where, tokenizer, seq_len, too_long, self.join, self.word_token, frame)
        return place_texts([text.text for text in texts], where, tokenizer, seq_len, too_long, frame)

    def label(self, texts: Sequence[Text], placed: Sequence[Placed], batch: int) -> Iterator[dict[str, Any]]:
        """What is said of each text, in their order."""
        rows = RowSet([of.row([0] * len(of.at)) for of in placed], [], self.trained.model.cfg.seq_len)
        device = self.trained.model.embed.weight.device
        with torch.inference_mode():
            found = label_log_probs(self.trained.model, eval_rows(rows, batch, 0, 1), device)
            for text, of, (log_probs, _) in zip(texts, placed, found, strict=True):
                yield (
                    self._of_words(text, of, log_probs.exp())
                    if self.head.per_token
                    else self._of_text(text, log_probs[0].exp())
                )

    def _of_text(self, text: Text, probabilities: Tensor) -> dict[str, Any]:
        """probabilities: (L,)"""
        by_label = dict(zip(self.head.labels, probabilities.tolist(), strict=True))
        return {"text": text.text, "label": self.head.labels[int(probabilities.argmax())], "probabilities": by_label}

    def _of_words(self, text: Text, placed: Placed, probabilities: Tensor) -> dict[str, Any]:
        """probabilities: (words that have a place, L)"""
        have = [word for word, at in enumerate(placed.at.tolist()) if at >= 0]
        best, numbers = probabilities.max(dim=-1)
        tags, sure = [self.head.labels[number] for number in numbers.tolist()], best.tolist()
        of_word = dict(zip(have, zip(tags, sure, strict=True), strict=True))
        found = {
            "text": text.text,
            "words": text.words,
            "tags": [of_word[word][0] if word in of_word else None for word in range(len(text.words))],
            "probabilities": [of_word[word][1] if word in of_word else None for word in range(len(text.words))],
        }
        if kinds_of(self.head.labels):
            found["entities"] = [
                {
                    "kind": entity.kind,
                    "text": text.text[text.spans[have[entity.first]][0] : text.spans[have[entity.last]][1]],
                    "start": text.spans[have[entity.first]][0],
                    "end": text.spans[have[entity.last]][1],
                    "probability": sum(sure[entity.first : entity.last + 1]) / (entity.last + 1 - entity.first),
                }
                for entity in entities(tags)
            ]
        return found


# -- the command ------------------------------------------------------------------------------------------------------------


def read_texts(labeller: Labeller, texts: list[str], files: list[str], field: str | None, stdin: TextIO) -> list[Text]:
    """All that are given, in their order: of the command line, then of files. Raises DataError."""
    found = [labeller.text(f"--text {number}", text) for number, text in enumerate(texts, 1)]
    formats = (TagTask if labeller.head.per_token else ClassifyTask).formats
    if field is not None and all(path == "-" or _LINES.search(path) for path in files):
        raise RecordError(
            f"--field {field}: has no effect on {', '.join(files) or 'texts of the command line'}, of which a whole line is "
            "a text; leave it out"
        )
    for path in files:
        if path == "-":
            lines = enumerate(stdin, 1)
            found += [labeller.text(f"standard input, line {number}", line.rstrip("\r\n")) for number, line in lines]
        elif _LINES.search(path):
            found += [labeller.text(*line) for line in text_lines(path)]
        else:
            records = read_records([path], lambda fmt: labeller.columns(fmt, field), None, formats)
            found += [labeller.text(where, value) for where, (value,) in records]
    if not found:
        raise RecordError("there is nothing to label; give --text TEXT or --file FILE with texts in it")
    return found


def for_people(found: dict[str, Any]) -> str:
    """A line of one text's label, or a text and its entities."""
    if "label" in found:
        return f"{found['label']}  {found['probabilities'][found['label']]:.4f}  {found['text']}"
    if "entities" in found:
        named = [
            f"  {e['kind']}  {e['probability']:.4f}  {e['text']}  ({e['start']}:{e['end']})" for e in found["entities"]
        ]
        return "\n".join([found["text"], *named])
    pairs = zip(found["words"], found["tags"], strict=True)
    return " ".join(word if tag is None else f"{word}/{tag}" for word, tag in pairs)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/label.py",
        description="Label texts with a run tuned for labels or tags, or with the folder that it was exported to.",
        epilog="example: python launcher/label.py runs/embedded-classify --text 'return self.name' --json",
    )
    parser.add_argument("model", type=Path, help="a run's folder, or a Hugging Face folder such as export.py writes")
    parser.add_argument("--text", action="append", default=[], help="to label; may be repeated")
    parser.add_argument("--file", action="append", default=[], help="with texts: .txt or - (standard input), one a line; or "
                        "a form that the task's own files may have, such as .jsonl; may be repeated")  # fmt: skip
    parser.add_argument("--field", help="of such a file: the column or field with the texts (default: the run's own; of a "
                        "folder text, or for a tagger tokens, a list of words)")  # fmt: skip
    parser.add_argument("--cut", action="store_true", help="leave out the ends of texts that are too long (default: as the "
                        "run's task.too_long; of a folder refuse them)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write JSON lines to this file, which must not exist")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--step", type=int, help="checkpoint of a run to read (default: the newest)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"texts a forward (default {BATCH})")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: what the run trained in, else fp32)")
    return parser.parse_args(argv)


def label(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Raises what main tells of, before the first text is labelled."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}; expected at least 1")
    if args.output is not None and args.output.exists():
        raise ValueError(f"--output {args.output} is there already; name another file, or remove it")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(
            f"--output {args.output}: there is no folder {args.output.parent}; make it, or name another file"
        )
    trained = load_trained(args.model, args.step, None if args.dtype is None else DTYPES[args.dtype])
    labeller = Labeller(trained, args.model)
    texts = read_texts(labeller, args.text, args.file, args.field, sys.stdin)
    placed = labeller.place(texts, args.cut)
    if cut := sum(of.is_cut for of in placed):
        print(f"label: {cut} of {len(texts)} texts are cut at {trained.model.cfg.seq_len} tokens", file=sys.stderr)
    return labeller.label(texts, placed, args.batch_size)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        labelled = label(args)
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"label: {error}", file=sys.stderr)
        return 2
    if args.output is None:
        for found in labelled:
            print(json.dumps(found, ensure_ascii=False) if args.json else for_people(found))
        return 0
    staging = args.output.with_name(args.output.name + ".tmp")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            count = sum(bool(file.write(json.dumps(found, ensure_ascii=False) + "\n")) for found in labelled)
        os.replace(staging, args.output)
    except OSError as error:
        staging.unlink(missing_ok=True)
        print(f"label: {args.output} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"{count:,} texts labelled, written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
