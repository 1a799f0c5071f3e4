"""The decoder with a head for labels instead of one for tokens."""

from torch import nn

from model.config import ModelConfig


class Classifier(nn.Module):
    """The parameters of model/transformer.py by the same names, and `score`."""

    def __init__(self, cfg: ModelConfig, n_labels: int) -> None:
        super().__init__()
        raise NotImplementedError
