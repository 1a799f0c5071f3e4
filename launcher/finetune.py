"""Fine-tune a model: `deepspeed launcher/finetune.py --config configs/finetune/text.yaml [section.key=value …]`.

The recipe's `init` names what to begin with: a run's checkpoint, whatever topology wrote it (`runs/NAME` or
`runs/NAME@STEP`), or a Hugging Face folder. All else is as for launcher/pretrain.py: the same loop, checkpoints, resume,
logs and exit codes.
"""

import sys
from collections.abc import Callable
from typing import Any

from launcher import launchers  # noqa: F401  first: it notes who started this rank before torch takes seconds

# isort: split
from launcher.config import FinetuneConfig, RunConfig, is_finetune, read_recipe
from launcher.evaluation import evaluate_text
from launcher.metrics import MetricsLog
from launcher.origin_config import load_finetune_config, refuse_other_tokenizer, tokenizer_of
from launcher.origin_weights import origin_weights
from launcher.pretrain import leave, main
from launcher.run_data import RunData, open_data
from launcher.start import PRETRAIN, Command, uses_of_text
from launcher.task_config import ChatTask, ClassifyTask, PreferenceTask, TagTask, TextTask
from launcher.task_data import open_task_data
from launcher.task_evaluation import evaluate_task
from launcher.trained import Initial, build_model
from parallel.engine import Engine
from parallel.mesh import Mesh


def of_finetune(cfg: RunConfig) -> FinetuneConfig:
    assert isinstance(cfg, FinetuneConfig)
    return cfg


def open_tuning_data(
    cfg: RunConfig, cursor: dict[str, Any] | None, step: int, dp_size: int, left_out: list[tuple[int, int]]
) -> RunData:
    if not isinstance(of_finetune(cfg).task, TextTask):
        return open_task_data(of_finetune(cfg), tokenizer_of(of_finetune(cfg)), cursor, step, dp_size, left_out)
    data = open_data(cfg, cursor, step, dp_size, left_out)
    refuse_other_tokenizer(of_finetune(cfg), data.tokenizer)
    return data


def initial(cfg: RunConfig, mesh: Mesh) -> Initial:
    return origin_weights(of_finetune(cfg), mesh)


def evaluate(
    cfg: RunConfig,
    engine: Engine,
    data: RunData,
    sample: int,
    metrics: MetricsLog | None,
    step: int,
    enter: Callable[[str], None],
) -> dict[str, float]:
    of_task = evaluate_text if isinstance(of_finetune(cfg).task, TextTask) else evaluate_task
    return of_task(cfg, engine, data, sample, metrics, step, enter)


def uses(cfg: RunConfig) -> dict[str, str]:
    if isinstance(of_finetune(cfg).task, ClassifyTask | TagTask):
        label = f"launcher/label.py {cfg.run_dir} --text 'a text'"
        return {"label texts": label, "evaluate it": f"launcher/evaluate.py {cfg.run_dir}"}
    if isinstance(of_finetune(cfg).task, ChatTask | PreferenceTask):
        return {"talk to it": f"launcher/generate.py {cfg.run_dir} --chat"}
    return uses_of_text(cfg)


FINETUNE = Command(
    name="finetune",
    description="Fine-tune from a run's checkpoint or a Hugging Face folder, or go on from the newest good checkpoint.",
    example="deepspeed --num_accelerators 2 launcher/finetune.py --config configs/finetune/text.yaml init=runs/embedded@600",
    load=load_finetune_config,
    open_data=open_tuning_data,
    build_model=build_model,
    initial=initial,
    evaluate=evaluate,
    uses=uses,
)


def command_for(recipe: str) -> Command:
    """Which command a recipe is for. Raises ConfigError where it cannot be read."""
    return FINETUNE if is_finetune(read_recipe(recipe, [])) else PRETRAIN


if __name__ == "__main__":
    leave(main(sys.argv[1:], FINETUNE))
