"""The tensors of a Hugging Face folder under the names of model/hf_model.py's parameters, whatever head they came with."""

import re
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from model.hf_model import HfModel

# How weights were named by older versions, and what older files carry that is no parameter.
_OLDER = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))
_NOT_PARAMETERS = re.compile(r"\.(position_ids|token_type_ids|attn\.(masked_)?bias)$")


def state_of(model: HfModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the names of the model's parameters; those of another head keep theirs. A tied one is there once.

    Takes files of the model without a head, whose names begin after the model's prefix, and older names. Raises
    ValueError where a weight of the body is missing, has another shape or no place, and where tied ones differ.
    """
    prefix = f"{model.theirs.base_model_prefix}."
    given = {name: tensor for name, tensor in state.items() if not _NOT_PARAMETERS.search(name)}
    for pattern, now in _OLDER:
        given = {pattern.sub(now, name): tensor for name, tensor in given.items()}
    if not any(name.startswith(prefix) for name in given):
        given = {prefix + name: tensor for name, tensor in given.items()}
    for name, canonical in _tied(model).items():
        copy = given.pop(name, None)
        if copy is not None and not torch.equal(given.setdefault(canonical, copy), copy):
            raise ValueError(
                f"{name} differs from {canonical}, but its config has one for both; say tie_word_embeddings: false there"
            )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not model.is_head(name)}
    body = {name: tuple(tensor.shape) for name, tensor in given.items() if not model.is_head(name)}
    if shapes.keys() != body.keys():
        raise ValueError(
            f"its weights do not match its config: missing {_some(shapes.keys() - body.keys())}, unexpected "
            f"{_some(body.keys() - shapes.keys())}; fetch or export the folder again"
        )
    if other := sorted(name for name in shapes if shapes[name] != body[name]):
        raise ValueError(
            f"size mismatch for {other[0]}: {body[other[0]]}, its config says {shapes[other[0]]}; fetch or export the "
            "folder again"
        )
    return given


def _some(names: Set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(sorted(names)[:3]) or 'none'}{more}"


def _tied(model: HfModel) -> dict[str, str]:
    """Other names of parameters -> the one that named_parameters gives."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}
