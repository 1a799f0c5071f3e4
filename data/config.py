"""The data section of a run's config."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from data.cache import CacheConfig
from data.clean import CleanConfig
from data.lanes import StreamConfig
from data.masking import MaskingConfig
from data.sources import CorpusConfig, EmbeddedConfig, MegatronConfig, SourceConfig
from data.tokenizer import TokenizerConfig
from data.urls import ENVIRONMENT, leaves, secret_in

MOST_SKIPPED = 10**15  # samples, steps or documents: far beyond any run, and well within 64 bits

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StageConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Other weights from a token count on."""

    from_tokens: Annotated[int, Field(gt=0)]  # of the run; the stage begins with the first sample at or after it
    weights: Annotated[dict[str, Weight], Field(min_length=1)]  # by source; a source not named is not read


class SkipConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Samples that are left out: a stretch of steps or samples of the run, or documents of a shard. Say one of them."""

    steps: tuple[int, int] | None = None  # first and last step, as the log counts them; refused once the batch changed
    samples: tuple[int, int] | None = None  # first and last global sample number
    source: str | None = None  # with shard and documents
    shard: str | None = None  # as launcher/audit.py names it
    documents: tuple[int, int] | None = None  # first and last number in the shard; each sample with a token of them

    @model_validator(mode="before")
    @classmethod
    def _lists_are_pairs(cls, raw: Any) -> Any:
        """YAML and JSON know no tuples."""
        if not isinstance(raw, dict):
            return raw
        return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        of_shard = [value is not None for value in (self.source, self.shard, self.documents)]
        kinds = [self.steps is not None, self.samples is not None, all(of_shard)]
        if sum(kinds) != 1 or any(of_shard) != all(of_shard):
            raise ValueError(
                "an entry of data.skip needs exactly one of: steps: [first, last]; samples: [first, last]; or source, "
                f"shard and documents: [first, last] together; got {self.model_dump(exclude_none=True)}"
            )
        lowest = 1 if self.steps is not None else 0
        if (last := (self.steps or self.samples or self.documents or (0, 0))[1]) > MOST_SKIPPED:
            raise ValueError(f"data.skip ends at {last}; expected at most {MOST_SKIPPED}")
        pair = self.steps or self.samples or self.documents
        if pair is None or not lowest <= pair[0] <= pair[1]:
            raise ValueError(f"data.skip: {pair} is no stretch; expected [first, last] with {lowest} <= first <= last")
        return self


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What text a run reads, how it becomes tokens, and in which order they come."""

    # folder of the prepared corpus: launcher/prepare.py writes it, a run reads it, there or from a copy at a URL
    corpus: str = "corpora/embedded"
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = [EmbeddedConfig()]  # what launcher/prepare.py reads
    # a source's share is its weight to the power 1/temperature (arXiv:1901.07291 has exponents); above 1: more even
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    stages: list[StageConfig] = []  # other weights later in the run, in ascending order
    skip: list[SkipConfig] = []  # what is left out, such as a poisoned stretch
    # windows: each shard's tokens in a row, cut every seq_len; best_fit: whole documents put together, less truncation
    packing: Literal["windows", "best_fit"] = "windows"
    document_mask: bool = False  # attention stays inside a document, and positions restart there
    # windows are shuffled within groups of so many shards, groups and shards too; None: over the whole source.
    # A corpus read from a URL needs it: held locally of each source are the group in use, the next, and one to evaluate
    shuffle_shards: Annotated[int, Field(ge=1)] | None = None
    cache: CacheConfig = CacheConfig()  # of shards read from a URL, on each node's disk
    masking: MaskingConfig | None = None  # of a masked model, which must have it
    # instead of a prepared corpus: raw text, tokenized while the run reads it; then corpus is for held-out text alone
    stream: StreamConfig | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    shard_bytes: Annotated[int, Field(ge=2**10)] = 8 * 2**20  # UTF-8 bytes of text a shard, about
    # share of the documents held out for evaluation, by a hash of their text; 0 makes no held-out split
    valid_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.02
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of the held-out split and of the order of samples
    workers: Annotated[int, Field(ge=1)] | None = None  # processes that prepare; None: one for each core
    on_bad: Literal["stop", "skip"] = "stop"  # what prepare does with a malformed document
    max_bad: Annotated[int, Field(ge=0)] = 1000  # with skip: more malformed documents than this, in all, stop it
    # UTF-8 bytes; a longer document is malformed. A worker holds some 6 times as much at once (words), and 16 times
    # where every byte is a token
    max_document_bytes: Annotated[int, Field(ge=2**10)] = 2**28
    clean: CleanConfig = CleanConfig()  # duplicates and documents of low quality that prepare leaves out

    @model_validator(mode="before")  # so that no other message shows what it must not
    @classmethod
    def _no_secrets(cls, raw: Any) -> Any:
        wrong = [
            f"data.{key} is a URL with {secret}, which would be saved with the run; {ENVIRONMENT}, or fetch what it leads to"
            " and name the local copy"
            for key, value in leaves(raw)
            if isinstance(value, str) and (secret := secret_in(value))
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return raw

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        labels = [source.label for source in self.sources]
        wrong = [
            f"data.sources has {label!r} {labels.count(label)} times; give each a name of its own"
            for label in sorted(set(labels))
            if labels.count(label) > 1
        ]
        unweighted = [source.label for source in self.sources if source.weight is None]
        if unweighted and len(unweighted) < len(labels):
            wrong.append(
                f"data.sources: {', '.join(unweighted)} have no weight and others have; give all of them one, or none: "
                "then a source's share is its share of the tokens"
            )
        for before, stage in zip([0, *(stage.from_tokens for stage in self.stages)], self.stages, strict=False):
            if stage.from_tokens <= before:
                wrong.append(f"data.stages: from_tokens={stage.from_tokens} after {before}; expected ascending numbers")
            if unknown := sorted(stage.weights.keys() - set(labels)):
                wrong.append(
                    f"data.stages: weights of {', '.join(unknown)}, which data.sources does not have; it has {labels}"
                )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def _stream_stands_alone(self) -> Self:
        if self.stream is None:
            return self
        other = {"stages", "skip", "packing", "document_mask", "shuffle_shards", "temperature"} & self.model_fields_set
        if named := sorted(key for key in other if getattr(self, key) != type(self).model_fields[key].default):
            raise ValueError(
                f"data.{', data.'.join(named)} are for prepared corpora and have no effect on data.stream; leave them "
                "out, or prepare the text with launcher/prepare.py"
            )
        return self

    @property
    def text_sources(self) -> list[Any]:
        """The sources that prepare turns into tokens; the others are tokens already."""
        return [source for source in self.sources if not isinstance(source, CorpusConfig | MegatronConfig)]
