"""What pretraining is worth for a small classification: the same model tuned from it, from drawn weights, and bag of words.

    python tests/benchmarks/finetune.py --train sst2-train.tsv --valid sst2-dev.tsv --text 'wikitext2-*.txt' --work DIR

The texts to pretrain on are those of --text and of --train. Drawn weights are those of a run of two steps with a learning
rate of 1e-12. The bag of words is a logistic regression on log(1 + count) of words, with the weight decay that is best on
the held-out examples, which favours it. Prints a table: the mean and the range over seeds of the accuracy at the last step.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml

from launcher.run_dir import Ledger

ROOT = Path(__file__).parents[2]
MODEL = {"vocab_size": 4096, "seq_len": 128, "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 384,
         "tie_embeddings": True, "dropout": 0.1}  # fmt: skip
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)


def read(path: str) -> tuple[list[str], list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[0] for row in rows], [row[1] for row in rows]


def command(script: str, recipe: dict, work: Path, *options: str) -> None:
    path = work / f"{recipe['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, f"launcher/{script}.py", "--config", str(path), *options], cwd=ROOT, check=True)


def pretrain(args: argparse.Namespace, name: str, steps: int, lr: float) -> Path:
    recipe = {
        "run": {"name": name, "folder": str(args.work / "runs")},
        "model": MODEL,
        "data": {
            "corpus": str(args.work / "corpus"),
            "sources": [{"kind": "text", "paths": [*args.text, args.train]}],
            "tokenizer": {"vocab_size": MODEL["vocab_size"]},
            "valid_fraction": 0,
        },
        "optim": {"lr": lr, "warmup_steps": min(30, steps - 1)},
        "parallel": {"precision": "fp32"},
        "train": {"steps": steps, "tokens_per_step": 4096, "micro_batch_size": 16},
        "checkpoint": {"every": steps, "keep": 1},
        "eval": {"every": 0},
    }
    if not (args.work / "corpus/manifest.json").exists():
        command("prepare", recipe, args.work)
    command("pretrain", recipe, args.work)
    return args.work / "runs" / name


def tune(args: argparse.Namespace, origin: Path, labels: list[str], seed: int) -> float:
    """The accuracy on the held-out examples after the last step."""
    recipe = {
        "run": {"name": f"{origin.name}-{seed}", "folder": str(args.work / "tuned"), "seed": seed},
        "init": str(origin),
        "task": {
            "kind": "classify",
            "labels": labels,
            "train": [args.train],
            "valid": [args.valid],
            "text": 0,
            "label": 1,
        },
        "data": {"seed": seed},
        "optim": {"lr": args.lr, "warmup_steps": min(20, args.steps - 1)},
        "parallel": {"precision": "fp32"},
        "train": {"steps": args.steps, "global_batch_size": 32, "micro_batch_size": 32},
        "checkpoint": {"every": args.steps, "keep": 1},
        "eval": {"every": max(1, args.steps // 4)},
    }
    command("finetune", recipe, args.work)
    return float(Ledger(args.work / "tuned" / recipe["run"]["name"]).events()[-1]["valid/accuracy"])


def bag_of_words(train: tuple[list[str], list[str]], valid: tuple[list[str], list[str]], labels: list[str]) -> float:
    counts = Counter(word for text in train[0] for word in set(_words(text)))
    number = {word: at for at, (word, n) in enumerate(sorted(counts.items())) if n > 1}
    number = {word: at for at, word in enumerate(number)}

    def features(texts: list[str]) -> torch.Tensor:
        found = np.zeros((len(texts), len(number)), dtype=np.float32)
        for row, text in enumerate(texts):
            for word, n in Counter(_words(text)).items():
                if word in number:
                    found[row, number[word]] = np.log1p(n)
        return torch.from_numpy(found)

    x, y = features(train[0]), torch.tensor([labels.index(label) for label in train[1]])
    held, truth = features(valid[0]), torch.tensor([labels.index(label) for label in valid[1]])
    return max(_regression(x, y, held, truth, len(labels), decay) for decay in DECAYS)


def _regression(
    x: torch.Tensor, y: torch.Tensor, held: torch.Tensor, truth: torch.Tensor, n_labels: int, decay: float
) -> float:
    weight, bias = torch.zeros(n_labels, x.shape[1], requires_grad=True), torch.zeros(n_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(((held @ weight.T + bias).argmax(-1) == truth).float().mean())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="TSV without names: text, label")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--text", action="append", required=True, help="to pretrain on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400, help="of each tuning")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, valid = read(args.train), read(args.valid)
    labels = sorted(set(train[1]))
    table = {"bag of words": [bag_of_words(train, valid, labels)]}
    print(json.dumps(table), flush=True)
    origins = {
        "pretrained": pretrain(args, "pretrained", args.pretrain_steps, 4e-3),
        "drawn": pretrain(args, "drawn", 2, 1e-12),
    }
    for name, origin in origins.items():
        table[name] = [tune(args, origin, labels, seed) for seed in range(args.seeds)]
    for name, found in table.items():
        print(f"{name:<14} {np.mean(found):.4f}  ({min(found):.4f} to {max(found):.4f}, {len(found)} seeds)")


if __name__ == "__main__":
    main()
