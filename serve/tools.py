"""Tool calls in outputs: in the format of Qwen and Hermes, <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or
as JSON that a schema constrains, if the request forces a call."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

from mmjax.serve.closed_schemas import close_parameters

from mmjax import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# The beginning of a call in a forced output, up to its arguments.
CALL_HEAD = re.compile(r'\s*[\[,]\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*')
MAX_CALLS = 16  # of a forced output: without a limit, some models never end the list


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call as OpenAI writes it; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")

    def as_json(self) -> dict[str, Any]:
        """An entry of `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Arguments(str):
    """The next piece of a call's arguments."""


class ToolCallParser:
    """Splits a streamed output into text and calls.

    Text that may be the beginning of a call is buffered. A call that is not valid JSON, or has no end, is text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._buffer = ""
        self._called = False  # the last piece was a call; a line break after it is dropped

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall]:
        """The pieces of text and the calls in new text. last: no more text follows, so nothing stays buffered."""
        self._buffer += text
        while self._buffer:
            if self._called:
                self._buffer, self._called = self._buffer.removeprefix("\n"), False
                continue
            at = self._buffer.find(OPEN)
            if at < 0:
                keep = 0 if last else _overlap(self._buffer, OPEN)
                split = len(self._buffer) - keep
                text_piece, self._buffer = self._buffer[:split], self._buffer[split:]
                if text_piece:
                    yield text_piece
                return
            if at:
                text_piece, self._buffer = self._buffer[:at], self._buffer[at:]
                yield text_piece
            end = self._buffer.find(CLOSE)
            if end < 0:
                if not last:
                    return
                whole, self._buffer = self._buffer, ""
                yield read_call(whole[len(OPEN) :]) or whole
                continue
            whole, self._buffer = self._buffer[: end + len(CLOSE)], self._buffer[end + len(CLOSE) :]
            call = read_call(whole[len(OPEN) : -len(CLOSE)])
            self._called = call is not None
            yield call or whole

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """(text, calls) of a complete output."""
        pieces = list(self.feed(text, last=True))
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        return content.strip() if calls else content, calls


class ForcedToolCallParser:
    """Reads an output that a schema constrains to calls, and yields the arguments as they come. name: the function
    whose arguments it is; None: a list of calls, as `schema_of` describes it.

    A call whose arguments are truncated is a call too: the finish reason of the output says so.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.calls = 0
        self._buffer = ""
        self._in_call = False
        self._depth = 0  # of the objects and lists in the arguments
        self._in_string = self._escaped = False

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall | Arguments]:
        """A call with empty arguments where one begins, and then the pieces of its arguments. last: no more text
        follows; what is not a call is text."""
        self._buffer += text
        begun = self.calls
        while self._buffer:
            if not self._in_call:
                name = self._next_name()
                if name is None:
                    break
                begun, self._in_call = begun + 1, True
                yield ToolCall(name, "")
                continue
            count = self._length_of_arguments()
            piece, rest = self._buffer[:count], self._buffer[count:]
            self._in_call = not rest
            self._buffer = rest[1:]  # without the end of the call
            if piece:
                yield Arguments(piece)
        if last and not begun and self._buffer:
            yield self._buffer

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """As `ToolCallParser.read`."""
        content, calls = "", list[ToolCall]()
        for piece in self.feed(text, last=True):
            if isinstance(piece, ToolCall):
                calls.append(piece)
            elif isinstance(piece, Arguments):
                calls[-1] = dataclasses.replace(calls[-1], arguments=calls[-1].arguments + piece)
            else:
                content += piece
        return content, calls

    def _next_name(self) -> str | None:
        """The function of the call that begins in the buffer; None if its name is yet to come."""
        if self.name is not None:
            return self.name
        head = CALL_HEAD.match(self._buffer)
        if head is None:
            return None
        self._buffer = self._buffer[head.end() :]
        return str(json.loads(head[1]))

    def _length_of_arguments(self) -> int:
        """How much of the buffer belongs to the arguments of the call."""
        if self.name is not None:
            return len(self._buffer)
        for at, sign in enumerate(self._buffer):
            if self._in_string:
                self._in_string = self._escaped or sign != '"'
                self._escaped = sign == "\\" and not self._escaped
            elif sign == '"':
                self._in_string = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                if self._depth == 0:
                    return at
                self._depth -= 1
        return len(self._buffer)


def schema_of(
    tools: list[dict[str, Any]], choice: str | dict[str, Any], most: int = MAX_CALLS, *, closed: bool = True
) -> tuple[dict[str, Any], str | None]:
    """(JSON schema of the output, function whose arguments it is or None) for a `tool_choice` that forces a call.

    most: limit of calls in one output. closed: arguments have only the properties that the
    function lists. RequestError for an invalid choice.
    """
    functions = {}
    for tool in tools:
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise RequestError("tools: each must be {'type': 'function', 'function': {'name': ..., 'parameters': ...}}")
        parameters = function.get("parameters")
        functions[function["name"]] = close_parameters(parameters) if closed else parameters or {"type": "object"}
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in functions:
            raise RequestError(f"tool_choice: {name!r} is none of the tools, {', '.join(functions)}")
        return functions[name], name
    if choice != "required":
        raise RequestError(f"tool_choice: {choice!r} is none of none, auto, required and a function")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, parameters in functions.items()
    ]
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}, None


def read_call(text: str) -> ToolCall | None:
    """The call in JSON text, or None if the text is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model may write anything
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
