"""Command-line flags for EngineArgs: one per field, and dotted forms that set one key of a mapping.

--limit-mm-per-prompt '{"image": 2}'       a JSON object
--limit-mm-per-prompt.video.count 1        one key of it; the parts are merged; the last value of a key is used
--media-io-kwargs.image.key+ 3             append to a list; `key+=a,b` appends two
--config flags.yaml                        flags from a file; those on the command line override them
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import logging
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import EngineArgs, human_int
from mmjax.types.vllm_arguments import KEYWORDS, RENAMED, SERVER, SHORT, Argument

log = logging.getLogger(__name__)

HINTS = typing.get_type_hints(EngineArgs)
FIELDS = {field.name: field for field in dataclasses.fields(EngineArgs) if field.name != "model"}
# engine arguments of vLLM that are flags of the server here: see mmjax.serve.command
OF_SERVER = ("served_model_name", "reasoning_parser", "otlp_traces_endpoint")
# accepted, but neither listed by --help nor fields of EngineArgs: see mmjax.types.vllm_arguments
UNLISTED = [name for name in (*KEYWORDS, *RENAMED) if name not in FIELDS and name not in OF_SERVER]
MAPPINGS = frozenset(
    name
    for name in FIELDS
    if any(typing.get_origin(part) is collections.abc.Mapping for part in (HINTS[name], *typing.get_args(HINTS[name])))
) | {
    "rope_scaling",
    "override_pooler_config",
    *(name for name, argument in {**KEYWORDS, **SERVER}.items() if argument.form == "json" and name not in FIELDS),
}
LONG = {short: "--" + name.replace("_", "-") for name, short in SHORT.items()}


class FlagError(ValueError):
    """Flags that cannot be parsed; the message says how to write them."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def meaning(name: str) -> str:
    """What an engine argument means, in a line."""
    return str(FIELDS[name].metadata["help"])


def default(name: str) -> Any:
    """The default of an engine argument."""
    field = FIELDS[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def add_engine_flags(parser: argparse._ActionsContainer, *, defaults: bool = False) -> None:
    """One flag per engine argument, and vLLM's other flags, unlisted. Only those given appear in the parsed namespace,
    unless `defaults` are wanted."""
    # scripts for vLLM also add them to a group, which can have no group in it
    group = parser.add_argument_group("engine arguments") if isinstance(parser, argparse.ArgumentParser) else parser
    for name in FIELDS:
        text = f"{meaning(name)} (default: {shown(default(name))})".replace("%", "%%")
        value = default(name) if defaults else argparse.SUPPRESS
        group.add_argument(*names(name), dest=name, default=value, help=text, **_argparse_kwargs(name))
    for name in UNLISTED:
        _add_unlisted(group, name, KEYWORDS.get(name), defaults=defaults)


def add_unlisted_server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `vllm serve` that do not work here. Only those given appear in the parsed namespace."""
    group = parser.add_argument_group("server of vLLM")
    for name, argument in SERVER.items():
        _add_unlisted(group, name, argument, defaults=False)


def engine_kwargs(parsed: argparse.Namespace) -> dict[str, Any]:
    """The engine arguments among parsed flags."""
    return {name: value for name, value in vars(parsed).items() if name in FIELDS or name in UNLISTED}


def server_kwargs(parsed: argparse.Namespace) -> dict[str, Any]:
    """The flags of `vllm serve` among parsed ones that do not work here."""
    return {name: value for name, value in vars(parsed).items() if name in SERVER}


def names(name: str) -> list[str]:
    """The forms of a flag, the short one last."""
    return [flag(name), *([SHORT[name]] if name in SHORT else [])]


def _add_unlisted(group: Any, name: str, argument: Argument | None, *, defaults: bool) -> None:
    """Add a flag that `--help` does not list. argument: None for one that has another name today."""
    value = argument.default if defaults and argument else None if defaults else argparse.SUPPRESS
    form = argument.form if argument else "switch" if name.startswith("disable") else "value"
    kwargs: dict[str, Any] = {}
    if form == "switch":
        kwargs = {"action": argparse.BooleanOptionalAction}
    elif name in MAPPINGS:
        kwargs = {"type": json.loads}
    elif form == "values":
        kwargs = {"nargs": "*"}
    elif name == "rope_theta":
        kwargs = {"type": float}
    group.add_argument(*names(name), dest=name, default=value, help=argparse.SUPPRESS, **kwargs)


def shown(value: Any) -> str:
    """A default, as `--help` shows it."""
    if value is None or value == "":
        return "unset"
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def _argparse_kwargs(name: str) -> dict[str, Any]:
    """Arguments of `add_argument` that depend on the type of a field."""
    hint = HINTS[name]
    union = isinstance(hint, types.UnionType)
    hint_types = {typing.get_origin(part) or part for part in (typing.get_args(hint) if union else (hint,))} - {
        types.NoneType
    }
    if name in MAPPINGS:
        return {"type": json.loads, "metavar": "JSON"}
    if hint_types == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if bool in hint_types:  # a text, or the flag alone
        return {"nargs": "?", "const": True, "metavar": name.rpartition("_")[2].upper()}
    if FIELDS[name].metadata["human"]:
        return {"type": _human(name), "metavar": "INT"}
    if collections.abc.Sequence in hint_types:
        return {"nargs": "+"}
    (parse,) = hint_types - {int} if len(hint_types) > 1 else hint_types  # EngineArgs reads "4k" and "4096" itself
    return {"type": parse, "metavar": parse.__name__.upper()}


def _human(name: str) -> Callable[[str], int]:
    """The type of a flag whose number may be written as 8k or 8K."""

    def parse(text: str) -> int:
        try:
            return human_int(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def fold(argv: Sequence[str], mappings: frozenset[str] = MAPPINGS) -> list[str]:
    """Rewrite flags for argparse: dashes instead of underscores, and one JSON object for all parts of a mapping.

    FlagError for a key without a value and for a value that is not a JSON object.
    """
    rest: list[str] = []
    trees: dict[str, dict[str, Any]] = {}
    words = iter(argv)
    for word in words:
        short = re.match(r"-[a-z]+(?=[.=]|$)", word)
        if short and short[0] in LONG:
            word = LONG[short[0]] + word[short.end() :]
        match = re.fullmatch(r"--([A-Za-z][\w-]*)(?:\.([^=\s]+?))?(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        head, path, given = match[1].replace("-", "_"), match[2], match[3]
        if head not in mappings:
            if path is not None:
                raise FlagError(f"{word}: {flag(head)} takes no keys")
            rest.append(flag(head) + ("" if given is None else f"={given}"))
            continue
        value = given if given is not None else next(words, None)
        if value is None or (given is None and value.startswith("--")):
            raise FlagError(f"{word} needs a value")
        tree = trees.setdefault(head, {})
        if path is None:
            _merge(tree, _object(head, value), head)
        else:
            _put(tree, path.replace("-", "_").split("."), value, split=given is not None, name=head)
    return [*rest, *(f"{flag(head)}={json.dumps(tree)}" for head, tree in trees.items())]


def from_file(argv: Sequence[str]) -> list[str]:
    """Insert the flags in the file of `--config FILE` (YAML, one key per flag). The command line overrides them.

    FlagError for a file that cannot be read.
    """
    words, file = list(argv), None
    for i, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            given = word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else "")
            words[i : i + 1 + ("=" not in word)] = []
            file = Path(given)
            break
    if file is None:
        return words
    import yaml

    try:
        entries = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FlagError(f"--config {file}: {error}") from error
    if not isinstance(entries, Mapping):
        raise FlagError(f"--config {file}: expected one `flag: value` per line, got {type(entries).__name__}")
    given_flags = {word.partition("=")[0].partition(".")[0].replace("_", "-") for word in words if word[:2] == "--"}
    first, last = [], []
    for key, value in entries.items():
        name = flag(str(key).lstrip("-")).replace("--model-tag", "--model")
        if isinstance(value, list):  # argparse gives all following words to a list, so lists come last
            last += [] if name in given_flags else [name, *map(str, value)]
        elif isinstance(value, bool):
            first.append(name if value else name.replace("--", "--no-", 1))
        elif value is not None:
            first.append(f"{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return [*first, *words, *last]


def _object(head: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = f": {error}"
        if re.fullmatch(r"\w+=[^\s,=]+(,\w+=[^\s,=]+)*", text):  # the syntax of old releases
            old = [pair.split("=") for pair in text.split(",")]
            whole = ", ".join(f'"{key}": {value}' for key, value in old)
            hint = f"; write '{{{whole}}}' or {' '.join(f'{flag(head)}.{key} {value}' for key, value in old)}"
        raise FlagError(f"{flag(head)} takes a JSON object, got {text!r}{hint}") from error
    if not isinstance(value, dict):
        raise FlagError(f"{flag(head)} takes a JSON object, got {text!r}")
    return value


def _put(tree: dict[str, Any], keys: list[str], text: str, *, split: bool, name: str) -> None:
    """Set one value from its text. A last key that ends in `+` appends to a list."""
    *path, last = keys
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if last.endswith("+"):
        values = text.split(",") if split else [value]
        here: Any = tree
        for key in (*path, last := last[:-1]):
            here = here.get(key, []) if isinstance(here, dict) else []
        value = [*(here if isinstance(here, list) else [here]), *values]
        _merge(tree, _nest(path, {last: value}), name, quiet=True)
    else:
        _merge(tree, _nest(path, {last: value}), name)


def _nest(path: Sequence[str], leaf: dict[str, Any]) -> dict[str, Any]:
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def _merge(tree: dict[str, Any], more: Mapping[str, Any], name: str, *, quiet: bool = False) -> None:
    """Merge `more` into `tree`. A later value replaces an earlier one, with a warning; two objects are merged."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, f"{name}.{key}", quiet=quiet)
            continue
        if key in tree and not quiet:
            log.warning("%s.%s is given more than once; the last value is used", flag(name), key)
        tree[key] = value
