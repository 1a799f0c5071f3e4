"""What a fine-tuning for a task reads: labelled texts or conversations, as batches with an order and a cursor."""

from collections.abc import Sequence
from typing import Any

from data.tokenizer import Tokenizer
from launcher.config import FinetuneConfig
from launcher.run_data import RunData


def open_task_data(
    cfg: FinetuneConfig,
    tokenizer: Tokenizer,
    cursor: dict[str, Any] | None,
    step: int,
    dp_size: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> RunData:
    """Open the files of cfg.task; the other arguments as launcher/run_data.py's open_data takes them.

    tokenizer: the origin's. Raises DataError or ConfigError where something does not fit.
    """
    raise NotImplementedError
