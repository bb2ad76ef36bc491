"""Tool calls: as Qwen and Hermes models write them, <tool_call>{"name": ..., "arguments": {...}}</tool_call>, and those
that a client insists on, for which the answer is held to JSON."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Any

from mmjax import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16  # in an answer that must be calls: without an end, some models find none


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
    """Splits an answer, as it comes, into what is said and what is called.

    Text that may be the beginning of a call is held back. A call that is no valid JSON, or never closed, is text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""
        self._called = False  # the last piece was a call: a line break after it belongs to it

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall]:
        """More of the answer: pieces of text and calls, in their order. `last`: nothing is held back any more."""
        self._held += text
        while self._held:
            if self._called:
                self._held, self._called = self._held.removeprefix("\n"), False
                continue
            at = self._held.find(OPEN)
            if at < 0:
                keep = 0 if last else _overlap(self._held, OPEN)
                said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                if said:
                    yield said
                return
            if at:
                said, self._held = self._held[:at], self._held[at:]
                yield said
            end = self._held.find(CLOSE)
            if end < 0:
                if not last:
                    return
                whole, self._held = self._held, ""
                yield read_call(whole[len(OPEN) :]) or whole
                continue
            whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
            call = read_call(whole[len(OPEN) : -len(CLOSE)])
            self._called = call is not None
            yield call or whole

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """(what is said, calls) of a whole answer."""
        pieces = list(self.feed(text, last=True))
        said = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        return said.strip() if calls else said, calls


class ForcedToolCallParser:
    """Reads an answer that can be nothing but calls: the arguments of `name`, or without one a list of calls."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.calls = 0
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall]:
        """As `ToolCallParser.feed`; all of it comes at the end."""
        self._held += text
        if last:
            found = self._calls()
            yield from found
            if not found:
                yield self._held

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """As `ToolCallParser.read`. An answer that was cut short is text."""
        self._held = text
        calls = self._calls()
        return ("" if calls else text), calls

    def _calls(self) -> list[ToolCall]:
        try:
            value = json.loads(self._held)
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
    """(JSON schema of the answer, name of the one function) that `tool_choice` insists on. RequestError for a bad one.

    `most`: calls in one answer.
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
    """The call that JSON text writes, if it does."""
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
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
