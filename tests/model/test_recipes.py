"""The shipped model sizes against the published ones."""

from pathlib import Path

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "configs"

# Our exact count, and the published one with how far it may be off.
# GPT-3's table 2.1 rounds to two or three digits, 350M and 2.7B coarsely: 2 %. With width D and L layers its sizes are
# 50257 D + 2048 D + L (12 D^2 + 13 D) + 2 D. Llama 2's are the sums over the published weight files, and exact.
SIZES = {
    "gpt3-125m": (125_226_240, 125e6, 0.01),
    "gpt3-350m": (355_871_744, 350e6, 0.02),
    "gpt3-1.3b": (1_315_723_264, 1.3e9, 0.02),
    "gpt3-2.7b": (2_651_553_280, 2.7e9, 0.02),
    "gpt3-175b": (174_604_259_328, 175e9, 0.01),
    "llama2-7b": (6_738_415_616, 6_738_415_616, 0),
    "llama2-13b": (13_015_864_320, 13_015_864_320, 0),
    "llama2-70b": (68_976_648_192, 68_976_648_192, 0),
}


def load(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"])


@pytest.mark.parametrize("name", SIZES)
def test_recipe_has_the_published_size(name):
    exact, published, tolerance = SIZES[name]
    cfg = load(name)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.n_params == exact
    assert abs(exact - published) <= tolerance * published


@pytest.mark.parametrize("name", SIZES)
def test_recipe_has_the_published_head_width(name):
    assert load(name).dim_per_head == {"gpt3-125m": 64, "gpt3-350m": 64, "gpt3-2.7b": 80}.get(name, 128)


def test_llama2_70b_alone_groups_its_heads():
    assert {name: load(name).kv_heads for name in SIZES if load(name).kv_heads != load(name).n_heads} == {
        "llama2-70b": 8
    }
