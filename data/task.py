"""The task section of a fine-tuning recipe: labelled texts, tagged words or conversations, and how they are read."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

Format = Literal["tsv", "csv", "jsonl", "parquet", "conll"]
Column = str | Annotated[int, Field(strict=True)]

_FORMATS: dict[str, tuple[Format, ...]] = {
    "classify": ("tsv", "csv", "jsonl", "parquet"),
    "tag": ("conll", "jsonl", "parquet"),
    "chat": ("jsonl", "parquet"),
}
# what has a meaning for which kinds
_OF_KINDS = {
    "text": ("classify", "tag"),
    "label": ("classify", "tag"),
    "labels": ("classify", "tag"),
    "join": ("tag",),
    "word_token": ("tag",),
    "messages": ("chat",),
    "template": ("chat",),
}


class TaskConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a run is fine-tuned for, and on which files."""

    # classify: a label for a text; tag: a tag for each word; chat: conversations, with loss on the answers alone
    kind: Literal["classify", "tag", "chat"]
    train: Annotated[list[str], Field(min_length=1)]  # files, globs and URLs; packed with gzip or zstd or not
    valid: list[str] = []  # the same, held out
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # or so much of train is, by a hash of the text
    format: Format | None = None  # None: by the ending of a file's name; .txt, .bio and .conll are conll
    # columns: a name, of a file that begins with a line of names, or a number from 0, of one that does not (-1: the last).
    # None: text and label; of conll 0 and -1; of jsonl and parquet with tags: tokens and tags, two lists
    text: Column | None = None
    label: Column | None = None
    messages: str = "messages"  # field with a conversation: a list of {"role": ..., "content": ...}
    labels: Annotated[list[str], Field(min_length=2)] | None = None  # in this order; None: those of train, sorted
    join: str = " "  # between words of a tagged text; "" where each character is a word
    word_token: Literal["first", "last"] = "first"  # token of a word that has its tag; the others are not counted
    too_long: Literal["refuse", "cut"] = "refuse"  # texts of more than model.seq_len tokens; cut: their end
    # longhaul: the plain template of data/chat.py; tokenizer: the one that comes with the tokenizer
    template: Literal["longhaul", "tokenizer"] = "longhaul"

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        wrong = [
            f"task.{key} has no effect on kind {self.kind}, only on {' and '.join(kinds)}; leave it out"
            for key, kinds in _OF_KINDS.items()
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default
        ]
        if self.format is not None and self.format not in _FORMATS[self.kind]:
            wrong.append(
                f"task.format={self.format} cannot hold what kind {self.kind} needs; use {', '.join(_FORMATS[self.kind])}"
            )
        if self.valid and self.valid_fraction:
            wrong.append(f"task.valid and task.valid_fraction={self.valid_fraction} are both given; give one of them")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            wrong.append(f"task.labels names a label twice: {', '.join(self.labels)}; name each once")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def formats(self) -> tuple[Format, ...]:
        """What files of this kind can be."""
        return _FORMATS[self.kind]
