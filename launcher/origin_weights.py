"""The weights that a fine-tuned run begins with.

Each is either the origin's, element by element whatever topology wrote it, or named as new; what the new model has no place
for is named as dropped. Both are allowed for heads alone, so that no weight stays at random values unseen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data.errors import DataError
from launcher.config import ConfigError, FinetuneConfig
from launcher.origin import HEAD, GrownOrigin, Origin, origin_of
from launcher.trained import NEW, Initial, build_model, build_plain, lora_of
from model.hf_model import HfClassifier, HfModel
from model.init import initial_values
from model.lora import is_adapter, plain_name
from model.network import Network
from parallel.checkpoint import CheckpointError
from parallel.mesh import Mesh


def origin_weights(cfg: FinetuneConfig, mesh: Mesh) -> Initial:
    """The weights that a fine-tuned run begins with. All ranks call it.

    Raises ConfigError, on all of them, where the origin is damaged, or another than the config's, or a weight of the new
    model would have no value.
    """
    opened = open_whole(lambda: origin_of(cfg), cfg.origin.digest, "init", cfg.init, mesh)
    with torch.device("meta"):
        model, whole = build_plain(cfg), build_model(cfg)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new, dropped = match_model(model, shapes, opened)
    lines = _told(shapes, opened, new, dropped)
    if (lora := lora_of(cfg)) is not None:
        n_adapters = sum(is_adapter(name) for name, _ in whole.named_parameters())
        lines.append(f"  new beside them: {n_adapters} matrices of LoRA, rank {lora.rank}, that add 0 as yet")
    return Initial(_reader(cfg, opened, new), tuple(lines))


def open_whole(open_it: Callable[[], Origin], digest: str, key: str, name: str, mesh: Mesh) -> Origin:
    """An origin that all ranks find to be the one of this digest, and undamaged. All ranks call it.

    key, name: of the recipe, for messages. Raises ConfigError, on all of them.
    """
    opened, wrong = None, ""
    try:
        opened = open_it()
        if opened.digest != digest:
            wrong = f"{opened} is not the one that the run names: its digest is {opened.digest}, not {digest}"
    except (ConfigError, DataError, OSError) as error:
        wrong = f"rank {mesh.rank}: {error}"
    if told := next(filter(None, mesh.gather(wrong)), None):
        raise ConfigError(told)
    assert opened is not None
    try:
        damaged = opened.faults(mesh)
    except CheckpointError as error:  # the same on every rank
        raise ConfigError(f"{key}={name}: {error}") from None
    if damaged:
        raise ConfigError(f"{key}={name}: {opened} is damaged: {damaged[0]}; name another as {key}: RUN@STEP")
    return opened


def match_model(model: Network, shapes: dict[str, tuple[int, ...]], origin: Origin) -> tuple[list[str], list[str]]:
    """As match, with the heads that this model may have new or its origin may lose."""
    if isinstance(model, HfClassifier):
        return match(shapes, origin, model.is_head, model.is_head)
    if isinstance(model, HfModel):
        return match(shapes, origin, lambda name: False, model.is_head)
    return match(shapes, origin)


def match(
    shapes: dict[str, tuple[int, ...]],
    origin: Origin,
    may_be_new: Callable[[str], bool] = lambda name: name.startswith(NEW),
    may_be_dropped: Callable[[str], bool] = lambda name: name == HEAD,
) -> tuple[list[str], list[str]]:
    """Names of weights of a model that are new, and of the origin's that it has no place for.

    shapes: of the model. Raises ConfigError where others than heads would be either.
    """
    new, dropped = sorted(shapes.keys() - origin.shapes.keys()), sorted(origin.shapes.keys() - shapes.keys())
    other = [name for name in shapes.keys() & origin.shapes.keys() if shapes[name] != origin.shapes[name]]
    wrong = [f"{name} has no value in it" for name in new if not may_be_new(name)]
    wrong += [f"its {name} has no place in the model" for name in dropped if not may_be_dropped(name)]
    wrong += [f"its {name} is {origin.shapes[name]}, the model's {shapes[name]}" for name in sorted(other)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = "A head for labels begins new from a language model, or from one with the same labels"
        if not any(map(may_be_new, shapes)):
            hint = (
                "A language model begins from one that has its head for tokens: name the one that this was tuned from"
            )
        raise ConfigError(
            f"{origin} is not of the model that is needed here: {'; '.join(wrong[:3])}{more}. {hint}; nothing else may be "
            "missing"
        )
    return new, dropped


def _reader(cfg: FinetuneConfig, origin: Origin, new: list[str]) -> Callable[[str, tuple[int, ...], int, int], Tensor]:
    def read(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name in new or is_adapter(name):
            return initial_values(name, shape, cfg.model, cfg.run.seed, start, stop)
        return origin.read(plain_name(name), start, stop)

    return read


def _told(shapes: dict[str, tuple[int, ...]], origin: Origin, new: list[str], dropped: list[str]) -> list[str]:
    count = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in new)
    lines = [f"loaded {len(shapes) - len(new)} tensors, {count:,} numbers, from {origin} (digest {origin.digest})"]
    if isinstance(origin, GrownOrigin):
        lines.append(origin.told())
    if new:
        lines.append(f"  new, with values drawn: {', '.join(f'{name} {shapes[name]}' for name in new)}")
    if dropped:
        lines.append(f"  dropped: {', '.join(f'{name} {origin.shapes[name]}' for name in dropped)}")
    return lines
