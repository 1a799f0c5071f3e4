"""Loss, perplexity and bits a byte of a run's checkpoint or a Hugging Face folder, source by source; scores of a task.

    python launcher/evaluate.py runs/NAME                                       # on what it holds out
    python launcher/evaluate.py runs/NAME --step 1000 --data texts/*.txt more.jsonl --field text --json
    python launcher/evaluate.py exports/NAME --data texts/*.txt
    python launcher/evaluate.py runs/NAME --step 1000 --save held-out           # to evaluations/held-out/, and TensorBoard

On its corpus a run is given the numbers that it logged itself at that step: the same windows, batches and weights of the
sources. Of text files every document counts, after the end of another one as in training, cut every seq_len tokens; its
end-of-document token is foreseen like any other, and the mean of several sources is over their tokens.
Exit code 2 when something cannot be read or asked for.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.corpus import Corpus
from data.dataset import open_valid, shares_at
from data.errors import DataError
from data.formats import Bad, Document
from data.loader import IGNORE, eval_batches
from data.manifest import MANIFEST
from data.masking import Masker
from data.sources import FilesConfig, JsonlConfig, Limits, TextConfig, documents, open_source
from data.store import is_url
from data.tokenizer import Tokenizer
from launcher.config import ConfigError, FinetuneConfig, RunConfig
from launcher.evaluate_task import on_examples, task_table
from launcher.held_out import Batch, Sums, bits_per_byte, combine, perplexity, sum_losses
from launcher.results import keep, refuse_other_data
from launcher.run_data import masker_of
from launcher.trained import Checkpoint, Trained, load_trained
from model.hf_config import is_masked
from model.hf_folder import DTYPES
from parallel.checkpoint import CheckpointError

TEXT_FIELD = "text"
DEFAULT_BATCH = 8  # sequences a forward, of a Hugging Face folder
SHARD_BYTES = 2**23  # of text that is read at a time
# what a run logs of all its held-out text
_LOGGED = {"loss": "loss/valid", "perplexity": "loss/valid_perplexity", "bits_per_byte": "loss/valid_bits_per_byte"}


class Result(NamedTuple):
    """What is known of one source."""

    sums: Sums
    n_bytes: float  # UTF-8 bytes of the text that the targets stand for; 0 where that is not known

    def values(self) -> dict[str, float]:
        loss = self.sums.nats / self.sums.targets
        found = {"loss": loss, "perplexity": perplexity(loss)}
        if self.n_bytes:
            found["bits_per_byte"] = bits_per_byte(loss, self.n_bytes / self.sums.targets)
        return found | {"tokens": self.sums.targets}


# -- the held-out part of a corpus ------------------------------------------------------------------------------------------


def on_corpus(trained: Trained, location: str | None, windows: int | None, batch: int) -> dict[str, Any]:
    """As the train loop evaluates. location: a prepared corpus, None for the run's own."""
    checkpoint = trained.checkpoint
    if checkpoint is None:
        raise ValueError(
            f"a Hugging Face folder has no corpus of its own, and ids of {location or 'one'} may not be its own; name text "
            "or JSONL files with --data"
        )
    cfg, valid = open_held_out(checkpoint.cfg, location)
    _check_tokenizer(trained, valid, cfg)
    count = checkpoint.cfg.eval.windows if windows is None else windows
    masker = masker_of(checkpoint.cfg, trained.tokenizer)
    sums = {name: _of_corpus(trained, corpus, count, batch, masker) for name, corpus in valid.items()}
    losses = {name: of_source.nats / of_source.targets for name, of_source in sums.items()}
    overall = combine(losses, _shares(checkpoint, valid), valid, masked=masker is not None)
    return {
        "text": "held out",
        "overall": {short: overall[key] for short, key in _LOGGED.items() if key in overall},
        "sources": {
            name: Result(of_source, 0 if masker else valid[name].bytes_per_token * of_source.targets).values()
            for name, of_source in sums.items()
        },
    }


def open_held_out(run: RunConfig, location: str | None) -> tuple[DataConfig, dict[str, Corpus]]:
    """The data section as it is read, and what is held out, by source. Raises ValueError or DataError where nothing is."""
    cfg = run.data if location is None else run.data.model_copy(update={"corpus": location})
    if not is_url(cfg.corpus) and not Path(cfg.corpus).is_dir():
        raise ValueError(
            f"the run's corpus {cfg.corpus} is not here; name its copy, or text or JSONL files, with --data"
        )
    valid, not_evaluated = open_valid(cfg, run.model.seq_len)
    for line in not_evaluated:
        print(f"evaluate: {line}", file=sys.stderr)
    if not valid:
        raise ValueError(f"{cfg.corpus} holds nothing out for the run's sources; name text or JSONL files with --data")
    return cfg, valid


def _of_corpus(trained: Trained, corpus: Corpus, windows: int, batch: int, masker: Masker | None) -> Sums:
    with torch.inference_mode():
        batches = eval_batches(corpus, windows, batch, 0, 1, masker)
        return sum_losses(trained.model, batches, trained.model.embed.weight.device)


def _check_tokenizer(trained: Trained, valid: dict[str, Corpus], cfg: DataConfig) -> None:
    theirs = next(iter(valid.values())).tokenizer.fingerprint
    if theirs != trained.tokenizer.fingerprint:
        raise ValueError(
            f"{cfg.corpus} was prepared with another tokenizer ({theirs}) than the run's ({trained.tokenizer.fingerprint}); "
            "name a copy of the run's corpus, or its texts"
        )


def _shares(checkpoint: Checkpoint, valid: dict[str, Corpus]) -> dict[str, float]:
    """Of the sources in what the checkpoint's last step read; of raw text, that was streamed, by their size."""
    cursor = checkpoint.reader.manifest.cursor
    if "eras" not in cursor:
        return {name: float(corpus.n_tokens) for name, corpus in valid.items()}
    return shares_at(cursor, max(0, cursor["samples"] - checkpoint.cfg.global_batch_size))


# -- text -------------------------------------------------------------------------------------------------------------------


def on_texts(trained: Trained, paths: list[str], field: str, windows: int | None, batch: int) -> dict[str, Any]:
    """Every path is a source."""
    if is_masked(trained.model.cfg):
        raise ValueError(
            "the loss of a masked model is on hidden tokens of a prepared corpus; prepare one of these texts with the run's "
            "tokenizer (data.tokenizer.path) and name it with --data"
        )
    results = {path: _of_source(trained, source_of(path, field), windows, batch) for path in dict.fromkeys(paths)}
    everything = Result(
        Sums(
            sum(result.sums.nats for result in results.values()),
            sum(result.sums.targets for result in results.values()),
        ),
        sum(result.n_bytes for result in results.values()),
    )
    return {
        "text": "given",
        "overall": everything.values(),
        "sources": {name: result.values() for name, result in results.items()},
    }


def source_of(path: str, field: str) -> FilesConfig:
    lines = path.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson"))
    return JsonlConfig(paths=[path], field=field) if lines else TextConfig(paths=[path])


def _of_source(trained: Trained, source: FilesConfig, windows: int | None, batch: int) -> Result:
    counted = Counted(trained.tokenizer, trained.model.cfg.seq_len, windows)
    with torch.inference_mode():
        batches = batched(counted.rows(source), batch)
        sums = sum_losses(trained.model, batches, trained.model.embed.weight.device)
    if not sums.targets:
        raise ValueError(f"{source.paths[0]} has no text to evaluate; name files with text")
    return Result(sums, counted.n_bytes)


class Counted:
    """Documents as rows of tokens; counts their bytes on the way."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, windows: int | None) -> None:
        """windows: stop after the document with which there are so many rows."""
        self._tokenizer, self._seq_len, self._windows = tokenizer, seq_len, windows
        self.n_bytes = 0

    def rows(self, source: FilesConfig) -> Iterator[np.ndarray]:
        """(n + 1,) each, n at most seq_len: neighbours of a document share one token, so each is a target once."""
        eos, given = [self._tokenizer.eos_id], 0
        for text in self._texts(source):
            ids = np.concatenate([eos, self._tokenizer.encode(text), eos])
            self.n_bytes += len(text.encode())
            for start in range(0, len(ids) - 1, self._seq_len):
                yield ids[start : start + self._seq_len + 1]
                given += 1
            if self._windows is not None and given >= self._windows:
                return

    def _texts(self, source: FilesConfig) -> Iterator[str]:
        for unit in open_source(source, Limits()).units(SHARD_BYTES):
            for found in documents(unit):
                if isinstance(found, Document):
                    yield found.text
                elif isinstance(found, Bad):
                    raise ValueError(found.message)


def batched(rows: Iterator[np.ndarray], size: int) -> Iterator[Batch]:
    """Rows of different lengths together; what fills them up behind counts for nothing and changes nothing before it."""
    group: list[np.ndarray] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield _padded(group)
            group = []
    if group:
        yield _padded(group)


def _padded(group: list[np.ndarray]) -> tuple[Tensor, Tensor, None]:
    length = max(len(row) for row in group) - 1
    tokens = torch.zeros(len(group), length, dtype=torch.int64)
    targets = torch.full((len(group), length), IGNORE)
    for i, row in enumerate(group):
        both = torch.from_numpy(row.astype(np.int64))
        tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = both[:-1], both[1:]
    return tokens, targets, None


# -- the command ------------------------------------------------------------------------------------------------------------


def corpus_among(data: list[str]) -> tuple[str | None, bool]:
    """The corpus that --data names, None for the run's own; and whether it is a corpus at all, not texts."""
    corpora = [path for path in data if is_url(path) or (Path(path) / MANIFEST).is_file()]
    if corpora and len(data) > 1:
        raise ValueError(f"--data names the corpus {corpora[0]} and more; evaluate them one by one")
    return (corpora[0] if corpora else None), bool(corpora) or not data


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What is printed, as JSON or as a table."""
    for name, value in (("--windows", args.windows), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}; expected at least 1")
    if args.save is not None:
        refuse_other_data(args.model, args.save, args.data)
    trained = load_trained(args.model, args.step, None if args.dtype is None else DTYPES[args.dtype])
    checkpoint = trained.checkpoint
    if args.save is not None and checkpoint is None:
        raise ValueError(
            f"--save {args.save}: {args.model} is no run's folder, which results are kept in; leave it out"
        )
    batch = args.batch_size or (DEFAULT_BATCH if checkpoint is None else checkpoint.cfg.train.micro_batch_size)
    dtype = next(name for name, dtype in DTYPES.items() if dtype == trained.model.embed.weight.dtype)
    about = {"model": str(args.model), "step": checkpoint.step if checkpoint else None, "dtype": dtype,
             "data": args.data}  # fmt: skip
    if checkpoint is not None and isinstance(checkpoint.cfg, FinetuneConfig) and checkpoint.cfg.task.kind != "text":
        if args.windows is not None:
            raise ValueError("--windows is for text; of a task every example counts: leave it out")
        if args.field != TEXT_FIELD:
            raise ValueError(
                f"--field {args.field} is for text; the columns of a task are those of the run: leave it out"
            )
        return about | on_examples(trained, checkpoint.cfg, args.data, batch)
    if trained.head is not None:
        raise ValueError(
            f"{args.model} gives labels, and does not say of which files; evaluate the run that it was exported from, or "
            f"label texts with launcher/label.py {args.model}"
        )
    if checkpoint is None and is_masked(trained.model.cfg):
        raise ValueError(
            f"{args.model} is a masked model, whose loss is on hidden tokens, and does not say how they were hidden; "
            "evaluate the run that it was exported from (runs/NAME), or make a run of it: launcher/import_hf.py"
        )
    corpus, is_corpus = corpus_among(args.data)
    if is_corpus:
        found = on_corpus(trained, corpus, args.windows, batch)
    else:
        found = on_texts(trained, args.data, args.field, args.windows, batch)
    return about | found


def table(found: dict[str, Any]) -> str:
    if "table" in found:
        return task_table(found)
    step = f" step {found['step']}" if found["step"] is not None else ""
    rows = {**found["sources"], "all": found["overall"]}
    width = max(map(len, rows))
    lines = [f"{found['model']}{step}, {found['dtype']}, text {found['text']}"]
    for name, values in rows.items():
        shown = [f"loss {values['loss']:.4f}", f"perplexity {values['perplexity']:.4g}"]
        if "bits_per_byte" in values:
            shown.append(f"bits_per_byte {values['bits_per_byte']:.4f}")
        if "tokens" in values:
            shown.append(f"tokens {values['tokens']:,}")
        lines.append(f"  {name:{width}}  {'  '.join(shown)}")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/evaluate.py",
        description="Loss, perplexity and bits a byte on held-out or given text, source by source.",
        epilog="example: python launcher/evaluate.py runs/embedded --step 600 --json",
    )
    parser.add_argument("model", type=Path, help="a run's folder, or a Hugging Face folder such as export.py writes")
    parser.add_argument("--data", nargs="+", default=[], help="text or .jsonl files (also packed; globs), each a source; or "
                        "a prepared corpus (default: the run's own)")  # fmt: skip
    parser.add_argument("--field", default=TEXT_FIELD, help="of .jsonl: the field that is the text (default text)")
    parser.add_argument("--step", type=int, help="checkpoint of a run to read (default: the newest)")
    parser.add_argument("--windows", type=int, help="sequences of a source at most (default: as the run's eval.windows; of "
                        "files all)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="sequences a forward (default: the run's micro-batch)")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: what the run trained in, else fp32)")
    parser.add_argument("--save", metavar="NAME", help="keep the result in the run's folder, as "
                        "evaluations/NAME/step-N.json, and draw it in TensorBoard")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        found = evaluate(args)
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(_finite(found), ensure_ascii=False))
    else:
        print(table(found))
    if args.save is not None:
        try:
            print(f"kept in {keep(args.model, args.save, _finite(found))}", file=sys.stderr)
        except OSError as error:
            print(f"evaluate: the result cannot be kept: {error}", file=sys.stderr)
            return 1
    return 0


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
