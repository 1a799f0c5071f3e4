"""Talk to a run that was tuned on conversations, by the template that it was tuned with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data.chat import ANSWERS, Message, Template, open_template
from launcher.config import FinetuneConfig
from launcher.continuation import Options, continue_prompts
from launcher.task_config import ChatTask, PreferenceTask
from launcher.trained import Trained


def template_of(trained: Trained, place: Path) -> Template:
    """Of a run what it was tuned with, of a Hugging Face folder its tokenizer's. Raises ValueError where there is none."""
    if trained.checkpoint is None:
        try:
            return open_template("tokenizer", trained.tokenizer)
        except ValueError:
            what = "its tokenizer comes with no chat template"
    else:
        cfg = trained.checkpoint.cfg
        if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, ChatTask | PreferenceTask):
            return open_template(cfg.task.template, trained.tokenizer)
        what = "it is no run tuned on conversations (task.kind: chat)"
    raise ValueError(f"{place} cannot chat: {what}; leave --chat out to continue prompts")


class Chat:
    """One conversation."""

    def __init__(self, trained: Trained, template: Template, options: Options, system: str | None = None) -> None:
        self._trained, self._template = trained, template
        self._options = replace(options, stop_ids=template.stop_ids)
        self.messages = [] if system is None else [Message("system", system)]

    def say(self, text: str, on_text: Callable[[str], None] = lambda text: None) -> str:
        """The answer, which belongs to the conversation from then on. on_text: is given more of it as it comes.

        Raises ValueError where the conversation leaves no place for an answer.
        """
        if not text.strip():
            raise ValueError("the message is empty; say something")
        messages = [*self.messages, Message("user", text)]
        prompt = self._template.prompt(messages)
        longest = self._trained.model.cfg.seq_len
        if len(prompt) >= longest:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, and the model reads {longest} at most; begin another one"
            )
        options = replace(self._options, n_tokens=min(self._options.n_tokens, longest - len(prompt)))
        (row,) = continue_prompts(
            self._trained.model, self._trained.tokenizer, [prompt], options, lambda number, text: on_text(text)
        )
        self.messages = [*messages, Message(ANSWERS, row.text)]
        return row.text


def talk(chat: Chat, lines: Iterator[str], show: Callable[[str], None]) -> None:
    """Answer line after line; empty ones are passed over."""
    for line in lines:
        if line.strip():
            chat.say(line.rstrip("\n"), show)
            show("\n")
