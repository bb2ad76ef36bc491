"""Tool calls that are written as XML: by Qwen3-Coder and later Qwen models, and by MiniCPM 5."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mmjax.parsers.base import Read, ToolCall, ToolParser, skip
from mmjax.parsers.json_calls import is_json
from mmjax.parsers.python_calls import literal_text


class Qwen3XMLParser(ToolParser):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, with line breaks.

    A value ends at the `</parameter>` before another parameter or before the end of the function, so that code may have
    such tags. Some models leave out `<tool_call>`.
    """

    OPEN, FUNCTION, END = "<tool_call>", "<function=", "</function>"
    CLOSE = "</tool_call>"
    close: ClassVar[str | None] = CLOSE
    marks: ClassVar[tuple[str, ...]] = (OPEN, FUNCTION, CLOSE)
    NAME = re.compile(r"[\w.:/-]*")
    PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL)

    def _read(self, text: str, last: bool) -> Read | None:
        if text.startswith(self.OPEN):
            start = skip(text, len(self.OPEN))
            if text.startswith(self.FUNCTION, start):
                return self._read_inner(text, start, last)
            return None if self.FUNCTION.startswith(text[start:]) else self._reject(text)
        if text.startswith(self.CLOSE):
            return ([], len(self.CLOSE)) if self._called else self._reject(text)
        match = self.NAME.match(text, len(self.FUNCTION))
        if match is None or (match.end() < len(text) and (text[match.end()] != ">" or not match[0])):
            return self._reject(text)
        end = text.find(self.END)
        while end >= 0 and not self._is_complete(text[match.end() + 1 : end]):
            end = text.find(self.END, end + 1)
        if end < 0:
            return None
        values = self._values(text[match.end() + 1 : end])
        if values is None:
            return self._reject(text)
        return [ToolCall(match[0], self._arguments(match[0], values))], end + len(self.END)

    def _is_complete(self, body: str) -> bool:
        return not body.strip() or "<parameter=" not in body or body.rstrip().endswith("</parameter>")

    def _values(self, body: str) -> list[tuple[str, str]] | None:
        """(name, text) of the parameters; None for a body that has anything else."""
        values, at = [], 0
        while match := self.PARAMETER.match(body, at):
            values.append((match[1].strip(), match[2].removeprefix("\n").removesuffix("\n")))
            at = match.end()
        return None if body[at:].strip() else values

    def _arguments(self, name: str, values: Iterable[tuple[str, str]]) -> str:
        schema = self.parameters.get(name, {}).get("properties")
        properties = schema if isinstance(schema, Mapping) else {}
        pairs = {key: typed(text, properties.get(key)) for key, text in values}
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in pairs.items()) + "}"


class MiniCPM5Parser(Qwen3XMLParser):
    """`<function name="NAME"><param name="KEY">VALUE</param></function>` by MiniCPM 5; values may be CDATA."""

    FUNCTION = "<function name="
    marks = (FUNCTION,)
    close = None
    NAME = re.compile(r"""["']([\w.:/-]+)["']\s*>""")
    PARAMETER = re.compile(
        r"""\s*<param name=["']([^"'>]+)["']\s*>(?:<!\[CDATA\[(.*?)\]\]>\s*|(.*?))</param>""", re.DOTALL
    )
    TOKENS = re.compile(r"<!\[CDATA\[.*?(?:\]\]>|\Z)|</function>", re.DOTALL)

    def _read(self, text: str, last: bool) -> Read | None:
        ends = (match for match in self.TOKENS.finditer(text) if match[0] == self.END)
        end = next(ends, None)
        if end is None:
            return None
        name = self.NAME.match(text, len(self.FUNCTION))
        values = self._values(text[name.end() : end.start()]) if name else None
        if name is None or values is None:
            return self._reject(text)
        return [ToolCall(name[1], self._arguments(name[1], values))], end.end()

    def _values(self, body: str) -> list[tuple[str, str]] | None:
        values, at = [], 0
        while match := self.PARAMETER.match(body, at):
            values.append((match[1], match[3].strip() if match[2] is None else match[2]))
            at = match.end()
        return None if body[at:].strip() else values


def typed(text: str, schema: Any) -> str:
    """A parameter's text as JSON of the type that its schema says; as a string if it has no other type or does not
    fit."""
    types = set(_types(schema))
    string = json.dumps(text, ensure_ascii=False)
    if not types or types == {"string"} or ("string" in types and text.strip() != "null"):
        return string
    stripped = text.strip()
    if stripped.startswith('"'):
        return string
    return stripped if is_json(stripped) else literal_text(stripped) or string


def _types(schema: Any) -> Iterable[str]:
    """The types that a schema allows, as far as it names them."""
    if not isinstance(schema, Mapping):
        return
    given = schema.get("type")
    yield from [given] if isinstance(given, str) else [each for each in given or () if isinstance(each, str)]
    for word in ("anyOf", "oneOf"):
        options = schema.get(word)
        for option in options if isinstance(options, list) else ():
            yield from _types(option)
