"""What all tool parsers share: an incremental search for marks, and the pieces that an output is split into."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

SPACES = " \t\r\n"
# Calls that the output's end leaves unfinished, before the rest is content: each costs a search to the end. 40 000
# characters of `[TOOL_CALLS][` took 9 s without a limit.
MAX_UNFINISHED = 16


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call as OpenAI writes it; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")

    def as_json(self) -> dict[str, Any]:
        """An entry of `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Reasoning(str):
    """A piece of an output's reasoning; its content is plain `str`."""

    __slots__ = ()


Piece = str | ToolCall
Read = tuple[list[Piece], int]  # the pieces read from the start of a text, and the number of its characters used


class ToolParser:
    """Splits a streamed output into content and calls.

    The result does not depend on how the text is split: what may become a call is held back until it is known. Anything
    that is not a whole call is content, never an error. Blanks before the content are dropped if a call comes first,
    and so are blanks after a call.

    tools: OpenAI's `tools`, whose schemas say how formats without types are read. marks: texts with which a call may
    begin, or which belong to one. special: the marks are special tokens, which must not be left out of the text.
    close: a stop string after which one call is complete; None if the format has none. quotes, brackets: of the values
    of the format.
    """

    marks: ClassVar[tuple[str, ...]]
    special: ClassVar[bool] = False
    close: ClassVar[str | None] = None
    quotes: ClassVar[str] = '"'
    brackets: ClassVar[tuple[str, str]] = ("[{", "]}")

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.parameters = parameters_of(tools)
        self._buffer = ""
        self._scanner = BracketScanner(self.quotes, self.brackets)
        self._held = ""  # blanks at the start of the output
        self._after_blank = True  # nothing but blanks since the start, or since a call
        self._called = False
        self._unfinished = 0

    def feed(self, text: str, *, last: bool = False) -> Iterator[Piece]:
        """The pieces of content and the calls in new text. last: no more text follows, so nothing stays buffered."""
        self._buffer += text
        for piece in self._pieces(last):
            yield from self._without_blanks(piece)
        if last and self._held and not self._called:
            yield self._held

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """(content, calls) of a complete output."""
        pieces = list(self.feed(text, last=True))
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        return content, [piece for piece in pieces if isinstance(piece, ToolCall)]

    def _find(self, last: bool) -> tuple[int, int]:
        """(index of the first mark in the buffer or -1, characters at its end that may begin one)."""
        found = [at for mark in self.marks if (at := self._buffer.find(mark)) >= 0]
        if found:
            return min(found), 0
        return -1, 0 if last else max(overlap(self._buffer, mark) for mark in self.marks)

    def _read(self, text: str, last: bool) -> Read | None:
        """Read text that begins with a mark; None if more text is needed. Once the result is not None, more text at the
        end must not change it."""
        raise NotImplementedError

    def _read_inner(self, text: str, start: int, last: bool) -> Read | None:
        """`_read` of a mark at `start`, which the mark at the beginning of the text encloses."""
        read = self._read(text[start:], last)
        if read is None:
            return None
        pieces, used = read
        called = any(isinstance(piece, ToolCall) for piece in pieces)
        return (pieces, start + used) if called else self._reject(text)

    def _pieces(self, last: bool) -> Iterator[Piece]:
        while self._buffer:
            at, keep = self._find(last)
            split = at if at >= 0 else len(self._buffer) - keep
            if split:
                piece, self._buffer = self._buffer[:split], self._buffer[split:]
                yield piece
            if at < 0:
                return
            read = self._read(self._buffer, last)
            if read is None and not last:
                return
            if read is None:
                self._unfinished += 1
                if self._unfinished > MAX_UNFINISHED:
                    read = [self._buffer], len(self._buffer)
            pieces, used = read or self._reject(self._buffer)
            self._buffer = self._buffer[used:]
            self._scanner = BracketScanner(self.quotes, self.brackets)
            yield from pieces

    def _reject(self, text: str) -> Read:
        """The mark at the start of the text is content."""
        mark = max((mark for mark in self.marks if text.startswith(mark)), key=len)
        return [mark], len(mark)

    def _without_blanks(self, piece: Piece) -> Iterator[Piece]:
        if isinstance(piece, ToolCall):
            self._held, self._after_blank, self._called = "", True, True
        elif self._after_blank:
            stripped = piece.lstrip(SPACES)
            if not self._called:
                self._held += piece
            if not stripped:
                return
            piece, self._held, self._after_blank = (stripped if self._called else self._held), "", False
        yield piece


class BracketScanner:
    """Finds where a value in brackets ends, in text that grows; each character is looked at once.

    quotes: characters that open and close strings. brackets: opening ones, then closing ones.
    """

    def __init__(self, quotes: str, brackets: tuple[str, str]) -> None:
        self._quotes, (self._open, self._close) = quotes, brackets
        self._pattern = re.compile("[" + re.escape(f"\\{quotes}{brackets[0]}{brackets[1]}") + "]")
        self._start: int | None = None
        self._end: int | None = None

    def end(self, text: str, start: int) -> int | None:
        """The end of the value that starts at `start` with a bracket; None if it is not there yet."""
        if self._start != start:
            self._start, self._end, self._at, self._depth, self._quote = start, None, start, 0, ""
        while self._end is None and (match := self._pattern.search(text, self._at)) is not None:
            char, self._at = match[0], match.end()
            if char == "\\":
                if self._at == len(text):  # the escaped character follows in the next piece
                    self._at -= 1
                    return None
                self._at += 1
            elif char in self._quotes:
                self._quote = "" if self._quote == char else self._quote or char
            elif not self._quote:
                self._depth += 1 if char in self._open else -1
                if self._depth == 0:
                    self._end = self._at
        if self._end is None:
            self._at = len(text)
        return self._end


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schema of the parameters of each tool, by name."""
    found = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            found[function["name"]] = parameters if isinstance(parameters, Mapping) else {}
    return found


def overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def skip(text: str, at: int, characters: str = SPACES) -> int:
    """The index of the first character from `at` on that is none of `characters`."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def after_close(text: str, at: int, close: str, *, last: bool, fill: str = SPACES) -> int | None:
    """Where the text goes on after `close`, before which only `fill` may stand; `at` if `close` is missing, None if it
    may still come."""
    start = skip(text, at, fill)
    if text.startswith(close, start):
        return start + len(close)
    if close.startswith(text[start:]):
        return len(text) if last else None
    return at
