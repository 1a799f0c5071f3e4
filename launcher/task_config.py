"""The `task` section of a fine-tuning recipe: what the model is to learn, and from what."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from data.task import ChatTask, ClassifyTask, PreferenceTask, TagTask

__all__ = ["ChatTask", "ClassifyTask", "PreferenceTask", "TagTask", "TaskConfig", "TextTask"]


class TextTask(BaseModel, frozen=True, extra="forbid", strict=True):
    """Continued pretraining on the recipe's data section, whose corpus is prepared with the origin's tokenizer."""

    kind: Literal["text"] = "text"


TaskConfig = Annotated[TextTask | ChatTask | PreferenceTask | ClassifyTask | TagTask, Field(discriminator="kind")]
