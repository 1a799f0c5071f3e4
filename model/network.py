"""Which network a `model` section describes."""

from model.config import ModelConfig
from model.hf_config import HfModelConfig
from model.hf_model import HfModel
from model.transformer import Transformer

Network = Transformer | HfModel


def build_network(cfg: ModelConfig | HfModelConfig) -> Network:
    """The language model of this config, its parameters unset."""
    return HfModel(cfg) if isinstance(cfg, HfModelConfig) else Transformer(cfg)
