"""From a run's checkpoint to a Hugging Face folder that plain transformers loads, proved equal before it is there.

    python launcher/export.py runs/NAME --output exports/NAME
    python launcher/export.py runs/NAME --output exports/NAME-bf16 --dtype bf16 --step 10000

The sharded checkpoint is read without an engine, whatever topology wrote it, and written block by block. Then the folder
is loaded as its users will: AutoTokenizer must give the run's ids on real documents and on adversarial strings,
AutoModelForCausalLM the run's logits on real windows. Only then is it renamed to its final name: killed at any time the
output is absent or whole. Exit codes: 0 written and proved; 1 it is not equal, or could not be written; 2 refused.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import PlainTemplate, open_template
from data.corpus import CorpusFolder
from data.dataset import reading
from data.errors import DataError
from data.fast_tokenizer import Exported, special_ids, windows_of, write_tokenizer
from data.formats import Document
from data.masking import IGNORE
from data.sources import EmbeddedConfig, Limits, documents, open_source
from data.store import is_url
from data.tokenizer import Tokenizer
from launcher.config import ConfigError, FinetuneConfig
from launcher.model_card import last_held_out, model_card
from launcher.run_data import masker_of
from launcher.staging import LOCK, StagingError, check_absent, staging_for
from launcher.task_config import ChatTask, PreferenceTask
from launcher.trained import Checkpoint, lora_of, open_checkpoint
from model.config import ModelConfig
from model.hf import LabelHead
from model.hf_config import HfModelConfig, is_masked, to_transformers
from model.hf_folder import (
    DTYPES,
    int8_weights,
    logits_of_transformers,
    plan_files,
    read_config,
    write_configs,
    write_weights,
)
from model.hf_tensors import ReadRange
from model.int8 import REST, require_package, round_trip
from model.network import Network
from parallel.checkpoint import CheckpointError, file_hash

AnyModel = ModelConfig | HfModelConfig

REPORT = "export_report.json"
INT8 = "int8"  # beside DTYPES, which models compute in
SLACK_BYTES = 2**25  # for tokenizer, configs and card
PROOF_CHARACTERS = 2**20  # of real text that both tokenizers encode
PROOF_TOKENS = 4096  # that both models read
PROOF_LOGITS = 2**28  # numbers that are held of each model at most: 1 GiB
# Of the largest logit. Both compute in fp32 with the same weights, so they differ in the order of sums alone: 1e-5 is
# about a hundred roundings of 1.2e-7, as in tests/model/test_hf.py for two blocks, and roundings add up like a random
# walk over the blocks. A wrong epsilon, layout or bias, or weights of another precision, show in the first digits.
TOLERANCE = 1e-5


class NotEqual(RuntimeError):
    """What was written does not compute what the run's model does; it was removed."""


@dataclass(frozen=True)
class Comparison:
    """transformers' logits against ours, on real windows."""

    windows: int
    tokens: int
    largest_logit: float
    largest_difference: float
    tolerance: float  # of the difference, as a part of the largest logit
    same_choice: float  # part of the positions at which both find the same token likeliest
    loss_here: float | None  # nats a token on these windows; None of labels
    loss_there: float | None

    @property
    def equal(self) -> bool:
        return self.largest_difference <= self.tolerance * self.largest_logit  # also false for NaN


def bytes_of(text: str) -> int:
    """A size such as 5GB, 500MB or 2GiB, or a number of bytes. Raises ValueError."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    try:
        size = int(float(found[1]) * units[found[2].upper()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"--shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size


# -- what is compared ---------------------------------------------------------------------------------------------------


def real_texts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Documents for the proof and where they are from: held-out text of the run's corpus, or Python's library."""
    data = checkpoint.cfg.data
    if not is_url(data.corpus) and Path(data.corpus).is_dir():
        folder = CorpusFolder(data.corpus, reading(data, checkpoint.cfg.model.seq_len))
        names = [source.label for source in data.sources if source.label in folder.manifest.splits("valid")]
        if folder.manifest.tokenizer.fingerprint == tokenizer.fingerprint and names:
            share = PROOF_CHARACTERS // len(names)
            return [t for name in names for t in _held_out(folder, name, tokenizer, share)], "held-out text of the run"
    source = open_source(EmbeddedConfig(), Limits())
    found = (item for unit in source.units(2**20) for item in documents(unit))
    return _up_to(PROOF_CHARACTERS, (item.text for item in found if isinstance(item, Document))), "Python's library"


def _held_out(folder: CorpusFolder, name: str, tokenizer: Tokenizer, most: int) -> list[str]:
    corpus = folder.split(name, "valid")
    places = ((shard.name, number) for shard in corpus.shards for number in range(shard.documents))
    return _up_to(most, (tokenizer.decode(corpus.document(*place)) for place in places))


def _up_to(characters: int, texts: Iterator[str]) -> list[str]:
    taken: list[str] = []
    for text in texts:
        taken.append(text[:characters])
        characters -= len(taken[-1])
        if characters <= 0:
            break
    return taken


def compare(
    model: Network, theirs: list[Tensor], windows: list[Tensor], targets: list[Tensor], head: LabelHead | None
) -> Comparison:
    """theirs: logits of each window; the model may have more rows in its vocabulary.    targets: of each window's tokens,
    -100 where none.
    """
    largest = difference = loss_here = loss_there = 0.0
    same = count = n_targets = 0
    for window, there, expected in zip(windows, theirs, targets, strict=True):
        with torch.inference_mode():
            here = model(window.unsqueeze(0))[0, -len(there) :, : there.shape[-1]]  # of a text's label the last alone
        # max() of Python would pass over NaN
        largest = torch.tensor([largest, here.abs().max()]).max().item()
        difference = torch.tensor([difference, (here - there).abs().max()]).max().item()
        same += int((here.argmax(-1) == there.argmax(-1)).sum())
        count += len(there)
        if head is None:
            loss_here += F.cross_entropy(here, expected, reduction="sum").item()
            loss_there += F.cross_entropy(there, expected, reduction="sum").item()
            n_targets += int((expected != IGNORE).sum())
    return Comparison(
        windows=len(windows),
        tokens=sum(map(len, windows)),
        largest_logit=largest,
        largest_difference=difference,
        tolerance=TOLERANCE * math.sqrt(model.cfg.n_layers),
        same_choice=same / count,
        loss_here=loss_here / max(1, n_targets) if head is None else None,
        loss_there=loss_there / max(1, n_targets) if head is None else None,
    )


@torch.no_grad()
def as_written(checkpoint: Checkpoint, dtype: torch.dtype, int8: frozenset[str]) -> Network:
    """The run's model with the numbers that the folder has, computing in fp32."""
    model = plain_model(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.copy_(round_trip(parameter) if name in int8 else parameter.to(dtype))
    return model


def plain_model(checkpoint: Checkpoint) -> Network:
    """Adapters merged: rounded, W + B A is another number than the sum of what W, B and A round to."""
    return checkpoint.merged_model() if lora_of(checkpoint.cfg) else checkpoint.model()


def compare_merged(checkpoint: Checkpoint, windows: list[Tensor]) -> dict[str, float]:
    """The run's own model, its adapters beside its weights, against the one with them merged, both in fp32.

    Raises NotEqual.
    """
    with torch.inference_mode():
        beside = logits_of(checkpoint.model(), windows)
        differences = [a - b for a, b in zip(beside, logits_of(checkpoint.merged_model(), windows), strict=True)]
    largest = torch.stack([logits.abs().max() for logits in beside]).max().item()
    difference = torch.stack([logits.abs().max() for logits in differences]).max().item()
    tolerance = TOLERANCE * math.sqrt(checkpoint.cfg.model.n_layers)
    if not difference <= tolerance * largest:  # also for NaN
        raise NotEqual(
            f"with its adapters merged the run's model gives other logits, by {difference:.3g} of {largest:.3g}; expected "
            f"at most {tolerance:.1e} of it. This is a defect of Longhaul or of the installed peft; nothing was written"
        )
    return {"largest_logit": largest, "largest_difference": difference, "tolerance": tolerance}


def logits_of(model: Network, windows: list[Tensor]) -> list[Tensor]:
    return [model(window.unsqueeze(0))[0] for window in windows]


def proof_windows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, texts: list[str], cfg: AnyModel
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows (T,) of the texts as the run reads them, and the target of each token, -100 where there is none."""
    most = max(1, min(PROOF_TOKENS, PROOF_LOGITS // cfg.vocab_size))
    length = min(cfg.seq_len, most)
    windows = windows_of(tokenizer, texts, length, most // length)
    masker = masker_of(checkpoint.cfg, tokenizer)
    if masker is None:
        targets = [np.append(window[1:], IGNORE) for window in windows]
    else:
        rows = np.stack([np.append(window, IGNORE) for window in windows])  # the last two give way to [CLS]
        hidden = masker.hide(rows, None, [masker.held_out_key(window) for window in range(len(windows))])
        windows, targets = list(hidden[0]), list(hidden[1])
    return [torch.from_numpy(window) for window in windows], [torch.from_numpy(target) for target in targets]


# -- the command --------------------------------------------------------------------------------------------------------


def exported_config(cfg: AnyModel, n_known: int, keep_padding: bool) -> AnyModel:
    """The model as it is written: without the rows of ids that no text has, and without dropout where it has no place."""
    changes: dict[str, Any] = {} if keep_padding else {"vocab_size": n_known}
    if isinstance(cfg, ModelConfig) and cfg.positions != "learned":
        changes["dropout"] = 0.0  # Llama and Qwen3 know none; outside training it plays no part
    return cfg.model_copy(update=changes)


def export(
    checkpoint: Checkpoint, output: Path, dtype_name: str, shard_bytes: int, keep_padding: bool
) -> dict[str, Any]:
    """Write and prove the folder; returns what its report says. Raises ValueError for a model without an equal there."""
    tokenizer, head = checkpoint.tokenizer(), checkpoint.label_head
    cfg = exported_config(checkpoint.cfg.model, tokenizer.vocab_size, keep_padding)
    dtype, int8 = DTYPES.get(dtype_name, REST), frozenset[str]()
    if dtype_name == INT8:
        require_package()
        int8 = int8_weights(cfg, head)
    files = plan_files(cfg, dtype, shard_bytes, head, int8)
    entries = [entry for group in files.values() for entry in group]
    n_bytes = sum(entry.n_bytes for entry in entries)
    with staging_for(output, n_bytes + SLACK_BYTES) as staging:
        ids = special_ids(tokenizer)
        architecture = write_configs(staging, cfg, dtype, *ids, n_known=tokenizer.vocab_size, head=head, int8=int8)
        texts, origin = real_texts(checkpoint, tokenizer)
        exported = write_tokenizer(tokenizer, staging, cfg.seq_len, texts, masked=is_masked(cfg))
        write_weights(staging, files, read_for(checkpoint))
        objective = cfg.objective if isinstance(cfg, HfModelConfig) else None
        _same_config(cfg, read_config(staging, objective, quantized=bool(int8)))
        (windows, targets), lora = proof_windows(checkpoint, tokenizer, texts, cfg), lora_of(checkpoint.cfg)
        merge = None if lora is None else compare_merged(checkpoint, windows)
        if head is not None and not head.per_token:  # texts of different lengths, the longest of them whole
            windows = [window[: 1 + (len(window) - 1) * (i + 1) // len(windows)] for i, window in enumerate(windows)]
        theirs = logits_of_transformers(staging, windows, head, masked=is_masked(cfg))
        comparison = compare(as_written(checkpoint, dtype, int8), theirs, windows, targets, head)
        if not comparison.equal:
            raise NotEqual(
                f"transformers' logits differ from the run's by {comparison.largest_difference:.3g}, of a largest logit of "
                f"{comparison.largest_logit:.3g}; expected at most {comparison.tolerance:.1e} of it. This is a defect of "
                "Longhaul or of the installed transformers; nothing was written"
            )
        report = report_of(checkpoint, cfg, dtype_name, architecture, exported, comparison, origin)
        report["parameters"] = sum(entry.n_params for entry in entries)
        report["vocabulary"]["tokenizer"] = tokenizer.vocab_size
        report["ids"] = ids._asdict()
        if lora is not None and merge is not None:
            report["lora"] = {**lora.model_dump(mode="json"), "merged": merge}
            report["notes"].append(
                f"the run trained LoRA matrices of rank {lora.rank}, which are merged into the weights: with them beside "
                f"the weights its logits differ by at most {merge['largest_difference']:.2e}, in fp32"
            )
        if int8:
            cost = compare(plain_model(checkpoint), theirs, windows, targets, head)
            report["int8"] = {
                "matrices": len(int8),
                "parameters": sum(entry.n_params for entry in entries if entry.dtype == torch.int32),
                "weight_bytes": n_bytes,
                "weight_bytes_bf16": 2 * report["parameters"],
                "unquantized": {
                    "loss": cost.loss_here,
                    "same_choice": cost.same_choice,
                    "largest_difference": cost.largest_difference,
                },
            }
            report["notes"] += int8_notes(report)
        report["files"] = {
            path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file() and path.name != LOCK
        }
        (staging / "README.md").write_text(model_card(checkpoint, report, output.name), encoding="utf-8")
        (staging / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def read_for(checkpoint: Checkpoint) -> ReadRange:
    """The run's weights, and zeros for the bias of a head that transformers has and ours does not."""

    def read(name: str, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start) if name == "score.bias" else checkpoint.read_weight(name, start, stop)

    return read


def _same_config(written: AnyModel, read: AnyModel) -> None:
    """What no folder of theirs holds is left out: how residual projections are drawn."""
    before, after = (_resolved(cfg) for cfg in (written, read))
    if differs := sorted(key for key in before | after if before.get(key) != after.get(key)):
        raise NotEqual(f"config.json says another {', '.join(differs)} than the run; nothing was written")


def _resolved(cfg: AnyModel) -> dict[str, Any]:
    if isinstance(cfg, HfModelConfig):
        found: dict[str, Any] = to_transformers(cfg).to_dict()
        return found
    return cfg.model_dump(exclude={"scale_residual_init"}) | {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.dim_per_head}


def report_of(
    checkpoint: Checkpoint,
    cfg: AnyModel,
    dtype_name: str,
    architecture: str,
    exported: Exported,
    comparison: Comparison,
    origin: str,
) -> dict[str, Any]:
    """What export_report.json says, but for the files. It holds no path of this machine and no text."""
    manifest = checkpoint.reader.manifest
    notes = list(exported.notes)
    if isinstance(cfg, ModelConfig) and cfg.dropout != checkpoint.cfg.model.dropout:
        notes.append(f"the run trained with dropout {checkpoint.cfg.model.dropout}; {architecture} has none")
    task = checkpoint.cfg.task if isinstance(checkpoint.cfg, FinetuneConfig) else None
    if isinstance(task, ChatTask | PreferenceTask) and isinstance(
        open_template(task.template, checkpoint.tokenizer()), PlainTemplate
    ):
        notes.append(
            "the folder has no chat template: the words between messages are those of data/chat.py, and an answer ends with "
            "the end of a document; launcher/generate.py RUN --chat puts them in by itself"
        )
    return {
        "run": checkpoint.cfg.run.name,
        "step": checkpoint.step,
        "tokens_seen": manifest.totals.get("tokens"),
        "passed_over": [line.partition(" is damaged")[0].rpartition("/")[2] for line in checkpoint.passed_over],
        "architecture": architecture,
        "dtype": dtype_name,
        "vocabulary": {"model": checkpoint.cfg.model.vocab_size, "exported": cfg.vocab_size},
        "text": origin,
        "tokenizer": {"auto_tokenizer": exported.fast, **exported.proof},
        "logits": {"equal": comparison.equal, **vars(comparison)},
        "held_out": last_held_out(checkpoint.run_dir, checkpoint.step),
        "notes": notes,
        "versions": {
            "trained_with": manifest.versions,
            "exported_with": {name: version(name) for name in ("torch", "transformers", "tokenizers", "longhaul")},
        },
    }


def int8_notes(report: dict[str, Any]) -> list[str]:
    """What int8 saves and costs."""
    found, loss = report["int8"], ""
    if (before := found["unquantized"]["loss"]) is not None:
        after = report["logits"]["loss_there"]
        loss = f"the loss is {after:.6f} in place of {before:.6f} ({after - before:+.6f}), and "
    return [
        f"{found['matrices']} matrices of the blocks, {found['parameters']:,} of {report['parameters']:,} parameters, are "
        f"int8 with a bf16 scale for each row, all else is bf16: {found['weight_bytes'] / 1e6:.2f} MB of weights, where "
        f"bf16 alone takes {found['weight_bytes_bf16'] / 1e6:.2f}",
        f"against the run's own weights in fp32, on the same {report['logits']['tokens']:,} tokens: {loss}"
        f"{100 * found['unquantized']['same_choice']:.2f} % of the choices are the same",
        "to load it, transformers needs compressed-tensors (pip install compressed-tensors), and makes floating point of "
        "the int8 in the first forward: the folder is smaller, and the memory in use after that is not",
    ]


def describe(report: dict[str, Any], output: Path) -> str:
    """The report for people."""
    logits, tokens = report["logits"], report["tokenizer"]
    loss = ""
    if logits["loss_here"] is not None:
        loss = f", loss {logits['loss_there']:.6f} there and {logits['loss_here']:.6f} here"
    proved = (
        f"{tokens['tokens']:,} ids equal, of {tokens['documents']} documents ({report['text']}) and "
        f"{tokens['adversarial']} adversarial strings"
        if tokens["auto_tokenizer"]
        else "not in a form that AutoTokenizer loads"
    )
    lines = [
        f"step {report['step']} of {report['run']}: {report['parameters']:,} parameters as {report['architecture']}, "
        f"{report['dtype']}, {sum(file['bytes'] for file in report['files'].values()) / 1e6:.1f} MB",
        f"logits     {logits['tokens']:,} tokens: largest difference {logits['largest_difference']:.2e} of a largest "
        f"logit of {logits['largest_logit']:.3g} (at most {logits['tolerance']:.1e} of it){loss}",
        f"tokenizer  {proved}",
        *(f"note       {note}" for note in report["notes"]),
        f"written to {output}; the proof is in {output / REPORT}, how to load it in {output / 'README.md'}",
    ]
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/export.py",
        description="Export a run's checkpoint as a Hugging Face folder, proved equal.",
        epilog="example: python launcher/export.py runs/embedded --output exports/embedded --dtype bf16",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest that is whole)")
    parser.add_argument("--dtype", choices=[*DTYPES, INT8], default="fp32", help="of the weights (default fp32, as "
                        "they are); int8: the matrices of the blocks, all else bf16")  # fmt: skip
    parser.add_argument("--shard-size", default="5GB", help="largest weight file (default 5GB)")
    parser.add_argument("--keep-padding", action="store_true", help="keep the rows by which model.vocab_size exceeds the "
                        "tokenizer's vocabulary (default: cut, so that both agree); they are never generated")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    output = Path(os.path.realpath(args.output))
    try:
        shard_bytes = bytes_of(args.shard_size)
        check_absent(output)
        checkpoint = open_checkpoint(args.run, args.step, fall_back=True)
        for line in checkpoint.passed_over:
            print(f"export: {line}; taking step {checkpoint.step}", file=sys.stderr)
        report = export(checkpoint, output, args.dtype, shard_bytes, args.keep_padding)
    except (CheckpointError, ConfigError, DataError, StagingError, ValueError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except (NotEqual, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(describe(report, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
