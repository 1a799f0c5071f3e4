"""Scores of a run that was fine-tuned for a task: on its held-out examples, or on other files of the same form."""

from typing import Any

import torch

from data.examples import hold_out
from launcher.config import FinetuneConfig
from launcher.tally import count
from launcher.task_examples import encode_task, read_task
from launcher.trained import Trained


def on_examples(trained: Trained, cfg: FinetuneConfig, paths: list[str], batch: int) -> dict[str, Any]:
    """As the run evaluates itself. paths: none for its own held-out examples. Raises ValueError where there are none."""
    task = cfg.task
    assert task.kind != "text"
    if paths or task.valid:
        examples = read_task(task, paths or task.valid)
    elif task.valid_fraction:
        _, examples = hold_out(read_task(task, task.train), task.valid_fraction, cfg.data.seed)
    else:
        raise ValueError("the run holds no examples out; name files with --data")
    rows = encode_task(task, examples, trained.tokenizer, trained.model.cfg)
    device = trained.model.embed.weight.device
    with torch.inference_mode():
        tally = count(trained.model, task, rows, batch, 0, 1, device)
    return {
        "text": "given" if paths else "held out",
        "examples": len(examples),
        "overall": tally.values(task, rows),
        "notes": rows.notes,
        "table": tally.text(task),
    }


def task_table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{found['model']} step {found['step']}, {found['dtype']}, {found['examples']:,} examples {found['text']}"]
    lines += [f"  {note}" for note in found["notes"]]
    lines += [f"  {name:<28} {value:.4f}" for name, value in found["overall"].items()]
    return "\n".join(lines) + (f"\n\n{found['table']}" if found["table"] else "")
