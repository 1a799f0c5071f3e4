"""How each kind of file becomes documents, and what of it is malformed.

A function of a piece (a file and a stretch of what it is made of) and of how to read it, so that the same documents and
the same complaints come out however pieces are dealt to workers. JSON lines: a byte-order mark at the start of a file,
CRLF, NaN and repeated keys (the last one counts) are let pass, blank lines are passed over.
"""

import json
import string
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from data.files import (
    CHUNK,
    COUNTED,
    Block,
    Damaged,
    File,
    LineReader,
    Long,
    Loss,
    Options,
    count_lines,
    open_unchanged,
    refusing,
    unpacked,
)

MARK = b"\xef\xbb\xbf"  # a byte-order mark in UTF-8
REPAIR = "repair it or delete it"
EXCERPT = 40  # characters of a value shown in a message


class Document(NamedTuple):
    """One text, and where it is: "path", "path:line", "path@byte" (JSON lines that are not packed) or "path:row"."""

    name: str
    text: str


class Skipped(NamedTuple):
    """A document that is always left out, and why in one word: "empty" or "undecodable"."""

    name: str
    reason: str


class Bad(NamedTuple):
    """A malformed document, or a stretch of a file that is lost."""

    name: str
    reason: str  # one word to count by
    message: str  # where, what was expected, what to do


Found = Document | Skipped | Bad


class Reader(NamedTuple):
    """How a source's files are read."""

    kind: str
    limit: int  # bytes of a document's text
    parts: tuple[str | tuple[str, ...], ...] = ()  # of a text: literals, and paths of fields
    options: Options = {}
    dataset: tuple[str, str | None, str, str | None] = ("", None, "", None)  # path, config, split, revision

    @property
    def columns(self) -> list[str]:
        """The fields needed, in the order of their first use: nested ones with dots."""
        return list(dict.fromkeys(".".join(part) for part in self.parts if isinstance(part, tuple)))


class Piece(NamedTuple):
    """The atoms [first, stop) of a file: bytes, stripes, row groups, record batches or rows; a text file has one."""

    file: File
    first: int
    stop: int
    n_bytes: int  # of text, about


class FieldError(Exception):
    """A record without the text that is asked of it."""


# -- text from records -------------------------------------------------------------------------------------------------


def parts_of_template(template: str) -> tuple[str | tuple[str, ...], ...]:
    """Literals and one-step paths of fields. Raises ValueError for anything but {plain_field_name}, {{ and }}."""
    parts: list[str | tuple[str, ...]] = []
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed ({error}); write {{{{ and }}}} for braces") from None
    for literal, name, spec, conversion in found:
        if literal:
            parts.append(literal)
        if name is None:
            continue
        if not name.replace("-", "_").isidentifier() or spec or conversion:
            raise ValueError(
                f"template {template!r}: a field is a plain name such as {{title}}, not {name!r} with more"
            )
        parts.append((name,))
    if not any(isinstance(part, tuple) for part in parts):
        raise ValueError(f"template {template!r} names no field; write for example '{{title}}\\n\\n{{text}}'")
    return tuple(parts)


def text_of(record: dict[str, Any], parts: tuple[str | tuple[str, ...], ...]) -> str:
    """The text that the parts make of a record. Raises FieldError where one is missing or not a string."""
    if len(parts) == 1 and len(parts[0]) == 1 and type(text := record.get(parts[0][0])) is str:
        return text  # nearly always
    return "".join(part if isinstance(part, str) else _field(record, part) for part in parts)


def _field(record: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = record
    for name in path:
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(repr(key) for key in list(value)[:8]) if isinstance(value, dict) else _type_of(value)
            raise FieldError(f"there is no field {'.'.join(path)!r} (there is {_short(has, 200) or 'none at all'})")
        value = value[name]
    if not isinstance(value, str):
        raise FieldError(f"the field {'.'.join(path)!r} is {_type_of(value)}; expected a string")
    return value


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")


def _short(text: str, most: int = EXCERPT) -> str:
    return text if len(text) <= most else text[:most] + "..."


def judge(name: str, where: Callable[[], str], text: str, limit: int) -> Found:
    if not text:
        return Skipped(name, "empty")
    if "\0" in text:
        at = text.index("\0")
        return Bad(name, "nul", f"{where()}: the text has a NUL (U+0000) as its character {at}; remove it ({REPAIR})")
    if 4 * len(text) > limit and len(text.encode("utf-8", "surrogatepass")) > limit:
        return _too_long(name, where(), "the text", limit)
    return Document(name, text)


def _too_long(name: str, where: str, what: str, limit: int) -> Bad:
    return Bad(
        name, "too_long", f"{where}: {what} is longer than {limit} bytes; cut it up or raise data.max_document_bytes"
    )


# -- text files --------------------------------------------------------------------------------------------------------


def text_file(piece: Piece, reader: Reader) -> Iterator[Found]:
    """The file as one document; of the embedded library a byte-order mark stays and what is not UTF-8 is skipped."""
    file = piece.file
    with open_unchanged(file, reader.options) as stream, closing(unpacked(stream, file)) as parts:
        payload = bytearray()
        try:
            for part in parts:
                payload += part
                if len(payload) > reader.limit:
                    yield _too_long(file.name, file.path, "the text", reader.limit)
                    return
        except Damaged as damage:
            yield _lost(file.name, f"{file.path}, unpacked byte {len(payload)}", str(damage), "the file")
            return
    embedded = reader.kind == "embedded"
    mark = 0 if embedded or not payload.startswith(MARK) else len(MARK)
    try:
        text = str(memoryview(payload)[mark:], "utf-8")  # without a copy of what may be large
    except UnicodeDecodeError as error:
        yield Skipped(file.name, "undecodable") if embedded else _not_utf8(file, bytes(payload), error)
        return
    if embedded and "\0" in text:
        yield Skipped(file.name, "undecodable")
        return
    yield judge(file.name, lambda: f"{file.path}, line {_line_of_nul(payload)}", text, reader.limit)


def _line_of_nul(payload: bytearray) -> str:
    at = payload.index(b"\0")
    return f"{payload.count(10, 0, at) + 1}, byte {at}"


def _not_utf8(file: File, payload: bytes, error: UnicodeDecodeError) -> Bad:
    at = error.start + (len(MARK) if payload.startswith(MARK) else 0)
    line = payload.count(b"\n", 0, at) + 1
    source = "utf-16" if payload[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return Bad(
        file.name,
        "utf8",
        f"{file.path}, line {line}, byte {at}: 0x{payload[at]:02X} is not UTF-8 ({error.reason}); convert the file, "
        f"for example with iconv -f {source} -t utf-8",
    )


def _lost(name: str, where: str, what: str, rest: str) -> Bad:
    return Bad(name, "compressed", f"{where}: the packed file {what}; {rest} is lost; fetch or pack the file again")


# -- JSON lines --------------------------------------------------------------------------------------------------------


def json_lines(piece: Piece, reader: Reader) -> Iterator[Found]:
    """A document a line."""
    file, packed = piece.file, bool(piece.file.packing)
    with open_unchanged(file, reader.options) as stream:
        begin = 0 if packed else max(0, piece.first - 1)  # a byte early, to see whether a line begins at first
        with refusing(file.path, "read"):
            stream.seek(begin)
        lines = _Lines(piece, reader, begin)
        with closing(unpacked(stream, file)) as parts:
            for block in LineReader(parts, begin, reader.limit).blocks(_stretches(piece)):
                if isinstance(block, Loss):
                    where = f"{file.path}, line {block.lines_before + 1}, unpacked byte {block.offset}"
                    yield _lost(file.name, where, block.what, "the rest of it")
                elif isinstance(block, Long):
                    yield lines.too_long(block.offset, block.lines_before + 1)
                else:
                    yield from lines.found(block)


def _stretches(piece: Piece) -> Iterator[tuple[int, int]]:
    """The bytes in which the piece's lines begin: its own, or those of its stripes, in every so many blocks one."""
    if not piece.file.packing:
        for start in range(piece.first, piece.stop, CHUNK):
            yield start, min(start + CHUNK, piece.stop)
        return
    for block in count():
        if piece.first <= block % piece.file.atoms < piece.stop:
            yield block * CHUNK, (block + 1) * CHUNK


class _Lines:
    """Turns blocks of lines into documents, and knows where each line is."""

    def __init__(self, piece: Piece, reader: Reader, begin: int) -> None:
        self.file, self.reader, self.begin = piece.file, reader, begin
        self._before: int | None = None  # lines before byte `begin`, once counted

    def found(self, block: Block) -> Iterator[Found]:
        path, packed, limit = self.file.path, self.file.packing, self.reader.limit
        parts, decode = self.reader.parts, json.JSONDecoder().decode
        offset, number = block.offset, block.lines_before
        for line in block.payload.split(b"\n"):
            number += 1
            begin, offset = offset, offset + len(line) + 1
            if not line or line.isspace():
                continue
            name = f"{path}:{number}" if packed else f"{path}@{begin}"
            if len(line) > limit:
                yield self.too_long(begin, number)
                continue
            try:
                text = text_of(decode(line.decode("utf-8")), parts)
                if b"\\u" in line:
                    text.encode("utf-8")  # an escape can make half a character
            except (ValueError, RecursionError, AttributeError, FieldError):
                yield self._examine(name, line, begin, number)
                continue
            if "\0" in text or 4 * len(text) > limit:
                yield judge(name, partial(self._where, begin, number), text, limit)
            else:
                yield Document(name, text) if text else Skipped(name, "empty")

    def too_long(self, offset: int, number: int) -> Bad:
        name = f"{self.file.path}:{number}" if self.file.packing else f"{self.file.path}@{offset}"
        return _too_long(name, self._where(offset, number), "the line", self.reader.limit)

    def _where(self, offset: int, number: int) -> str:
        return f"{self.file.path}, {self._place(number, offset)}"

    def _examine(self, name: str, line: bytes, offset: int, number: int) -> Found:
        """What found() made no document of at once, slowly."""
        where = partial(self._where, offset, number)
        line = line.removeprefix(MARK) if offset == 0 else line
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                got = _type_of(record)
                return Bad(name, "json", f'{where()}: is {got}; expected an object a line as {{"text": ...}}; {REPAIR}')
            text = text_of(record, self.reader.parts)
            text.encode("utf-8")
        except UnicodeDecodeError as error:
            at = f"0x{line[error.start]:02X} at byte {offset + error.start}"
            message = f"{where()}: {at} is not UTF-8 ({error.reason}); convert the file with iconv, or {REPAIR}"
            return Bad(name, "utf8", message)
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Bad(name, "surrogate", f"{where()}: {half} is half a character without its other half; {REPAIR}")
        except RecursionError:
            return Bad(name, "json", f"{where()}: lists or objects are nested too deep to be read; {REPAIR}")
        except FieldError as error:
            return Bad(name, "field", f"{where()}: {error}; {REPAIR}, or correct field or template of the source")
        except ValueError as error:
            return self._not_json(name, where(), line, error)
        return judge(name, where, text, self.reader.limit)

    def _not_json(self, name: str, where: str, line: bytes, error: ValueError) -> Bad:
        if b"\0" in line:
            at = line.index(b"\0")
            return Bad(name, "nul", f"{where}: has NUL bytes from its byte {at} on, as a torn write leaves; {REPAIR}")
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            ends = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
            what = "ends in the middle of a JSON value" if ends else f"{error.msg} at its character {error.pos}"
        start = _short(line[: 4 * EXCERPT].decode("utf-8", "replace"))
        return Bad(name, "json", f"{where}: is not JSON: {what}; expected an object a line, got {start!r}; {REPAIR}")

    def _place(self, number: int, offset: int) -> str:
        if self.file.packing:
            return f"line {number}, unpacked byte {offset}"
        if self._before is None:
            counted = count_lines(self.file.path, self.reader.options, self.begin)
            self._before = -1 if counted is None else counted
        if self._before < 0:
            return f"byte {offset} (more than {COUNTED} bytes into it lines are not counted)"
        return f"line {self._before + number}, byte {offset}"
