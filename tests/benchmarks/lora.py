"""LoRA against full tuning: parameters trained, checkpoint bytes and accuracy on SST-2; peak memory on a larger model.

    python tests/benchmarks/lora.py --train sst2-train.tsv --valid sst2-dev.tsv --origin RUN --work DIR

Accuracy is of a small model, the run that finetune.py leaves in DIR/runs/pretrained, after the last step: the mean and the
range over seeds. Memory is the largest resident size of a process that tunes a Llama of 60M drawn weights in bf16 for
a few steps, its first checkpoint included, beside that of one which tunes the small model: the difference is what the
larger model costs.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import command
from launcher import export
from launcher.run_dir import Ledger

LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
         "vocab_size": 4096, "max_position_embeddings": 128, "tie_word_embeddings": True}  # fmt: skip
WAYS = {"full": None, "LoRA rank 4": {"rank": 4, "alpha": 8.0}, "LoRA rank 16": {"rank": 16, "alpha": 32.0}}


def tune(args: argparse.Namespace, name: str, origin: Path, lora: dict | None, seed: int, steps: int) -> Path:
    """The run's folder. bf16 for the memory of the larger model, fp32 for the accuracy of the smaller."""
    small = steps == args.steps
    recipe = {
        "run": {"name": f"{name}-{seed}", "folder": str(args.work / "lora"), "seed": seed},
        "init": str(origin),
        "task": {"kind": "classify", "labels": ["0", "1"], "train": [args.train], "valid": [args.valid], "text": 0,
                 "label": 1},
        "data": {"seed": seed},
        "optim": {"lr": args.lr if lora is None else args.lora_lr, "warmup_steps": min(20, steps - 1)},
        "parallel": {"precision": "fp32" if small else "bf16"},
        "train": {"steps": steps, "global_batch_size": 32 if small else 4, "micro_batch_size": 32 if small else 4},
        "checkpoint": {"every": steps, "keep": 1},
        "log": {"every": 10 if small else 1},
        "eval": {"every": 0},
    }  # fmt: skip
    if not small:
        recipe["task"] |= {"valid": [], "valid_fraction": 0.001}
    command("finetune", recipe | ({} if lora is None else {"lora": lora}), args.work)
    return args.work / "lora" / recipe["run"]["name"]


def facts(run_dir: Path) -> dict[str, float]:
    events = {event["event"]: event for event in Ledger(run_dir).events()}
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    memory = [line["system/peak_host_mem_gib"] for line in logged if "system/peak_host_mem_gib" in line]
    return {
        "trained": events["start"]["trained_parameters"],
        "parameters": events["start"]["parameters"],
        "checkpoint_mb": events["checkpoint"]["bytes"] / 1e6,
        "accuracy": events["finished"].get("valid/accuracy", float("nan")),
        "peak_gib": max(memory),
    }


def make_large(args: argparse.Namespace, small: Path) -> Path:
    """A Hugging Face folder with the tokenizer of the small run and drawn weights."""
    folder = args.work / "large"
    if not folder.exists():
        assert export.main([str(small), "--output", str(args.work / "small")]) == 0
        shutil.copytree(args.work / "small", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        LlamaForCausalLM(LlamaConfig(**LARGE)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="TSV without names: text, label 0 or 1")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--origin", type=Path, required=True, help="the run to begin with")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250, help="of each tuning")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lora-lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    large = make_large(args, args.origin)
    print("| | trained | of | checkpoint, MB | accuracy | 60M: trained | checkpoint, MB | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for way, lora in WAYS.items():
        name = way.replace(" ", "-")
        big = facts(tune(args, f"{name}-60M", large, lora, 0, 3))
        small = [facts(tune(args, name, args.origin, lora, seed, args.steps)) for seed in range(args.seeds)]
        scores = [found["accuracy"] for found in small]
        print(
            f"| {way} | {small[0]['trained']:,} | {small[0]['parameters']:,} | {small[0]['checkpoint_mb']:.1f} | "
            f"{np.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f}) | {big['trained']:,} | "
            f"{big['checkpoint_mb']:.0f} | {big['peak_gib']:.2f} |",
            flush=True,
        )
    print(f"\nthe small model's process: {small[0]['peak_gib']:.2f} GiB")


if __name__ == "__main__":
    main()
