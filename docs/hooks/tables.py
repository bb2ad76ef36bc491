"""Tables of the documentation, generated from the code: flags, environment variables, sampling parameters, inputs of
each family.

A page holds a mark, `<!-- table: NAME -->`, and the site gets the table in its place. `on_page_markdown` is what
mkdocs calls; everything else is plain Python and is tested without mkdocs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmjax.cli import flags
from mmjax.cli.main import MODEL_COMMANDS, model_parser, top_parser
from mmjax.config import VARIABLES
from mmjax.models import FAMILIES
from mmjax.types import SAMPLING_PARAMETERS
from mmjax.types.vllm_arguments import ENGINE as ENGINE_ARGUMENTS
from mmjax.types.vllm_arguments import OLDER, OWN, RENAMED, SERVER, SHORT, Argument

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"mmjax": ROOT / "mmjax", "mmjax.serve": ROOT / "serve"}
READERS = ("env", "env_number", "env_flag")  # of mmjax/config.py
MARK = re.compile(r"^<!-- table: ([\w -]+) -->$", re.MULTILINE)
ENGINE = "engine arguments"
UNSET = "unset"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks in a page by their tables. Called by mkdocs. KeyError for an unknown table."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


# -- flags ---------------------------------------------------------------------------------------------------------


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command; "bench throughput" and the like are commands of their own."""
    if command in MODEL_COMMANDS:
        return model_parser(command)
    parser = top_parser()
    for word in command.split():
        parser = subparsers(parser)[word]
    return parser


def subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The commands of a parser by name."""
    [action] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found: Mapping[str, argparse.ArgumentParser] = action.choices
    return found


def actions_of(parser: argparse.ArgumentParser, *, engine: bool) -> list[argparse.Action]:
    """The arguments of a parser, either those of the engine or all the others, without --help and hidden ones."""
    groups = [group for group in parser._action_groups if (group.title == ENGINE) == engine]
    found = [action for group in groups for action in group._group_actions]
    return [action for action in found if action.help != argparse.SUPPRESS and action.dest not in ("help", "model")]


def flag_table(command: str, *, engine: bool = False, without: str = "") -> str:
    """The flags of a command. without: another command, whose flags are left out."""
    known = {action.dest for action in actions_of(parser_of(without), engine=engine)} if without else set()
    rows = [row(action) for action in actions_of(parser_of(command), engine=engine) if action.dest not in known]
    return table(("flag", "default", "meaning"), rows)


def row(action: argparse.Action) -> tuple[str, str, str]:
    """(names, default, meaning) of one argument."""
    names = [name for name in action.option_strings if not name.startswith("--no-")] or [str(action.dest).upper()]
    meaning, shown = meaning_and_default(action)
    if action.choices:
        meaning += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    return ", ".join(f"`{name}`" for name in names), shown, meaning


def meaning_and_default(action: argparse.Action) -> tuple[str, str]:
    """The help text of an argument and its default, taken from the text if that contains one."""
    text = (action.help or "").replace("%%", "%")
    meaning, separator, rest = text.partition(" (default: ")
    if separator:
        default = rest.removesuffix(")")
    elif action.required or (not action.option_strings and action.nargs != "?"):
        return meaning, "required"
    else:
        default = flags.shown(plain(action.default))
    return meaning, default if default == UNSET or " " in default else f"`{default}`"


def plain(value: Any) -> Any:
    """A default without the lists around it; None for an empty list."""
    while isinstance(value, list):
        if not value:
            return None
        [value] = value
    return value


# -- the arguments of vLLM -----------------------------------------------------------------------------------------


def vllm_engine_table() -> str:
    """Every keyword of vLLM's `LLM`, which is a flag of `vllm serve` too."""
    works = {name: flags.meaning(name) for name in flags.FIELDS if name not in OWN}
    return vllm_table(works, ENGINE_ARGUMENTS)


def vllm_server_table() -> str:
    """Every other flag of `vllm serve`."""
    actions = actions_of(parser_of("serve"), engine=False)
    works = {action.dest: meaning_and_default(action)[0] for action in actions if action.dest not in OWN}
    return vllm_table(works, SERVER)


def vllm_older_table() -> str:
    """Arguments of earlier releases of vLLM."""
    return vllm_table({name: f"as {new}" for name, new in RENAMED.items()}, OLDER)


def vllm_table(works: Mapping[str, str], others: Mapping[str, Argument]) -> str:
    """Arguments by name, with what becomes of them. works: the meanings of those that work."""
    found = {name: ("works", meaning) for name, meaning in works.items() if name not in others}
    found |= {name: (argument.outcome, argument.note) for name, argument in others.items()}
    rows = []
    for name, (outcome, note) in sorted(found.items()):
        form = f"`{name}`" + (f", `{SHORT[name]}`" if name in SHORT else "")
        rows.append((form, outcome, note))
    return table(("argument", "here", "meaning, reason, or what to do instead"), rows)


# -- environment variables -----------------------------------------------------------------------------------------


def variables_read() -> dict[str, Any]:
    """The default of every variable that a `config.env*` call reads, by its name without the prefix."""
    found: dict[str, Any] = {}
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MMJAX_", "VLLM_"))}
    with patch.dict(os.environ, unset, clear=True):  # ignore what is set on this machine
        for module, tree in modules():
            for call, owner in calls_of(tree):
                if module == "mmjax.config" and isinstance(call.args[0], ast.Name):
                    continue  # one reader calls another
                found[ast.literal_eval(call.args[0])] = value_of(call.args[1], module, owner)
    return found


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            yield ".".join([package, *parts]), ast.parse(path.read_text())


def calls_of(tree: ast.Module) -> Iterator[tuple[ast.Call, str | None]]:
    """Every call of a reader, with the class that contains it."""
    for top in tree.body:
        owner = top.name if isinstance(top, ast.ClassDef) else None
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in READERS:
                yield node, owner


def value_of(default: ast.expr, module: str, owner: str | None) -> Any:
    """The value of a default, which may refer to names of its module or class."""
    if isinstance(default, ast.Constant):
        return default.value
    names = dict(vars(importlib.import_module(module)))
    if owner is not None:
        names["cls"] = names[owner]
    value = eval(compile(ast.Expression(default), module, "eval"), names)
    return value.replace(str(Path.home()), "~") if isinstance(value, str) else value


def variable_table() -> str:
    """Every environment variable, in the order of `config.VARIABLES`."""
    read = variables_read()
    rows = [(f"`MMJAX_{name}`", amount(name, read[name]), meaning) for name, meaning in VARIABLES.items()]
    return table(("variable", "default", "meaning"), rows)


def amount(name: str, value: Any) -> str:
    """A default for people: switches as 0 and 1, bytes in MiB."""
    if value == "":
        return UNSET
    if isinstance(value, bool):
        return f"`{int(value)}`"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{value}`" + (f" ({value >> 20} MiB)" if name.endswith("_BYTES") else "")


# -- sampling parameters -------------------------------------------------------------------------------------------


def sampling_table() -> str:
    """Every field of `SamplingParams`, as it is declared."""
    rows = [
        (f"`{name}`", UNSET if parameter.default is None else f"`{flags.shown(parameter.default)}`", parameter.help)
        for name, parameter in SAMPLING_PARAMETERS.items()
        if name != "output_kind"
    ]
    return table(("parameter", "default", "meaning"), rows)


# -- families ------------------------------------------------------------------------------------------------------


def inputs_table() -> str:
    """The placeholders, options and names of embedding arrays of each family's processor."""
    rows = []
    for name in dict.fromkeys(FAMILIES.values()):
        processor = importlib.import_module(f"mmjax.processors.{name}").Processor
        for modality, most in processor.mm_limits.items():
            first = modality == next(iter(processor.mm_limits))
            options = ", ".join(f"`{option}`" for option in sorted(processor.accepted_kwargs)) if first else ""
            embeds = ", ".join(f"`{field}`" for field in processor.embed_fields.get(modality, ()))
            what = modality + (f", at most {most}" if most else "")
            mark = processor.placeholder_text.get(modality, "")
            rows.append((f"`{name}`" if first else "", what, mark and f"`{mark}`", options, embeds))
    return table(("family", "modality", "placeholder", "options", "embeddings"), rows)


# -- Markdown ------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. Cells may contain pipes only in code, where Python-Markdown leaves them alone."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "engine flags": partial(flag_table, "serve", engine=True),
    "serve flags": partial(flag_table, "serve"),
    "chat flags": partial(flag_table, "chat", without="serve"),
    "run-batch flags": partial(flag_table, "run-batch", without="serve"),
    "plan flags": partial(flag_table, "plan"),
    "bench flags": partial(flag_table, "bench latency"),
    "bench serve flags": partial(flag_table, "bench serve"),
    "demo flags": partial(flag_table, "demo"),
    "run flags": partial(flag_table, "run"),
    "convert flags": partial(flag_table, "convert"),
    "inspect flags": partial(flag_table, "inspect"),
    "environment": variable_table,
    "inputs by family": inputs_table,
    "sampling parameters": sampling_table,
    "vllm engine arguments": vllm_engine_table,
    "vllm server flags": vllm_server_table,
    "older vllm arguments": vllm_older_table,
}


def main() -> None:
    """Print one table, or all: `python docs/hooks/tables.py [NAME]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(TABLES))
    chosen = parser.parse_args().name
    for name in [chosen] if chosen else TABLES:
        print(f"## {name}\n\n{TABLES[name]()}\n")


if __name__ == "__main__":
    main()
