"""Initial weights as a function of (name, shape, seed): any process can make any range of any parameter, equal bits.

The values do not depend on the order in which a model is built, on the world size or on how a parameter is cut, so a
run that starts sharded over 512 ranks starts from the same weights as one on a laptop.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from model.config import ModelConfig
from model.hf_config import HfModelConfig
from model.lora import A, B

BLOCK = 2**20  # elements drawn from one generator: a range costs at most two blocks more than it needs


def initial_values(
    name: str,
    shape: Sequence[int],
    cfg: ModelConfig | HfModelConfig,
    seed: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Elements [start, stop) of the flattened parameter `name`, fp32, 1-D, on the CPU; `stop` None means to its end.

    Norm weights are 1, biases 0, matrices N(0, init_std). With scale_residual_init the matrices that write into the
    residual stream (wo, w_down) are divided by sqrt(2 * n_layers), the number of such writes, so that the variance of
    the stream does not grow with depth (GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.3); of model.family hf those of the architectures whose own code does so. LoRA's B is 0 and its A
    uniform within 1 / sqrt(its inputs), the Kaiming-uniform values with a = sqrt(5) that peft draws (He et al. 2015,
    arXiv:1502.01852). Raises ValueError for a range outside the parameter or a name the model does not have.
    """
    numel = math.prod(shape)
    stop = numel if stop is None else stop
    if not 0 <= start <= stop <= numel:
        raise ValueError(
            f"range [{start}, {stop}) of {name} is not within [0, {numel}), the elements of shape {list(shape)}; "
            "start and stop count elements of the flattened parameter"
        )
    if A in name:
        return _drawn(_uniform, name, numel, seed, start, stop, 1 / math.sqrt(shape[1]))
    if B in name:
        return _constant(0.0, stop - start)
    if isinstance(cfg, HfModelConfig):
        constant, std = _of_hf(name, len(shape), cfg)
    else:
        constant, std = _of_decoder(name, cfg)
    if std is None:
        return _constant(constant, stop - start)
    cutoff = cfg.init_cutoff if isinstance(cfg, HfModelConfig) else None
    draw = _normal if cutoff is None else functools.partial(_truncated, cutoff=cutoff)
    return _drawn(draw, name, numel, seed, start, stop, std)


def _of_decoder(name: str, cfg: ModelConfig) -> tuple[float, float | None]:
    """(the value of all elements, None), or (0, standard deviation)."""
    module, _, kind = name.rpartition(".")
    layer = module.rpartition(".")[2]
    if kind == "bias":
        return 0.0, None
    if kind == "weight" and (layer == "norm" or layer.endswith("_norm")):
        return 1.0, None
    if kind == "weight" and layer in ("wo", "w_down"):
        return 0.0, residual_init_std(cfg)
    if kind == "weight" and layer in ("embed", "pos_embed", "head", "score", "wq", "wk", "wv", "w_gate", "w_up"):
        return 0.0, cfg.init_std
    raise ValueError(
        f"no initial values are defined for the parameter {name!r}; "
        "expected a name from Transformer.named_parameters(), such as 'blocks.0.attn.wq.weight'"
    )


# Of architectures that scale them: how the names of matrices end that write into the residual stream, or to a head.
_RESIDUAL = {"gpt2": ("c_proj.weight",), "modernbert": ("Wo.weight", "head.dense.weight", "decoder.weight")}


def _of_hf(name: str, dims: int, cfg: HfModelConfig) -> tuple[float, float | None]:
    """As _of_decoder, by what transformers' models begin with: vectors named weight are those of norms."""
    kind = name.rpartition(".")[2]
    if kind == "bias":
        return 0.0, None
    if kind == "weight" and dims == 1:
        return 1.0, None
    if kind == "weight":
        if cfg.model_type == "modernbert" and name == "classifier.weight":
            return 0.0, cfg.d_model**-0.5
        residual = name.endswith(_RESIDUAL.get(cfg.model_type, ()))
        return 0.0, cfg.init_std / math.sqrt(2 * cfg.n_layers) if residual else cfg.init_std
    raise ValueError(
        f"no initial values are defined for the parameter {name!r} of a {cfg.model_type}; expected one that is named weight "
        "or bias"
    )


@torch.no_grad()
def fill(model: nn.Module, cfg: ModelConfig | HfModelConfig, seed: int) -> None:
    """Give every parameter its initial_values for `seed`, in place and in its own dtype."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, which has no memory to fill; call to_empty(device='cpu') first"
            )
        flat = parameter.view(-1)
        for start in range(0, parameter.numel(), BLOCK):
            stop = min(start + BLOCK, parameter.numel())
            flat[start:stop] = initial_values(name, parameter.shape, cfg, seed, start, stop)


def residual_init_std(cfg: ModelConfig) -> float:
    """Standard deviation of wo and w_down at the start."""
    return cfg.init_std / math.sqrt(2 * cfg.n_layers) if cfg.scale_residual_init else cfg.init_std


def _constant(value: float, numel: int) -> Tensor:
    return torch.full((numel,), value, dtype=torch.float32, device="cpu")


Draw = Callable[[np.random.Generator, int], np.ndarray]  # (generator, n) -> (n,) float32


def _normal(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.standard_normal(n, dtype=np.float32)


def _truncated(generator: np.random.Generator, n: int, cutoff: float) -> np.ndarray:
    """A normal distribution without what is further than `cutoff` from 0."""
    edge = math.erf(cutoff / math.sqrt(2))
    uniform = torch.from_numpy(edge * (2 * generator.random(n) - 1))  # fp64
    return (math.sqrt(2) * torch.erfinv(uniform)).float().numpy()


def _uniform(generator: np.random.Generator, n: int) -> np.ndarray:
    return 2 * generator.random(n, dtype=np.float32) - 1


def _drawn(draw: Draw, name: str, numel: int, seed: int, start: int, stop: int, scale: float) -> Tensor:
    values = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        drawn = draw(_generator(name, seed, block), min(BLOCK, numel - first))
        low, high = max(start, first), min(stop, first + len(drawn))
        values[low - start : high - start] = drawn[low - first : high - first]
    values *= scale
    return torch.from_numpy(values)


def _generator(name: str, seed: int, block: int) -> np.random.Generator:
    """That of one block.

    NumPy's and not torch's: torch's CPU generator keeps 32 bits of its seed, and among the 70,000 blocks of a 70B model
    two would be expected to share theirs and hold equal numbers.
    """
    key = xxhash.xxh3_128_intdigest(f"{seed}/{block}/{name}".encode())
    return np.random.Generator(np.random.SFC64(key))
