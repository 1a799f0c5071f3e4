"""Which network a `model` section describes."""

from model.classifier import Classifier
from model.config import ModelConfig
from model.hf_config import HfModelConfig
from model.hf_model import HfClassifier, HfModel
from model.transformer import Transformer

Network = Transformer | HfModel


def build_network(cfg: ModelConfig | HfModelConfig) -> Network:
    """The language model of this config, its parameters unset."""
    return HfModel(cfg) if isinstance(cfg, HfModelConfig) else Transformer(cfg)


def build_classifier(cfg: ModelConfig | HfModelConfig, n_labels: int, per_token: bool) -> Network:
    """The same with a head for labels, of each token or of a text."""
    if isinstance(cfg, HfModelConfig):
        return HfClassifier(cfg, n_labels, per_token)
    return Classifier(cfg, n_labels)
