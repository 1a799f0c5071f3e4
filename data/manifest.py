"""manifest.json: what a prepared corpus folder holds, source by source and shard by shard."""

from typing import Literal

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from data.errors import DataError

FORMAT_VERSION: Literal[2] = 2
MANIFEST = "manifest.json"

Split = Literal["train", "valid"]


class CorpusError(DataError):
    """A folder that is not a whole prepared corpus, or not one of this version."""


class ShardEntry(BaseModel, frozen=True, extra="forbid"):
    """One shard as the manifest knows it; hashes are xxh3-64 in hexadecimal."""

    name: str  # NAME of NAME.bin and NAME.idx, from the folder that its source lies in
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt  # of the UTF-8 text that the tokens stand for; 0 where that is not known
    bin_bytes: NonNegativeInt
    idx_bytes: NonNegativeInt
    bin_xxh3: str
    idx_xxh3: str


class SplitEntry(BaseModel, frozen=True, extra="forbid"):
    """The shards of one split of a source, in reading order."""

    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class SourceEntry(BaseModel, frozen=True, extra="forbid"):
    """One source of the corpus: what it was made from, what was left out, and its shards."""

    kind: str
    folder: str | None = None  # absolute path or URL in which the shards lie; None: the corpus folder itself
    about: dict[str, str | int]  # where the text came from
    left_out: dict[str, NonNegativeInt]  # documents left out, by reason
    unknown_tokens: NonNegativeInt = 0  # tokens that stand for what the vocabulary lacks
    splits: dict[Split, SplitEntry]


class TokenizerEntry(BaseModel, frozen=True, extra="forbid"):
    """The tokenizer that the tokens belong to; its folder is tokenizer/ in the corpus folder."""

    fingerprint: str
    vocab_size: PositiveInt
    eos_id: NonNegativeInt


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """manifest.json, written last: a folder without one is not a corpus."""

    format_version: Literal[2] = FORMAT_VERSION
    tokenizer: TokenizerEntry
    dtype: str  # of the tokens in the .bin files that prepare wrote
    seed: int  # of the held-out split
    sources: dict[str, SourceEntry]

    def splits(self, split: Split) -> dict[str, SplitEntry]:
        """The sources that have the split, with their part of it."""
        return {name: source.splits[split] for name, source in self.sources.items() if split in source.splits}


def parse_manifest(payload: bytes, path: str) -> Manifest:
    """The manifest in a file's bytes. Raises CorpusError, naming path, when it is broken or of another version."""
    try:
        return Manifest.model_validate_json(payload)
    except ValidationError as error:
        wrong = {".".join(str(part) for part in item["loc"]): item for item in error.errors()}
        if "format_version" in wrong:
            raise CorpusError(
                f"{path} has format_version {wrong['format_version']['input']!r}, this version reads {FORMAT_VERSION}; "
                "prepare the corpus again or use the Longhaul version that wrote it"
            ) from None
        where, first = next(iter(wrong.items()))
        raise CorpusError(
            f"{path} is damaged ({where + ': ' if where else ''}{first['msg']}); delete the file and run "
            "launcher/prepare.py again, which keeps the finished shards"
        ) from None
