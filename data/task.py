"""What a model can be fine-tuned for, and from what files: the kinds of a recipe's `task` section that have examples."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

Format = Literal["tsv", "csv", "jsonl", "parquet", "conll"]
# a name, of a file that begins with a line of names, or a number from 0, of one that does not; -1 is the last
Column = str | Annotated[int, Field(strict=True)]
WordToken = Literal["first", "last"]
Labels = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]


class _Task(BaseModel, frozen=True, extra="forbid", strict=True):
    formats: ClassVar[tuple[Format, ...]]  # that can hold what the kind needs

    train: Annotated[list[str], Field(min_length=1)]  # files, globs and URLs; plain or packed with gzip or zstd
    valid: list[str] = []  # the same, held out
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # or about so much of train, by a hash of the text
    format: Format | None = None  # None: by the ending of a file's name; .txt, .bio, .iob and .conll are conll
    empty: Literal["refuse", "leave_out"] = "refuse"  # an example whose text is empty
    too_long: Literal["refuse", "cut"] = "refuse"  # what is longer than model.seq_len tokens; cut: its end is left out

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = []
        if self.format is not None and self.format not in self.formats:
            wrong.append(f"format={self.format} cannot hold what this task needs; use one of {', '.join(self.formats)}")
        if self.valid and self.valid_fraction:
            wrong.append(f"valid and valid_fraction={self.valid_fraction} are both given; give one of them")
        labels = getattr(self, "labels", [])
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            wrong.append(f"labels names {', '.join(map(repr, twice))} more than once; name each label once")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


class ClassifyTask(_Task, frozen=True, extra="forbid", strict=True):
    """One label for each text."""

    formats = ("tsv", "csv", "jsonl", "parquet")

    kind: Literal["classify"]
    labels: Labels  # all of them; their order is that of the head's rows
    text: Column = "text"  # column, or field
    label: Column = "label"


class TagTask(_Task, frozen=True, extra="forbid", strict=True):
    """One tag for each word, such as named entities by B-PER, I-PER and O."""

    formats = ("conll", "jsonl", "parquet")

    kind: Literal["tag"]
    labels: Labels
    words: Column | None = None  # None: the first column of conll, else the field tokens, a list of strings
    tags: Column | None = None  # None: the last column of conll, else the field tags, as long a list
    join: str = " "  # what is between words; "" where each character is a word, as in Chinese
    word_token: WordToken = "first"  # which token of a word has its tag; the others do not count


class PreferenceTask(_Task, frozen=True, extra="forbid", strict=True):
    """Which of two answers is preferred (DPO, arXiv:2305.18290)."""

    formats = ("jsonl", "parquet")

    kind: Literal["preference"]
    prompt: str = "prompt"  # field: what a user says, or a list of messages as chat has them, without the last answer
    chosen: str = "chosen"  # field: the better answer
    rejected: str = "rejected"
    template: Literal["plain", "tokenizer"] | None = None  # as of chat
    too_long: Literal["refuse"] = "refuse"  # a cut answer is another one
    empty: Literal["refuse"] = "refuse"
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1  # how dear it is to part from the reference


class ChatTask(_Task, frozen=True, extra="forbid", strict=True):
    """Conversations: loss on the answers alone."""

    formats = ("jsonl", "parquet")

    kind: Literal["chat"]
    messages: str = "messages"  # field: a list of {"role": "system", "user" or "assistant", "content": "..."}
    # plain: the words of data/chat.py, for any tokenizer; tokenizer: the chat template that comes with the origin's
    # tokenizer; None: tokenizer where it comes with one, else plain
    template: Literal["plain", "tokenizer"] | None = None
