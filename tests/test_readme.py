"""What the README says about flags, variables, families and files is what the code says."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mmjax.serve import command

from mmjax import flags
from mmjax.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
READERS = ("env", "env_number", "env_flag")  # of mmjax/config.py


def between(name: str) -> list[str]:
    """The rows of the table between two marks, without its head."""
    match = re.search(rf"<!-- {name}:.*?-->\n(.*?)<!-- end of {name} -->", README, re.DOTALL)
    assert match is not None
    return match[1].splitlines()[2:]


def flag_rows() -> Iterator[str]:
    for name in flags.FIELDS:
        default = flags.shown(flags.default(name))
        yield f"| `{flags.flag(name)}` | {default if default == 'unset' else f'`{default}`'} | {flags.meaning(name)} |"


def test_every_flag_has_a_meaning() -> None:
    assert [name for name in flags.FIELDS if not flags.FIELDS[name].metadata.get("help")] == []


def test_flags() -> None:
    assert "\n".join(between("flags")) == "\n".join(flag_rows())


def test_environment() -> None:
    """Every `env("NAME", ...)`, `env_number` and `env_flag` of the product, and nothing else."""
    read = set()
    for path in (ROOT / "mmjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in READERS:
                if path.name == "config.py" and isinstance(node.args[0], ast.Name):
                    continue  # one reader calling another
                read.add(f"MMJAX_{ast.literal_eval(node.args[0])}")
    assert {row.split("`")[1] for row in between("environment")} == read


def test_flags_of_the_server() -> None:
    """Their names and defaults; the meanings are the README's own."""
    parser = argparse.ArgumentParser(add_help=False)
    command.add_flags(parser)
    told = [[cell.strip() for cell in row.split("|")[1:3]] for row in between("server")]
    actual = []
    for action in parser._actions:
        default = action.default
        while isinstance(default, list):
            [default] = default
        shown = "unset" if default in (None, "") else flags.shown(default)
        actual.append([f"`{action.option_strings[0]}`", shown if shown == "unset" else f"`{shown}`"])
    assert told == actual


def test_routes() -> None:
    """Every route but the page, one model's card, and those of MMJAX_SERVER_DEV_MODE."""
    code = "".join(path.read_text() for path in (ROOT / "serve").glob("*.py"))
    there = set(re.findall(r'@routes\.(?:get|post)\("([^"]+)"', code))
    hidden = {"/", "/v1/models/{name:path}", "/reset_mm_cache", "/reset_prefix_cache"}
    assert set(re.findall(r"`(?:POST |GET )?(/[\w/]+)`", "\n".join(between("routes")))) == there - hidden


def test_metrics() -> None:
    code = (ROOT / "serve" / "metrics.py").read_text()
    named = re.findall(r"`((?:vllm|mmjax):\w+)`", README)
    assert named and [name for name in named if f'"{name}"' not in code] == []


def test_families() -> None:
    """A row names one architecture or several."""
    rows = README.partition("## Families")[2].partition("##")[0].splitlines()
    cells = [row.split("|")[2] for row in rows if row.startswith("|")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(FAMILIES)


def test_files_that_are_named_exist() -> None:
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    folders = "examples|tests|mmjax|benchmarks|converters|docs|deploy|serve|nn|processors|\\.ci"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./]+\w", " ".join(pages))
    named = [f"mmjax/{name}" if name.startswith(("nn/", "processors/")) else name for name in named]
    assert named
    assert [name for name in named if "foo" not in name and not (ROOT / name).exists()] == []


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for step in (
        "ruff format --check .",
        "ruff check .",
        "mypy benchmarks examples",
        "mmjax demo",
        "examples/quickstart.py",
    ):
        assert step in README and step in script
