"""Scores of a run that was fine-tuned for a task: on its held-out examples, or on other files of the same form."""

from typing import Any

import torch

from data.examples import hold_out
from launcher.config import FinetuneConfig
from launcher.reference import read
from launcher.tally import Tally, count
from launcher.task_config import ChatTask, PreferenceTask
from launcher.task_examples import encode_task, read_task
from launcher.trained import Trained


def on_examples(trained: Trained, cfg: FinetuneConfig, paths: list[str], batch: int) -> dict[str, Any]:
    """As the run evaluates itself. paths: none for its own held-out examples. Raises ValueError where there are none.

    confusion: a row for each true label, a column for each that was found, both in the order of labels.
    """
    task = cfg.task
    assert task.kind != "text"
    if isinstance(task, PreferenceTask) and paths:
        raise ValueError(
            f"--data {paths[0]}: a preference is scored against the model that the tuning began with, and the run has kept "
            "what that makes of its own pairs alone; leave it out"
        )
    if paths or task.valid:
        examples = read_task(task, paths or task.valid)
    elif task.valid_fraction:
        _, examples = hold_out(read_task(task, task.train), task.valid_fraction, cfg.data.seed)
    else:
        raise ValueError("the run holds no examples out; name files with --data")
    assert trained.checkpoint is not None
    rows = encode_task(task, examples, trained.tokenizer, trained.model.cfg)
    if isinstance(task, PreferenceTask):
        rows.reference = read(trained.checkpoint.run_dir, trained.checkpoint.reader.manifest.cursor).get(
            rows.fingerprint()
        )
        if rows.reference is None:
            raise ValueError("the held-out pairs are not those of the run; restore the files of the task section")
    device = trained.model.embed.weight.device
    with torch.inference_mode():
        tally = count(trained.model, task, rows, batch, 0, 1, device)
    return {
        "text": "given" if paths else "held out",
        "examples": len(examples),
        "overall": tally.values(task, rows),
        "notes": rows.notes,
        "table": tally.text(task),
    } | (
        {"labels": list(task.labels), "confusion": tally.confusion.tolist()}
        if isinstance(tally, Tally) and not isinstance(task, ChatTask | PreferenceTask)
        else {}
    )


def task_table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{found['model']} step {found['step']}, {found['dtype']}, {found['examples']:,} examples {found['text']}"]
    lines += [f"  {note}" for note in found["notes"]]
    lines += [f"  {name:<28} {value:.4f}" for name, value in found["overall"].items()]
    return "\n".join(lines) + (f"\n\n{found['table']}" if found["table"] else "")
