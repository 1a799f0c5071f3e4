"""Conversations as rows: whole ones packed together, each seeing itself alone, with loss on the answers and their ends.

The plain template needs no token of its own and works with any tokenizer:

    ### System:\\n{content}\\n\\n### User:\\n{content}\\n\\n### Assistant:\\n{content}{end of document}### User:\\n...

What a model is asked and what it answers are encoded apart, so that a prompt has the same tokens in training and when it
is continued. A tokenizer's own template (Hugging Face's Jinja) is rendered by transformers, and cut at the same places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.classify import refuse_long
from data.errors import DataError
from data.hf_tokenizer import HuggingFaceTokenizer
from data.loader import IGNORE
from data.packing import Packing, best_fit, fill
from data.records import RecordError, read_records
from data.row_loader import Row, RowSet
from data.task import ChatTask
from data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"


class Message(NamedTuple):
    role: str
    content: str


class Conversation(NamedTuple):
    """Messages that end with an answer."""

    where: str
    messages: list[Message]

    @property
    def identity(self) -> str:
        return repr(self.messages)


class Part(NamedTuple):
    """A stretch of a conversation that is asked, or that is an answer and counts."""

    ids: NDArray[np.int64]
    counts: bool


class Template(Protocol):
    """How messages become tokens."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]  # tokens that end an answer

    def parts(self, messages: Sequence[Message], where: str) -> list[Part]:
        """Of a conversation. Raises RecordError for one that the template cannot take."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens before the next answer."""


# -- reading -------------------------------------------------------------------------------------------------------------


def read_conversations(task: ChatTask, paths: list[str]) -> list[Conversation]:
    """Raises RecordError for a role that is unknown, an empty message, and a conversation that ends without an answer."""
    return [
        Conversation(where, check_messages(messages, where))
        for where, (messages,) in read_records(paths, lambda fmt: [task.messages], task.format, task.formats)
    ]


def check_messages(messages: Any, where: str) -> list[Message]:
    """What a file gives, checked. Raises RecordError."""
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{where}: its messages are {messages!r:.60}; expected a list with something in it")
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RecordError(f'{here} is {message!r:.60}; expected {{"role": ..., "content": ...}}')
        if more := sorted(key for key, value in message.items() if key not in ("role", "content") and value):
            raise RecordError(f"{here} has {', '.join(more)}, which would be ignored; take it out")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RecordError(f"{here} has the role {role!r}; expected one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise RecordError(f"{here} is of the system; expected that of the first message alone")
        if not isinstance(content, str) or not content.strip():
            raise RecordError(f"{here}, of the {role}, is {content!r:.60}; expected a string that is not empty")
        found.append(Message(role, content))
    if found[-1].role != ANSWERS:
        raise RecordError(f"{where}: the last message is of the {found[-1].role}; expected one of the {ANSWERS}")
    return found


# -- templates -----------------------------------------------------------------------------------------------------------


def open_template(name: str | None, tokenizer: Tokenizer) -> Template:
    """name: plain, tokenizer, or None for the tokenizer's own where it comes with one. Raises DataError if it does not."""
    own = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template
    if name == "tokenizer" and not own:
        raise DataError(
            f"task.template=tokenizer, but the tokenizer in {tokenizer.folder} comes with no chat template; use plain"
        )
    return OwnTemplate(tokenizer) if own and name != "plain" else PlainTemplate(tokenizer)  # type: ignore[arg-type]


class PlainTemplate:
    """The one above. It is no protection: a message may hold the words that begin another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.stop_ids = tokenizer, frozenset({tokenizer.eos_id})

    def parts(self, messages: Sequence[Message], where: str) -> list[Part]:
        found, asked = [], ""
        for role, content in messages:
            if role != ANSWERS:
                asked += f"### {role.capitalize()}:\n{content}\n\n"
                continue
            found.append(Part(self._ids(f"{asked}### Assistant:\n"), counts=False))
            found.append(Part(np.append(self._ids(content), self.tokenizer.eos_id), counts=True))
            asked = ""
        if asked:
            found.append(Part(self._ids(asked), counts=False))
        return found

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        *before, answer = self.parts([*messages, Message(ANSWERS, "")], "")
        assert answer.counts
        return np.concatenate([part.ids for part in before]).tolist()

    def _ids(self, text: str) -> NDArray[np.int64]:
        return self.tokenizer.encode(text).astype(np.int64)


class OwnTemplate:
    """The tokenizer's. What ends an answer is the last special token after it."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer: Tokenizer = tokenizer
        self._own = tokenizer
        probe = [Message("user", "a"), Message(ANSWERS, "b")]
        *_, answer = self.parts(probe, f"the chat template of {tokenizer.folder}")
        ends = [token for token in answer.ids.tolist() if token in tokenizer.special_ids]
        if not ends:
            raise DataError(
                f"the chat template of {tokenizer.folder} ends an answer with no special token, so that a model could not "
                "learn where to stop; use task.template: plain"
            )
        self.stop_ids = frozenset({ends[0], tokenizer.eos_id})

    def parts(self, messages: Sequence[Message], where: str) -> list[Part]:
        for number, message in enumerate(messages, 1):
            if special := next((token for token in self._own.special_tokens if token in message.content), None):
                raise RecordError(
                    f"{where}, message {number} has the special token {special!r} in its text, which would end or begin "
                    "messages; take it out"
                )
        found, done = list[Part](), ""
        for number, message in enumerate(messages):
            if message.role != ANSWERS:
                continue
            asked = self._render(messages[:number], True, where)
            whole = self._render(messages[: number + 1], False, where)
            if not asked.startswith(done) or not whole.startswith(asked):
                raise RecordError(
                    f"{where}, message {number + 1}: the tokenizer's chat template writes what came before it in another "
                    "way once it is there, so that what is learned is not what is asked later; use task.template: plain, or "
                    "conversations with one answer"
                )
            found.append(Part(self._own.encode_with_special(asked[len(done) :]), counts=False))
            found.append(Part(self._own.encode_with_special(whole[len(asked) :]), counts=True))
            done = whole
        return found

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        parts = self.parts([*messages, Message(ANSWERS, "a")], "the prompt")
        return np.concatenate([part.ids for part in parts[:-1]]).tolist()

    def _render(self, messages: Sequence[Message], asks: bool, where: str) -> str:
        try:
            return self._own.render_chat([message._asdict() for message in messages], asks)
        except Exception as error:  # a template raises what it likes
            raise RecordError(f"{where}: the tokenizer's chat template refuses it: {error}") from None


# -- rows ----------------------------------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Sequence[Conversation], template: Template, seq_len: int, too_long: str
) -> RowSet:
    """Conversations packed into rows of at most seq_len tokens. Raises RecordError for one that is too long."""
    encoded = [template.parts(each.messages, each.where) for each in conversations]
    ids = [np.concatenate([part.ids for part in parts]) for parts in encoded]
    counts = [np.concatenate([np.full(len(part.ids), part.counts) for part in parts]) for parts in encoded]
    # the last token is only foreseen, never read
    refuse_long([each.where for each in conversations], [len(of) - 1 for of in ids], seq_len, too_long)
    keep = [at for at, of in enumerate(counts) if of[1 : seq_len + 1].any()]
    cut = sum(len(of) > seq_len + 1 for of in ids)
    lengths = [min(len(ids[at]), seq_len + 1) for at in keep]
    rows = _pack(best_fit(lengths, seq_len + 1), [ids[at] for at in keep], [counts[at] for at in keep])
    places = [[conversations[keep[document]].where for document in documents] for _, documents in rows]
    found = RowSet([row for row, _ in rows], ["; ".join(place) for place in places], seq_len)
    counted = [ids[at][1 : seq_len + 1][counts[at][1 : seq_len + 1]] for at in keep]
    found.n_bytes = sum(len(template.tokenizer.decode(each).encode()) for each in counted)
    if cut:
        found.notes.append(f"{cut} of {len(ids)} conversations are cut at {seq_len} tokens")
    if len(keep) < len(ids):
        found.notes.append(f"{len(ids) - len(keep)} of them have no answer before the cut and are left out")
    return found


def _pack(packing: Packing, ids: list[NDArray], counts: list[NDArray]) -> list[tuple[Row, list[int]]]:
    """(row, its conversations) for each window."""
    windows = np.arange(packing.n_windows)
    tokens, documents, counted = fill(packing, windows, lambda d, first, n: ids[d][first : first + n], 0, mask=True)
    answers, _, _ = fill(packing, windows, lambda d, first, n: counts[d][first : first + n], 0, mask=True)
    targets = np.where(counted & (answers[:, 1:] == 1), tokens[:, 1:], IGNORE)
    found = []
    for window in windows.tolist():
        first, last = packing.window_offsets[window : window + 2].tolist()
        n = min(int(packing.piece_tokens[first:last].sum()), packing.capacity - 1)
        row = Row(tokens[window, :n], targets[window, :n], documents[window, :n])
        found.append((row, packing.piece_document[first:last].tolist()))
    return found
