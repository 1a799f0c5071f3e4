"""Inside a fine-tuning for a task: its scores on held-out examples, each counted once at any number of ranks."""

import logging
import time
from collections.abc import Callable

from launcher.config import RunConfig
from launcher.metrics import MetricsLog, describe
from launcher.run_data import RunData
from launcher.tally import count
from launcher.task_data import TaskData
from launcher.task_report import write_report
from parallel.engine import Engine

log = logging.getLogger("longhaul")


def evaluate_task(
    cfg: RunConfig,
    engine: Engine,
    data: RunData,
    sample: int,
    metrics: MetricsLog | None,
    step: int,
    enter: Callable[[str], None],
) -> dict[str, float]:
    """As launcher/evaluation.py's evaluate_text: scores by name, the same on every rank, those that data.scores() names."""
    assert isinstance(data, TaskData)
    if data.held_out is None:
        return {}
    began, mesh = time.perf_counter(), engine.mesh
    with engine.evaluating() as model:
        mine = count(
            model, data.task, data.held_out, cfg.train.micro_batch_size, mesh.dp_rank, mesh.dp_size, mesh.device, enter
        )
    tally = mine.unflatten(mesh.sum(mine.flatten()))
    values, text = tally.values(data.task, data.held_out), tally.text(data.task)
    if metrics is not None:
        metrics.write(step, {**values, "speed/eval_time_s": time.perf_counter() - began})
        log.info("step %d  held-out %s", step, describe(values, [name for name in values if name in _SHOWN]))
        if text:
            metrics.write_text("valid/report", f"```\n{text}\n```", step)
        if step >= cfg.train.steps and text:
            log.info("%s", text)
        write_report(cfg.run_dir, step, values, text, metrics.path)
    return values


_SHOWN = ("loss/valid", "loss/valid_perplexity", "loss/valid_bits_per_byte", "valid/accuracy", "valid/f1",
          "valid/preferred", "valid/margin", "valid/entity_precision", "valid/entity_recall", "valid/entity_f1")  # fmt: skip
