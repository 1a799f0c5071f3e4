"""The data section: defaults, and values that are refused at the door."""

import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.sources import EmbeddedConfig, TextConfig


def test_defaults_and_dump_come_back():
    cfg = DataConfig()
    assert isinstance(cfg.source, EmbeddedConfig)
    assert DataConfig(**cfg.model_dump()) == cfg
    text = DataConfig(source={"kind": "text", "paths": ["a.txt"]}, tokenizer={"vocab_size": 4096})
    assert isinstance(text.source, TextConfig)
    assert DataConfig.model_validate(text.model_dump(mode="json")) == text


@pytest.mark.parametrize(
    "values",
    [
        {"corpus": 3},
        {"shard_bytes": 0},
        {"shard_bytes": 2.0**20},
        {"valid_fraction": -0.1},
        {"valid_fraction": 1.0},
        {"valid_fraction": float("nan")},
        {"valid_fraction": True},
        {"valid_fraction": "0.1"},
        {"seed": -1},
        {"seed": 2**63},
        {"workers": 0},
        {"workers": True},
        {"tokeniser": {}},
    ],
)
def test_refusals(values):
    with pytest.raises(ValidationError):
        DataConfig(**values)


def test_sections_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().seed = 3
