"""Tool calls that a request forces: JSON that a schema constrains. Other calls are in the model's own format, which
`mmjax.parsers` reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from mmjax.serve.closed_schemas import close_parameters

from mmjax import RequestError
from mmjax.parsers import ToolCall

# The beginning of a call in a forced output, up to its arguments.
CALL_HEAD = re.compile(r'\s*[\[,]\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*')
MAX_CALLS = 16  # of a forced output: without a limit, some models never end the list


class Arguments(str):
    """The next piece of a call's arguments."""

    __slots__ = ()


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
        """(content, calls) of a complete output."""
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
