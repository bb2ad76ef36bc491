"""Tool calls that are written as Python: `[f(a=1), g()]` by Llama 3.2 and 4, a code block by MiniCPM."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from mmjax.parsers.base import Read, ToolCall, ToolParser, skip
from mmjax.parsers.json_calls import LineStartParser

CONSTANTS = {"true": True, "false": False, "null": None}  # names that models take from JSON


class PythonicParser(LineStartParser):
    """`[f(a=1), g()]`, with or without `<|python_start|>` and `<|python_end|>` around it."""

    START, END = "<|python_start|>", "<|python_end|>"
    marks = (START, END)
    bracket = "["
    special = True
    quotes, brackets = "\"'", ("[{(", "]})")
    HEAD = re.compile(r"\[\s*(?:[^\W\d][\w.]*\s*(?:\(|\Z)|\Z)")

    def _read(self, text: str, last: bool) -> Read | None:
        if text.startswith(self.END):
            return ([], len(self.END)) if self._called else self._as_content(text, len(self.END))
        start = skip(text, len(self.START)) if text.startswith(self.START) else 0
        if start == len(text):
            return None
        match = self.HEAD.match(text, start)
        if match is None:
            return self._as_content(text, start + 1)
        end = self._scanner.end(text, start) if match[0].endswith("(") else None
        if end is None:
            return self._as_content(text, len(text)) if last else None
        calls = read_python(text[start:end])
        if not calls:
            return self._as_content(text, end)
        self._line_start = True
        return [*calls], end


class MiniCPMParser(ToolParser):
    """A code block of calls, one a line, between `<|tool_call_start|>` and `<|tool_call_end|>`, by MiniCPM 3 and 4."""

    marks = ("<|tool_call_start|>",)
    special = True
    close = "<|tool_call_end|>"
    BLOCK = re.compile(r"\s*(?:```(?:python)?\s*\n)?(.*?)\s*(?:```)?\s*", re.DOTALL)

    def _read(self, text: str, last: bool) -> Read | None:
        end = text.find(self.close)
        if end < 0 and not last:
            return None
        body = text[len(self.marks[0]) : end if end >= 0 else None]
        match = self.BLOCK.fullmatch(body)
        calls = read_python(match[1]) if match else []
        if not calls:
            return self._reject(text)
        return [*calls], end + len(self.close) if end >= 0 else len(text)


def read_python(text: str) -> list[ToolCall]:
    """The calls in Python's text: a list of them, or one a line. Empty if any of it is something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a model may write "\d"
            statements = ast.parse(text).body
        values = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
        if len(values) != len(statements):
            return []
        listed = [each for value in values for each in (value.elts if isinstance(value, ast.List) else [value])]
        return [_call(value) for value in listed]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a model may write anything
        return []


def _call(node: ast.expr) -> ToolCall:
    """ValueError for anything but a call with named arguments, all of them literals."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    if not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError("not the name of a function")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** has no name")
        arguments[keyword.arg] = literal(keyword.value)
    return ToolCall(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def literal(node: ast.expr) -> Any:
    """The value of a literal as JSON has it. ValueError for anything else."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            return [literal(each) for each in nodes]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    value = None if node is None else literal(node)
    if not isinstance(value, str):
        raise ValueError("not a key")
    return value


def literal_text(text: str) -> str | None:
    """JSON text of a Python literal; None if the text is not one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            value = literal(ast.parse(text.strip(), mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
