"""What the README says about flags, variables, families and files is what the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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
        yield f"| `{flags.flag(name)}` | {default if default == 'unset' else f'`{default}`'} | {flags.MEANINGS[name]} |"


def test_every_flag_has_a_meaning() -> None:
    assert set(flags.MEANINGS) == set(flags.FIELDS)


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


def test_families() -> None:
    """A row names one architecture or several."""
    rows = README.partition("## Families")[2].partition("##")[0].splitlines()
    cells = [row.split("|")[2] for row in rows if row.startswith("|")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(FAMILIES)


def test_files_that_are_named_exist() -> None:
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    folders = "examples|tests|mmjax|benchmarks|converters|docs|nn|processors|\\.ci"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./]+\w", " ".join(pages))
    named = [f"mmjax/{name}" if name.startswith(("nn/", "processors/")) else name for name in named]
    assert named
    assert [name for name in named if "foo" not in name and not (ROOT / name).exists()] == []


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in (
        "ruff format --check .",
        "ruff check .",
        "mypy benchmarks examples",
        "examples/quickstart.py",
    ):
        assert command in README and command in script
