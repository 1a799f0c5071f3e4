"""Tasks of EleutherAI's lm-eval for an exported folder, its results kept with the run.

    python launcher/harness.py exports/NAME --tasks hellaswag,arc_easy
    python launcher/harness.py exports/NAME --tasks mine --include-path tasks/ --run runs/NAME --save mine

The model is lm-eval's own of transformers. One thing differs from its command: a piece of the run's tokenizer may reach
over the end of a question into an answer, where lm-eval cuts the ids of both at the length of the question's, and so scores
another text, or none. Such an answer is encoded by itself here. Exit code 2 when something cannot be read or asked for.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from launcher.export import REPORT
from launcher.results import keep, refuse_other_data
from model.hf_config import is_masked
from model.hf_folder import DTYPES, read_config, read_head

INSTALL = "pip install -c constraints.txt -e '.[harness]'"


def import_lm_eval() -> Any:
    """Raises ValueError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(f"lm-eval is needed ({error}); run: {INSTALL}") from None
    return lm_eval


def model_of(folder: Path, dtype: str, batch_size: int) -> Any:
    """lm-eval's model of the folder, on the accelerator if there is one."""

    class Model(import_lm_eval().models.huggingface.HFLM):  # type: ignore[misc]
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, answer = super()._encode_pair(context, continuation)
            if before + answer == self.tok_encode(context + continuation) and answer:
                return before, answer
            text = context.rstrip()
            return before, self.tok_encode(context[len(text) :] + continuation, add_special_tokens=False)

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return Model(str(folder), dtype=DTYPES.get(dtype, dtype), batch_size=batch_size, device=str(device))


def refuse_folder(folder: Path) -> None:
    """Raise ValueError for what continues no text."""
    if read_head(folder) is not None or is_masked(read_config(folder, quantized=True)):
        raise ValueError(
            f"{folder} continues no text, as tasks of lm-eval ask for; launcher/evaluate.py scores the run that it is of"
        )


def step_of(folder: Path, run_dir: Path) -> int:
    """At which the run was exported. Raises ValueError where the folder is of another run, or does not say."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
        name, step = str(report["run"]), int(report["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / REPORT} does not say of what run and step it is ({error}); export it again"
        ) from None
    if name != run_dir.name or not (run_dir / "checkpoints").is_dir():
        raise ValueError(f"--run {run_dir}: {folder} is of the run {name}; name the folder of that run")
    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What is printed and kept. Raises ValueError for what cannot be read or asked for, OSError for data out of reach."""
    if (args.run is None) != (args.save is None):
        raise ValueError("--run and --save go together: the run's folder, and the name of the results there")
    for name, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}; expected at least 1")
    refuse_folder(args.folder)
    tasks = sorted(args.tasks.split(","))
    step = None if args.run is None else step_of(args.folder, args.run)
    about = tasks if args.limit is None else [*tasks, f"the first {args.limit} of each"]
    if args.run is not None:
        refuse_other_data(args.run, args.save, about)
    lm_eval = import_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=None if args.include_path is None else str(args.include_path))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(f"--tasks {','.join(unknown)}: lm-eval has no such task; it lists them with: lm-eval ls tasks")
    model = model_of(args.folder, args.dtype, args.batch_size)
    found = lm_eval.simple_evaluate(model, tasks=tasks, limit=args.limit, task_manager=manager, log_samples=False)
    return {
        "model": str(args.folder),
        "step": step,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "data": about,
        "lm_eval": lm_eval.__version__,
        "overall": {
            f"{task}/{metric.removesuffix(',none')}": value
            for task, values in found["results"].items()
            for metric, value in values.items()
            if isinstance(value, float)
        },
    }


def table(found: dict[str, Any]) -> str:
    width = max(map(len, found["overall"]), default=0)  # a task may give no number
    lines = [f"{found['model']}, {found['dtype']}, lm-eval {found['lm_eval']}: {', '.join(found['data'])}"]
    return "\n".join([*lines, *(f"  {name:{width}}  {value:.4f}" for name, value in found["overall"].items())])


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launcher/harness.py",
        description="Score an exported folder on tasks of lm-eval.",
        epilog="example: python launcher/harness.py exports/embedded --tasks piqa --run runs/embedded --save piqa",
    )
    parser.add_argument("folder", type=Path, help="that launcher/export.py wrote, or another of transformers")
    parser.add_argument("--tasks", required=True, help="names of lm-eval's tasks, with commas between them")
    parser.add_argument("--include-path", type=Path, help="folder with YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of each task at most (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a forward (default 8)")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="to compute in (default: the folder's)"
    )
    parser.add_argument("--run", type=Path, help="the run that the folder is of; with --save NAME the result is kept there, "
                        "as evaluations/NAME/step-N.json, and drawn in TensorBoard")  # fmt: skip
    parser.add_argument("--save", metavar="NAME", help="with --run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        found = measure(args)
        print(json.dumps(found, ensure_ascii=False) if args.json else table(found))
        if args.run is not None:
            print(f"kept in {keep(args.run, args.save, found)}", file=sys.stderr)
    except ValueError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
