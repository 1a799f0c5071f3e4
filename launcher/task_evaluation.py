"""Inside a fine-tuning for a task: its scores on held-out examples."""

from collections.abc import Callable

from launcher.config import RunConfig
from launcher.metrics import MetricsLog
from launcher.run_data import RunData
from parallel.engine import Engine


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
    raise NotImplementedError
