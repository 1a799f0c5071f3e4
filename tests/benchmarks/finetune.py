"""What pretraining is worth for a small classification: the same model tuned from it, from drawn weights, and bag of words.

    python tests/benchmarks/finetune.py --train sst2-train.tsv --valid sst2-dev.tsv --text 'wikitext2-*.txt' --work DIR
    python tests/benchmarks/finetune.py --train reviews.csv --columns review label --text poems.jsonl.gz --work DIR

Without --valid a tenth of the examples is held out. The texts to pretrain on are those of the examples that are trained on,
and of --text, as many tokens of either. Drawn weights are those of a run of two steps with a learning rate of 1e-12. The bag
of words is a logistic regression on log(1 + count) of words and pairs of Chinese characters, with the weight decay that is
best on the held-out examples, which favours it; so is each model's rate of --lr that is best for the first seed. Prints the
accuracy after each quarter of the steps and a table of the last, mean and range over seeds, for each number of examples of
--examples; 0 is all of them. What is there already in DIR is not made again.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml

from data.examples import Example, hold_out, read_examples
from data.task import ClassifyTask

ROOT = Path(__file__).parents[2]
MODEL = {"seq_len": 128, "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 384,
         "tie_embeddings": True}  # fmt: skip
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
HELD_OUT = 0.1
SPLIT_SEED = 0


def split(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[str]]:
    """(examples to train on, held out, labels)"""

    def read(path: str) -> list[Example]:
        text, label = (int(name) if name.isdigit() else name for name in args.columns)
        task = ClassifyTask(
            kind="classify", labels=args.labels, train=[path], text=text, label=label, empty="leave_out"
        )
        return [example for example in read_examples(task, [path]) if example.text]

    train = read(args.train)
    train, valid = (train, read(args.valid)) if args.valid else hold_out(train, HELD_OUT, SPLIT_SEED)
    return train, valid, args.labels


def write(path: Path, examples: list[Example]) -> str:
    lines = [json.dumps({"text": example.text, "label": example.label}, ensure_ascii=False) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def command(script: str, recipe: dict, work: Path, *options: str) -> None:
    path = work / f"{recipe['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, f"launcher/{script}.py", "--config", str(path), *options], cwd=ROOT, check=True)


def pretrain(args: argparse.Namespace, name: str, steps: int, lr: float, own_text: str) -> Path:
    sources: list[dict[str, object]] = [{"name": "examples", "kind": "jsonl", "paths": [own_text], "field": "text"}]
    for path in args.text:
        kind = {"kind": "jsonl", "field": "text"} if ".jsonl" in path else {"kind": "text"}
        sources.append({"name": f"text-{len(sources)}", "paths": [path], "weight": 1 / len(args.text), **kind})
    sources[0]["weight"] = 1.0
    recipe = {
        "run": {"name": name, "folder": str(args.work / "runs")},
        "model": MODEL | {"vocab_size": args.vocab_size, "dropout": args.dropout},
        "data": {
            "corpus": str(args.work / "corpus"),
            "sources": sources,
            "tokenizer": {"vocab_size": args.vocab_size, "character_coverage": args.coverage},
            "valid_fraction": 0.01,
        },
        "optim": {
            "lr": lr,
            "warmup_steps": min(30, steps - 1),
            "schedule": "wsd",
            "decay_steps": max(1, (steps - 1) // 4),
        },
        "parallel": {"precision": "fp32"},
        "train": {"steps": steps, "tokens_per_step": 4096, "micro_batch_size": 16},
        "checkpoint": {"every": steps, "keep": 1},
        "eval": {"every": 0},
    }
    if not (args.work / "corpus/manifest.json").exists():
        command("prepare", recipe, args.work)
    command("pretrain", recipe, args.work)
    return args.work / "runs" / name


def tune(
    args: argparse.Namespace, origin: Path, files: tuple[str, str], n_examples: int, lr: float, seed: int
) -> list[float]:
    """The accuracy on the held-out examples after each quarter of the steps."""
    run = {"name": f"{origin.name}-{n_examples}-{lr:g}-{seed}", "folder": str(args.work / "tuned"), "seed": seed}
    recipe = {
        "run": run,
        "init": str(origin),
        "task": {
            "kind": "classify",
            "labels": args.labels,
            "train": [files[0]],
            "valid": [files[1]],
            "too_long": "cut",
        },
        "data": {"seed": seed},
        "optim": {"lr": lr, "warmup_steps": min(20, args.steps - 1), "schedule": "cosine"},
        "parallel": {"precision": "fp32"},
        "train": {"steps": args.steps, "global_batch_size": 32, "micro_batch_size": 32},
        "checkpoint": {"every": args.steps, "keep": 1},
        "eval": {"every": max(1, args.steps // 4)},
    }
    command("finetune", recipe, args.work)
    lines = (args.work / "tuned" / run["name"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["valid/accuracy"] for line in map(json.loads, lines) if "valid/accuracy" in line]


def bag_of_words(train: list[Example], valid: list[Example], labels: list[str]) -> float:
    counts = Counter(word for example in train for word in set(_words(example.text)))
    number = {word: at for at, word in enumerate(sorted(word for word, n in counts.items() if n > 1))}

    def features(examples: list[Example]) -> torch.Tensor:
        found = np.zeros((len(examples), len(number)), dtype=np.float32)
        for row, example in enumerate(examples):
            for word, n in Counter(_words(example.text)).items():
                if word in number:
                    found[row, number[word]] = np.log1p(n)
        return torch.from_numpy(found).to_sparse_csr()

    x, y = features(train), torch.tensor([labels.index(example.label) for example in train])
    held, truth = features(valid), torch.tensor([labels.index(example.label) for example in valid])
    return max(_regression(x, y, held, truth, len(labels), decay) for decay in DECAYS)


def _regression(
    x: torch.Tensor, y: torch.Tensor, held: torch.Tensor, truth: torch.Tensor, n_labels: int, decay: float
) -> float:
    weight, bias = torch.zeros(x.shape[1], n_labels, requires_grad=True), torch.zeros(n_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight + bias, y) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(((held @ weight + bias).argmax(-1) == truth).float().mean())


def _words(text: str) -> list[str]:
    words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+|[^\w\s]", text.lower())
    pairs = [a + b for a, b in zip(words, words[1:], strict=False) if "\u4e00" <= a <= "\u9fff"]
    return words + pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="labelled examples")
    parser.add_argument("--valid", help="held out (default: a tenth of --train, by a hash of the text)")
    parser.add_argument("--columns", nargs=2, default=["0", "1"], metavar=("TEXT", "LABEL"), help="names or numbers")
    parser.add_argument("--labels", nargs="+", default=["0", "1"])
    parser.add_argument("--text", action="append", default=[], help="to pretrain on, .jsonl or plain text")
    parser.add_argument("--origins", type=Path, help="a folder with two runs, pretrained and drawn, instead of "
                        "pretraining: entities.py leaves such in DIR/runs")  # fmt: skip
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--coverage", type=float, default=0.9995, help="of characters, by the tokenizer's pieces")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400, help="of each tuning")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3], help="rates to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, nargs="+", default=[0], help="numbers of them to train on; 0: all")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, valid, labels = split(args)
    held, own_text = write(args.work / "valid.jsonl", valid), write(args.work / "text.jsonl", train)
    most = Counter(example.label for example in valid).most_common(1)[0][1] / len(valid)
    print(f"{len(train)} examples, {len(valid)} held out, {most:.4f} of them of one label", flush=True)
    origins = (
        {name: args.origins / name for name in ("pretrained", "drawn")}
        if args.origins
        else {
            "pretrained": pretrain(args, "pretrained", args.pretrain_steps, 4e-3, own_text),
            "drawn": pretrain(args, "drawn", 2, 1e-12, own_text),
        }
    )
    table: dict[str, list[float]] = {}
    for n in (n or len(train) for n in args.examples):
        some = train[:: max(1, len(train) // n)][:n]  # spread over the file, which may be sorted by label
        files = write(args.work / f"train-{n}.jsonl", some), held
        table[f"{n} bag of words"] = [bag_of_words(some, valid, labels)]
        for name, origin in origins.items():
            first = {lr: tune(args, origin, files, n, lr, 0) for lr in args.lr}
            print(f"{n} {name}: { ({lr: curve[-1] for lr, curve in first.items()}) }", flush=True)
            best = max(first, key=lambda lr: first[lr][-1])
            curves = [first[best], *(tune(args, origin, files, n, best, seed) for seed in range(1, args.seeds))]
            quarters = np.mean(curves, axis=0)
            print(
                f"{n} {name}, {best:g}: {' '.join(f'{value:.4f}' for value in quarters)} after each quarter", flush=True
            )
            table[f"{n} {name}"] = [curve[-1] for curve in curves]
    for name, found in table.items():
        print(f"{name:<24} {np.mean(found):.4f}  ({min(found):.4f} to {max(found):.4f}, {len(found)} seeds)")


if __name__ == "__main__":
    main()
