"""The one place where a DeepSpeed configuration is made: a pure function of Longhaul's own config."""

import difflib
import json
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from parallel.config import OWNED_KEYS, OWNED_ZERO_KEYS, PASS_KEYS, ParallelConfig


def deepspeed_config(
    cfg: ParallelConfig, *, micro_batch_size: int, grad_accum_steps: int, dp_size: int, grad_clip: float
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Batch sizes are in sequences. grad_clip is the largest global gradient norm, 0 for none.
    """
    reduce_bucket = 50_000_000  # elements; DeepSpeed's 5e8 keeps 1 GB (bf16) of buffers for any model, however small
    ds: dict[str, Any] = {
        "train_batch_size": micro_batch_size * grad_accum_steps * dp_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": grad_clip,
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "reduce_bucket_size": reduce_bucket,
            "allgather_bucket_size": reduce_bucket,
            "overlap_comm": cfg.zero_stage >= 2,
        },
        "wall_clock_breakdown": False,
    }
    if cfg.precision != "fp32":
        ds[cfg.precision] = {"enabled": True}
    for key, where in (("offload_optimizer", cfg.offload_optimizer), ("offload_param", cfg.offload_param)):
        if where != "none":
            ds["zero_optimization"][key] = {"device": where, "pin_memory": True}
    if cfg.offload_optimizer != "none":
        ds["zero_force_ds_cpu_optimizer"] = (
            False  # else it takes no AdamW but its own, which nodes would have to compile
        )
    ds["data_types"] = {"grad_accum_dtype": cfg.resolved_grad_accum_dtype}
    for key, value in cfg.deepspeed.items():
        ds[key] = {**ds[key], **value} if isinstance(value, dict) and isinstance(ds.get(key), dict) else value
    return ds


def check_passthrough(cfg: ParallelConfig) -> list[str]:
    """What is wrong with `parallel.deepspeed`, one sentence a key; empty when nothing is."""
    wrong = []
    for key in cfg.deepspeed:
        where = f"parallel.deepspeed.{key}"
        if key in OWNED_KEYS:
            wrong.append(f"{where}: this key is Longhaul's; set {OWNED_KEYS[key]} instead")
        elif key not in PASS_KEYS:
            wrong.append(f"{where}: DeepSpeed has no such key{_nearest(key, PASS_KEYS)}")
    zero = cfg.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*wrong, f"parallel.deepspeed.zero_optimization: got {zero!r}; expected a mapping"]
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    names |= set(DeepSpeedZeroConfig.model_fields)
    for key, value in zero.items():
        where = f"parallel.deepspeed.zero_optimization.{key}"
        if key in OWNED_ZERO_KEYS:
            wrong.append(f"{where}: this key is Longhaul's; set {OWNED_ZERO_KEYS[key]} instead")
        elif key not in names:
            wrong.append(f"{where}: DeepSpeed has no such key{_nearest(key, names)}")
        else:
            try:
                DeepSpeedZeroConfig(**{key: value})
            except ValueError as error:
                wrong.append(f"{where}: got {value!r}; {_first_line(error)}")
    try:
        json.dumps(cfg.deepspeed, allow_nan=False)
    except (TypeError, ValueError) as error:
        wrong.append(f"parallel.deepspeed: only what JSON can hold may be passed on: {error}")
    return wrong


def _first_line(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    return str(errors()[0]["msg"]) if callable(errors) else str(error)


def _nearest(key: str, known: set[str] | frozenset[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {match[0]}?" if match else f"; known are {', '.join(sorted(known))}"
