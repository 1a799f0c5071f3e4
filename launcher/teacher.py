"""What a run with a distill section learns from: a trained decoder, found and held to like an origin, and needed to the end.

It is whole on every device, in the run's precision, and no part of the engine nor of its checkpoints.
"""

from collections import deque
from typing import TypeVar

import torch
from pydantic import ValidationError

from launcher.config import ConfigError, OriginConfig, RunConfig
from launcher.origin import Origin, open_origin
from launcher.origin_weights import open_whole
from launcher.run_dir import read_saved_config
from launcher.trained import filled
from model.config import ModelConfig
from model.distill import Student, Teacher
from model.hf_folder import DTYPES
from model.network import build_network
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError
from parallel.engine import Engine
from parallel.mesh import Mesh

KEY = "distill.teacher"
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def with_teacher(cfg: AnyConfig, needed: bool = True) -> AnyConfig:
    """The config with the identity of its teacher, if it has one: that of the run's folder, once that is there.

    needed: False for a finished run, whose teacher may be gone.

    Raises ConfigError or DataError where the teacher cannot be used, or is another.
    """
    if cfg.distill is None:
        return cfg
    known = cfg.distill.origin or _kept(cfg)
    if known is not None and not needed:
        return cfg.model_copy(update={"distill": cfg.distill.model_copy(update={"origin": known})})
    opened = open_origin(cfg.distill.teacher, None if known is None else known.step, KEY)
    _refuse(opened, cfg)
    found = opened.identity()
    if known is not None and known != found:
        differ = [key for key in OriginConfig.model_fields if getattr(known, key) != getattr(found, key)]
        raise ConfigError(
            f"{KEY}: {opened} is not what the run learned from before: another {', '.join(differ)}; restore it, or use "
            "another run.name"
        )
    return cfg.model_copy(update={"distill": cfg.distill.model_copy(update={"origin": found})})


def _kept(cfg: RunConfig) -> OriginConfig | None:
    """What the run's folder says of its teacher."""
    kept = (read_saved_config(cfg.run_dir) or {}).get("distill")
    try:
        return None if kept is None else OriginConfig.model_validate(kept["origin"])
    except (ValidationError, KeyError, TypeError) as error:
        raise ConfigError(f"the run's config.yaml does not say what it learned from ({error}); restore it") from None


def _refuse(opened: Origin, cfg: RunConfig) -> None:
    """Raise ConfigError where what was opened cannot teach this run."""
    if not isinstance(opened.model, ModelConfig):
        raise ConfigError(f"{KEY}: {opened} is of family hf; expected a run of the own decoder or a folder of a GPT-2, a "
                          "Llama or a Qwen3")  # fmt: skip
    with torch.device("meta"):
        needed = {name: tuple(p.shape) for name, p in build_network(opened.model).named_parameters()}
    if opened.shapes != needed:
        other = sorted(opened.shapes.items() ^ needed.items())[0][0]
        raise ConfigError(
            f"{KEY}: {opened} is no language model, by its {other}; expected one that tells the next token"
        )
    if opened.model.seq_len < cfg.model.seq_len:
        raise ConfigError(
            f"{KEY}: {opened} reads {opened.model.seq_len} tokens, and the student's rows have model.seq_len="
            f"{cfg.model.seq_len}; make it at most {opened.model.seq_len}"
        )


def load_teacher(cfg: RunConfig, mesh: Mesh) -> Teacher | None:
    """The teacher on this rank's device. All ranks call it.

    Raises ConfigError where it is another or damaged, CheckpointError where a rank cannot read or hold it; on all of them.
    """
    distill = cfg.distill
    if distill is None:
        return None
    assert distill.origin is not None
    step = distill.origin.step
    opened = open_whole(
        lambda: open_origin(distill.teacher, step, KEY), distill.origin.digest, KEY, distill.teacher, mesh
    )
    with torch.device("meta"):
        model = build_network(opened.model).to(DTYPES[cfg.parallel.precision])

    def read(name: str) -> torch.Tensor:
        shape = torch.Size(opened.shapes[name])
        return opened.read(name, 0, shape.numel()).view(shape)

    wrong = ""
    try:
        model = filled(model.to_empty(device=mesh.device).requires_grad_(False), read)
    except (CheckpointError, OSError, RuntimeError) as error:  # the last when the device has no room
        wrong = f"{KEY}={distill.teacher} cannot be loaded by rank {mesh.rank}: {type(error).__name__}: {error}"
    if told := next(filter(None, mesh.gather(wrong)), None):
        raise CheckpointError(told)
    assert isinstance(model, Transformer), "others were refused before"
    sums = deque[torch.Tensor](maxlen=cfg.grad_accum_steps(mesh.dp_size))
    return Teacher(model, opened.tokenizer.vocab_size, distill.weight, distill.temperature, sums)


def teach(engine: Engine, teacher: Teacher | None) -> None:
    """Give the engine's model its teacher."""
    if teacher is not None:
        assert isinstance(engine.module, Student)
        engine.module.head.teacher = teacher


def parts_of_loss(engine: Engine, loss: float, n_targets: int) -> dict[str, float]:
    """What the last step's loss is made of, means over its targets in nats: {} without a teacher. All ranks call it."""
    teacher = engine.module.head.teacher if isinstance(engine.module, Student) else None
    if teacher is None:
        return {}
    kl = engine.mesh.sum_on_device(torch.stack(list(teacher.kl)).double().sum()).item() / n_targets
    found = {"distill/kl": kl}
    if teacher.share < 1:
        found["distill/text"] = (loss - teacher.share * teacher.temperature**2 * kl) / (1 - teacher.share)
    return found


def told_teacher(cfg: RunConfig) -> str:
    distill = cfg.distill
    assert distill is not None
    assert distill.origin is not None
    at = "" if distill.origin.step is None else f" at step {distill.origin.step}"
    return (
        f"learns from {distill.teacher}{at} (digest {distill.origin.digest}), weight {distill.weight:g}, temperature "
        f"{distill.temperature:g}; it is needed to the end of the run"
    )
