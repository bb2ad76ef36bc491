"""Runs chat templates, which are untrusted programs: in an immutable sandbox, on plain data only, with bounded output.

The environment is the one for which published templates are written: trimmed blocks, `raise_exception`,
`strftime_now`, an unescaped `tojson`, loop controls, and `generation` blocks (which print their content).
"""

import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, sandbox
from jinja2.parser import Parser
from jinja2.utils import Namespace

from mmjax.types import RequestError, TooDeepError

# raised by jinja2 for text that is not a template, and by Python for the code that jinja2 generates
UNPARSABLE = (jinja2.TemplateError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
MAX_OUTPUT = 1 << 24  # characters that a template may print, and the length of a product that it may compute


class _Generation(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's output for training; here it only prints its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: names must not begin with '_'")


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Refuses to compute large products and powers."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            large = isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 4096
        else:
            sizes = [len(x) if isinstance(x, (str, bytes, list, tuple)) else x for x in (left, right)]
            several = any(isinstance(x, (str, bytes, list, tuple)) for x in (left, right))
            large = several and sizes[0] * sizes[1] > MAX_OUTPUT
        if large:
            raise jinja2.exceptions.SecurityError(f"the result of '{operator}' would be too large")
        return super().call_binop(context, operator, left, right)


@functools.cache
def environment() -> sandbox.ImmutableSandboxedEnvironment:
    """The environment in which every template is parsed and run."""
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return env


class _Dict:
    """`dict(…)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _now(date_format: str) -> str:
    return datetime.datetime.now().astimezone().strftime(date_format)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """(compiled template, the variables it reads)."""
    env = environment()
    try:
        return env.from_string(template), frozenset(meta.find_undeclared_variables(env.parse(template)))
    except UNPARSABLE as error:
        line = f" on line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise RequestError(f"The chat template is not valid Jinja{line}: {error}", "bad_template") from error


def variables(template: str) -> frozenset[str]:
    """The variables that a template reads. RequestError when it cannot be parsed."""
    return _compiled(template)[1]


def render(template: str, values: Mapping[str, Any]) -> str:
    """Run a template. RequestError for any error in it, and for output that is too long."""
    compiled, _ = _compiled(template)
    pieces, length = [], 0
    try:
        given = plain(values)
    except RecursionError as error:
        raise TooDeepError from error
    try:
        for piece in compiled.generate(given):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT:
                raise RequestError(f"The chat template prints more than {MAX_OUTPUT} characters.", "bad_template")
    except RequestError:
        raise
    except Exception as error:  # a template is a program, so it can raise anything
        raise RequestError(
            f"The chat template cannot be applied to these messages ({type(error).__name__}: {error}). If it expects "
            "the other content format, set chat_template_content_format to 'string' or 'openai'.",
            "bad_template",
        ) from error
    return "".join(pieces)


def plain(value: Any) -> Any:
    """The value as plain strings, numbers, dictionaries and lists: a template could call the methods of other objects.
    RequestError for objects that are none of these."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a member of an enumeration: its value, not what its __str__ returns
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    raise RequestError(
        f"A chat template cannot be given a {type(value).__name__}: use strings, numbers, lists and dictionaries.",
        "bad_template_value",
    )
