"""The examples of a task: read from its files and encoded, whatever its kind."""

from collections.abc import Sequence
from typing import Any

from data.chat import encode_conversations, open_template, read_conversations
from data.classify import NO_FRAME, Frame, encode_examples, frame_of
from data.examples import read_examples, read_sentences
from data.preference import encode_pairs, read_pairs
from data.records import RecordError
from data.row_loader import RowSet
from data.tag import encode_sentences
from data.tokenizer import Tokenizer
from launcher.task_config import ChatTask, ClassifyTask, PreferenceTask, TagTask
from model.config import ModelConfig
from model.hf_config import HfModelConfig, is_masked

Task = ChatTask | PreferenceTask | ClassifyTask | TagTask


def read_task(task: Task, paths: list[str]) -> list[Any]:
    """The examples of files. Raises DataError, with file and line, for the first that cannot be used."""
    if isinstance(task, ClassifyTask):
        found: list[Any] = read_examples(task, paths)
    elif isinstance(task, TagTask):
        found = read_sentences(task, paths)
    elif isinstance(task, PreferenceTask):
        found = read_pairs(task, paths)
    else:
        found = read_conversations(task, paths)
    if not found:
        raise RecordError(
            f"{', '.join(paths)}: there is no example in it; name files with examples in the task section"
        )
    return found


def encode_task(
    task: Task, examples: Sequence[Any], tokenizer: Tokenizer, model: ModelConfig | HfModelConfig
) -> RowSet:
    """Examples as rows that the model takes. Raises DataError for one that is too long."""
    seq_len = model.seq_len
    if isinstance(task, ClassifyTask):
        return encode_examples(examples, tokenizer, seq_len, task, frame_for(model, tokenizer))
    if isinstance(task, TagTask):
        return encode_sentences(examples, tokenizer, seq_len, task, frame_for(model, tokenizer))
    if isinstance(task, PreferenceTask):
        return encode_pairs(examples, open_template(task.template, tokenizer), seq_len)
    return encode_conversations(examples, open_template(task.template, tokenizer), seq_len, task.too_long)


def frame_for(model: ModelConfig | HfModelConfig, tokenizer: Tokenizer) -> Frame:
    """What stands around the texts that this model gives labels. Raises DataError where the tokenizer has none of it."""
    return frame_of(tokenizer) if is_masked(model) else NO_FRAME
