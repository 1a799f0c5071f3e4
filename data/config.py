"""The data section of a run's config."""

from typing import Annotated

from pydantic import BaseModel, Field

from data.sources import EmbeddedConfig, SourceConfig
from data.tokenizer import TokenizerConfig


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What text a run reads, how it becomes tokens, and in which order they come."""

    corpus: str = "corpora/embedded"  # folder of the prepared corpus: launcher/prepare.py writes it, a run reads it
    source: SourceConfig = EmbeddedConfig()  # the text that launcher/prepare.py reads
    tokenizer: TokenizerConfig = TokenizerConfig()
    shard_bytes: Annotated[int, Field(ge=2**10)] = 8 * 2**20  # UTF-8 bytes of text a shard, about
    # share of the documents held out for evaluation, by a hash of their text; 0 makes no held-out split
    valid_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.02
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of the held-out split and of the order of samples
    workers: Annotated[int, Field(ge=1)] | None = None  # processes that prepare; None: one for each core
