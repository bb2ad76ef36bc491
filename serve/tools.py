"""Tool calls in outputs: in the format of Qwen and Hermes, <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or
as JSON that a schema constrains, if the request forces a call."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Any

from mmjax import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
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
    """Reads an output that a schema constrains to calls. name: the function whose arguments it is; None: a list of
    calls."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.calls = 0
        self._buffer = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall]:
        """As `ToolCallParser.feed`; all calls come at the end."""
        self._buffer += text
        if last:
            found = self._calls()
            yield from found
            if not found:
                yield self._buffer

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """As `ToolCallParser.read`. A truncated output is text."""
        self._buffer = text
        calls = self._calls()
        return ("" if calls else text), calls

    def _calls(self) -> list[ToolCall]:
        try:
            value = json.loads(self._buffer)
        except (ValueError, RecursionError):  # a model may write anything
            return []
        if self.name is not None:
            return [ToolCall(self.name, json.dumps(value, ensure_ascii=False))]
        entries = value if isinstance(value, list) else []
        calls = [read_call(json.dumps(entry, ensure_ascii=False)) for entry in entries]
        return [call for call in calls if call is not None]


def schema_of(
    tools: list[dict[str, Any]], choice: str | dict[str, Any], most: int = MAX_CALLS
) -> tuple[dict[str, Any], str | None]:
    """(JSON schema of the output, function whose arguments it is or None) for a `tool_choice` that forces a call.

    most: limit of calls in one output. RequestError for an invalid choice.
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
        functions[function["name"]] = function.get("parameters") or {"type": "object"}
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
