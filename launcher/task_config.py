"""The `task` section of a fine-tuning recipe: what the model is to learn, and from what."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class TextTask(BaseModel, frozen=True, extra="forbid", strict=True):
    """Continued pretraining on the recipe's data section, whose corpus is prepared with the origin's tokenizer."""

    kind: Literal["text"] = "text"


class ChatTask(BaseModel, frozen=True, extra="forbid", strict=True):
    """Conversations: loss on the answers alone."""

    kind: Literal["chat"]


class ClassifyTask(BaseModel, frozen=True, extra="forbid", strict=True):
    """One label for each text."""

    kind: Literal["classify"]
    labels: Annotated[list[str], Field(min_length=2)]


class TagTask(BaseModel, frozen=True, extra="forbid", strict=True):
    """One label for each token."""

    kind: Literal["tag"]
    labels: Annotated[list[str], Field(min_length=2)]


TaskConfig = Annotated[TextTask | ChatTask | ClassifyTask | TagTask, Field(discriminator="kind")]
