"""What pretraining is worth for named entities: a small Chinese BERT tuned from it, and from drawn weights.

    python tests/benchmarks/entities.py --model modernbert --entities msra-ner.txt.gz --reviews chnsenticorp.csv --work DIR

The texts to pretrain on are the sentences that are trained on, without their tags, and reviews. What is held out is
said by a hash of the sentence, so it is the same for all seeds and no copy of it is trained on. Drawn weights are those of
a run of two steps with a learning rate of 1e-12. What is there already in DIR is not made again. Prints a table: the mean
and the range over seeds of the entities' F1 at the last step, by seqeval's definition.
"""

import argparse
import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
import yaml

from launcher.run_dir import Ledger

ROOT = Path(__file__).parents[2]
LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
VOCABULARY = 4352  # a piece a character
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
# A BERT of this width does not leave the frequencies of single tokens at the other's rate.
MODELS = {
    "bert": {"model_type": "bert", **SIZES, "intermediate_size": 512, "type_vocab_size": 1, "initializer_range": 0.08,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"model_type": "modernbert", **SIZES, "intermediate_size": 256, "initializer_range": 0.05,
                   "layer_types": ["full_attention"] * 4},
}  # fmt: skip
PRETRAINING_RATES = {"bert": 5e-4, "modernbert": 4e-3}


def sentences(path: str) -> Iterator[list[str]]:
    """Lines of `character tag`, for each sentence."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines: list[str] = []
        for line in [*file, ""]:
            if line.strip():
                lines.append(line.rstrip("\n"))
            elif lines:
                yield lines
                lines = []


def prepare(args: argparse.Namespace) -> None:
    """train.conll, valid.conll and the texts to pretrain on."""
    if (args.work / "reviews.jsonl").exists():
        return
    parts: dict[bool, list[list[str]]] = {False: [], True: []}
    for lines in sentences(args.entities):
        text = "".join(line.split()[0] for line in lines)
        parts[xxhash.xxh3_64_intdigest(text.encode()) < args.held_out * 2**64].append(lines)
    for name, part in (("train", parts[False]), ("valid", parts[True])):
        (args.work / f"{name}.conll").write_text(
            "\n\n".join("\n".join(lines) for lines in part) + "\n", encoding="utf-8"
        )
    write(args.work / "news.jsonl", ("".join(line.split()[0] for line in lines) for lines in parts[False]))
    with open(args.reviews, encoding="utf-8", newline="") as file:
        write(args.work / "reviews.jsonl", (row["review"] for row in csv.DictReader(file) if row["review"].strip()))
    print({name: len(part) for name, part in (("train", parts[False]), ("held out", parts[True]))}, flush=True)


def write(path: Path, texts: Iterator[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def command(script: str, recipe: dict, work: Path) -> None:
    path = work / f"{recipe['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, f"launcher/{script}.py", "--config", str(path)], cwd=ROOT, check=True)


def pretrain(args: argparse.Namespace, name: str, steps: int, lr: float) -> Path:
    sources = [
        {"kind": "jsonl", "name": name, "paths": [str(args.work / f"{name}.jsonl")], "field": "text", "weight": weight}
        for name, weight in (("news", 0.75), ("reviews", 0.25))
    ]
    recipe = {
        "run": {"name": name, "folder": str(args.work / "runs")},
        "model": {
            "family": "hf",
            "objective": "masked",
            "vocab_size": VOCABULARY,
            "seq_len": 128,
            "config": MODELS[args.model],
        },
        "data": {
            "corpus": str(args.work / "corpus"),
            "sources": sources,
            "tokenizer": {"model_type": "char", "vocab_size": VOCABULARY, "mask_token": "[MASK]"},
            "masking": {},
            "valid_fraction": 0.005,
        },
        "optim": {"lr": lr, "warmup_steps": min(200, steps - 1), "schedule": "cosine"},
        "parallel": {"precision": "bf16"},
        "train": {"steps": steps, "tokens_per_step": 2048, "micro_batch_size": 16},
        "checkpoint": {"every": steps, "keep": 1},
        "eval": {"every": max(1, steps // 4), "windows": 64},
    }
    if not (args.work / "corpus/manifest.json").exists():
        command("prepare", recipe, args.work)
    command("pretrain", recipe, args.work)
    return args.work / "runs" / name


def tune(args: argparse.Namespace, origin: Path, seed: int) -> float:
    """The F1 of entities after the last step."""
    recipe = {
        "run": {"name": f"{origin.name}-{seed}", "folder": str(args.work / "tuned"), "seed": seed},
        "init": str(origin),
        "task": {
            "kind": "tag",
            "labels": LABELS,
            "train": [str(args.work / "train.conll")],
            "valid": [str(args.work / "valid.conll")],
            "join": "",
            "too_long": "cut",
        },
        "data": {"seed": seed},
        "optim": {"lr": args.lr, "warmup_steps": min(30, args.steps - 1), "schedule": "cosine"},
        "parallel": {"precision": "bf16"},
        "train": {"steps": args.steps, "global_batch_size": 32, "micro_batch_size": 32},
        "checkpoint": {"every": args.steps, "keep": 1},
        "eval": {"every": max(1, args.steps // 2)},
    }
    command("finetune", recipe, args.work)
    return float(Ledger(args.work / "tuned" / recipe["run"]["name"]).events()[-1]["valid/entity_f1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="modernbert")
    parser.add_argument("--entities", required=True, help="MSRA's, gzip: a character and its tag a line")
    parser.add_argument("--reviews", required=True, help="CSV with a column review")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--held-out", type=float, default=0.04, help="share of the sentences")
    parser.add_argument("--pretrain-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400, help="of each tuning, of 32 sentences")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    origins = [
        pretrain(args, "pretrained", args.pretrain_steps, PRETRAINING_RATES[args.model]),
        pretrain(args, "drawn", 2, 1e-12),
    ]
    table: dict[str, list[float]] = {origin.name: [] for origin in origins}
    for seed in range(args.seeds):
        for origin in origins:
            table[origin.name].append(tune(args, origin, seed))
            print(json.dumps(table), flush=True)
    for name, found in table.items():
        print(f"{name:<12} {np.mean(found):.4f}  ({min(found):.4f} to {max(found):.4f}, {len(found)} seeds)")


if __name__ == "__main__":
    main()
