"""Tool calls that are JSON between marks: Hermes and Qwen, Mistral, Llama 3, Phi-4 and DeepSeek."""

# ruff: noqa: RUF001, RUF002 - DeepSeek's marks have full-width bars

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.parsers.base import SPACES, Piece, Read, ToolCall, ToolParser, after_close, skip


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, by Hermes, Qwen2.5 and Qwen3."""

    marks = ("<tool_call>",)
    close = "</tool_call>"

    def _read(self, text: str, last: bool) -> Read | None:
        start = skip(text, len(self.marks[0]))
        if start == len(text):
            return None
        if text[start] != "{":
            return self._reject(text)
        end = self._scanner.end(text, start)
        if end is None:
            return None
        call = read_call(text[start:end])
        if call is None:
            return self._reject(text)
        used = after_close(text, end, self.close, last=last, fill=SPACES + "}")  # some models close one brace too many
        return None if used is None else ([call], used)


class MistralParser(ToolParser):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]NAME[ARGS]{...}` since version 11 of the
    tokenizer. Ids have 9 characters: Mistral's templates refuse others."""

    marks = ("[TOOL_CALLS]",)
    special = True
    MAX_HEAD = 256  # characters of a name with its marks
    HEAD = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\]\s*)?")

    def _read(self, text: str, last: bool) -> Read | None:
        mark = len(self.marks[0])
        start = skip(text, mark)
        if start == len(text):
            return None
        if text[start] in "[{":
            end = self._scanner.end(text, start)
            if end is None:
                return None
            calls = read_calls(text[start:end], lambda name, arguments: ToolCall(name, arguments, _short_id()))
            return (calls, end) if calls else self._reject(text)
        brace = text.find("{", mark)
        head = text[mark : brace if brace >= 0 else None]
        if len(head) > self.MAX_HEAD or re.search(r"[^\w\s.:/\[\]-]", head):
            return self._reject(text)
        if brace < 0:
            return None
        match = self.HEAD.fullmatch(head)
        if match is None:
            return self._reject(text)
        end = self._scanner.end(text, brace)
        if end is None:
            return None
        arguments = arguments_text(text[brace:end])
        if arguments is None:
            return self._reject(text)
        return [ToolCall(match[1], arguments, match[2] or _short_id())], end


class LineStartParser(ToolParser):
    """A format whose calls may begin without a mark: with a bracket, at the start of the output or of a line.

    bracket: that bracket. Text in such brackets which is not a call is content as a whole.
    """

    bracket: str

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._line_start = True  # nothing but blanks between the last line break and the buffer

    def _find(self, last: bool) -> tuple[int, int]:
        at, keep = super()._find(last)
        text = self._buffer
        bracket = text.find(self.bracket)
        while 0 <= bracket < (at if at >= 0 else len(text)):
            line = text.rfind("\n", 0, bracket) + 1
            if not text[line:bracket].strip(SPACES) and (line or self._line_start):
                self._note(text[:bracket])
                return bracket, 0
            bracket = text.find(self.bracket, bracket + 1)
        split = at if at >= 0 else len(text) - keep
        self._note(text[:split])
        return at, keep

    def _note(self, text: str) -> None:
        """Remember where the line of the text behind `text` begins."""
        line = text.rfind("\n") + 1
        self._line_start = (bool(line) or self._line_start) and not text[line:].strip(SPACES)

    def _as_content(self, text: str, end: int) -> Read:
        self._note(text[:end])
        return [text[:end]], end


class Llama3Parser(LineStartParser):
    """`{"name": ..., "parameters": {...}}`, with or without `<|python_tag|>`, several with `;` between them."""

    marks = ("<|python_tag|>",)
    bracket = "{"
    special = True
    SEPARATOR = re.compile(r"\s*[;,]\s*")

    def _find(self, last: bool) -> tuple[int, int]:
        if self._called and self._after_blank and (match := self.SEPARATOR.match(self._buffer)):
            if match.end() == len(self._buffer) and not last:
                return -1, len(self._buffer)
            if self._buffer.startswith("{", match.end()):
                self._buffer = self._buffer[match.end() :]
        return super()._find(last)

    def _read(self, text: str, last: bool) -> Read | None:
        mark = len(self.marks[0]) if text.startswith(self.marks[0]) else 0
        start = skip(text, mark)
        if start == len(text):
            return None
        end = self._scanner.end(text, start) if text[start] == "{" else start
        if end is None:
            return self._as_content(text, len(text)) if last else None
        call = read_call(text[start:end])
        if call is None:
            return self._as_content(text, end)
        self._line_start = True
        return [call], end


class Phi4Parser(ToolParser):
    """`functools[{"name": ..., "arguments": {...}}]`, or the list between `<|tool_call|>` and `<|/tool_call|>`."""

    END = "<|/tool_call|>"
    marks = ("functools[", "<|tool_call|>", END)
    special = True

    def _read(self, text: str, last: bool) -> Read | None:
        if text.startswith(self.END):
            return ([], len(self.END)) if self._called else self._reject(text)
        start = len("functools") if text.startswith("functools") else skip(text, len("<|tool_call|>"))
        if start == len(text):
            return None
        if text[start] not in "[{":
            return self._reject(text)
        end = self._scanner.end(text, start)
        if end is None:
            return None
        calls = read_calls(text[start:end], ToolCall)
        return (calls, end) if calls else self._reject(text)


class DeepSeekParser(ToolParser):
    """DeepSeek's V3 and R1, `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME` and a code block of JSON, and V3.1, which
    has the name before the separator and no code block."""

    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    marks = (BEGIN, CALL, CALL_END, END)
    special = True
    HEAD = re.compile(r"\s*([^\s`]+)\s*```(?:json)?\s*")

    def _read(self, text: str, last: bool) -> Read | None:
        if text.startswith(self.BEGIN):
            start = skip(text, len(self.BEGIN))
            if text.startswith(self.CALL, start):
                return self._read_inner(text, start, last)
            return None if self.CALL.startswith(text[start:]) else self._reject(text)
        if not text.startswith(self.CALL):
            used = len(self.CALL_END if text.startswith(self.CALL_END) else self.END)
            return ([], used) if self._called else self._reject(text)
        first, separator, rest = text[len(self.CALL) :].partition(self.SEPARATOR)
        head, brace, _ = rest.partition("{")
        if self.CALL_END in first or self.CALL_END in head:
            return self._reject(text)
        if not separator or not brace:
            return None
        match = self.HEAD.fullmatch(head)
        name = match[1] if match else "" if head.strip() else first.strip()
        start = len(self.CALL) + len(first) + len(separator) + len(head)
        end = self._scanner.end(text, start)
        if not name:
            return self._reject(text)
        if end is None:
            return None
        arguments = arguments_text(text[start:end])
        if arguments is None:
            return self._reject(text)
        behind = after_close(text, end, self.CALL_END, last=last, fill=SPACES + "`}")
        return None if behind is None else ([ToolCall(name, arguments)], behind)


def read_call(text: str, make: Any = ToolCall) -> ToolCall | None:
    """The call in the text of a JSON object, or None if it is not one. make: from name and arguments."""
    members = members_of(text)
    if members is not None and "name" not in members and "function" in members:
        members = members_of(members["function"])
    if members is None or "name" not in members:
        return None
    name = json.loads(members["name"], strict=False)
    arguments = arguments_text(members.get("arguments", members.get("parameters", "{}")))
    return make(name, arguments) if isinstance(name, str) and arguments is not None else None


def read_calls(text: str, make: Any) -> list[Piece]:
    """The calls in the text of a JSON object or of a list of such; none if any of it is not a call."""
    texts = [text] if text.startswith("{") else elements_of(text) or []
    calls = [read_call(each, make) for each in texts]
    return [call for call in calls if call is not None] if None not in calls else []


def arguments_text(text: str) -> str | None:
    """Arguments as JSON text: the model's own text where that is JSON. None if the text has no JSON value."""
    value = _value(text)
    if value is _NONE:
        return None
    if isinstance(value, str):  # JSON in a string
        return value
    if value is None:
        return "{}"
    if is_json(text):
        return text.strip(SPACES)
    return json.dumps(value, ensure_ascii=False)  # of text with line breaks in strings


def is_json(text: str) -> bool:
    """Whether the text is a JSON value, strictly."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a model may write anything
        return False
    return True


def members_of(text: str) -> dict[str, str] | None:
    """The text of each value of a JSON object; None if the text is not one."""
    try:
        return _walk_object(text)
    except (ValueError, RecursionError):
        return None


def elements_of(text: str) -> list[str] | None:
    """The text of each value of a JSON list; None if the text is not one."""
    try:
        return _walk_list(text)
    except (ValueError, RecursionError):
        return None


_NONE = object()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def _value(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return _NONE


def _expect(text: str, at: int, characters: str) -> int:
    """The index behind the next character that is not blank, which must be one of `characters`."""
    at = skip(text, at)
    if at == len(text) or text[at] not in characters:
        raise ValueError(f"expected one of {characters} at {at}")
    return at + 1


def _span(text: str, at: int) -> tuple[str, int]:
    """The text of the value at `at`, and where it ends."""
    start = skip(text, at)
    _, end = _DECODER.raw_decode(text, start)
    return text[start:end], end


def _walk_object(text: str) -> dict[str, str]:
    members: dict[str, str] = {}
    at = _expect(text, 0, "{")
    if text[skip(text, at) :].startswith("}"):
        return members
    while text[at - 1] != "}":
        key, at = _DECODER.raw_decode(text, skip(text, at))
        at = _expect(text, at, ":")
        members[str(key)], at = _span(text, at)
        at = _expect(text, at, ",}")
    if text[at:].strip(SPACES):
        raise ValueError("text after the object")
    return members


def _walk_list(text: str) -> list[str]:
    elements: list[str] = []
    at = _expect(text, 0, "[")
    if text[skip(text, at) :].startswith("]"):
        return elements
    while text[at - 1] != "]":
        element, at = _span(text, at)
        elements.append(element)
        at = _expect(text, at, ",]")
    if text[at:].strip(SPACES):
        raise ValueError("text after the list")
    return elements


def _short_id() -> str:
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))
