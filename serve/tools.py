"""Tool calls that a request forces: JSON that a schema constrains. Other calls are in the model's own format, which
`mmjax.parsers` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mmjax import RequestError
from mmjax.parsers import ToolCall, read_call

MAX_CALLS = 16  # of a forced output: without a limit, some models never end the list


class ForcedToolCallParser:
    """Reads an output that a schema constrains to calls. name: the function whose arguments it is; None: a list of
    calls."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.calls = 0
        self._buffer = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | ToolCall]:
        """As `OutputParser.feed`; all calls come at the end."""
        self._buffer += text
        if last:
            found = self._calls()
            yield from found
            if not found:
                yield self._buffer

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """(content, calls) of a complete output. A truncated one is content."""
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
