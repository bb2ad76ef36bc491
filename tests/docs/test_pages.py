"""The pages are consistent: files, links, commands and code that they name exist, and CI runs what they say."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from doc_blocks import PAGES, ROOT, blocks_of, commands_of
from mmjax.cli import flags
from mmjax.cli.main import MAPPINGS, MODEL_COMMANDS, model_parser, top_parser

DOCS = [name for name, path in PAGES.items() if path.parent.name == "docs"]


class Loader(yaml.SafeLoader):
    """YAML with mkdocs' own tags, which are ignored."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
Loader.add_multi_constructor("tag:", lambda loader, suffix, node: None)


def names_in(tree: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(tree, str):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    assert isinstance(values, list) or hasattr(values, "__iter__")
    return [name for value in values for name in names_in(value)]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert sorted(names_in(config["nav"])) == sorted(DOCS)


def test_nothing_is_loaded_from_other_hosts() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert config["theme"]["font"] is False
    assert {next(iter(plugin)) if isinstance(plugin, dict) else plugin for plugin in config["plugins"]} == {
        "search", "mkdocstrings",
    }  # fmt: skip
    assert not {"extra_css", "extra_javascript"} & set(config)


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].read_text().splitlines()) <= 140


def test_files_that_are_named_exist() -> None:
    folders = "examples|tests|mmjax|benchmarks|converters|docs|deploy|serve|kernels|engine|nn|processors|models|\\.ci"
    named = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./]+\w", " ".join(page.read_text() for page in PAGES.values()))
    packages = ("nn/", "processors/", "models/", "engine/")
    named = [f"mmjax/{name}" if name.startswith(packages) else name for name in named]
    assert named
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert [name for name in missing if "foo" not in name] == []


def anchors_of(page: Path) -> set[str]:
    """The ids of headings, which are the same on the site and on code hosts."""
    heads = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower())).strip("-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_link_targets_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name].read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = (PAGES[name].parent / file).resolve() if file else PAGES[name]
        assert page.is_file(), target
        assert not anchor or anchor in anchors_of(page), target


@pytest.mark.parametrize("name", PAGES)
def test_code_can_be_read(name: str) -> None:
    for block in blocks_of(name):
        if block.language == "python":
            compile(block.code, block.name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_valid_flags(name: str) -> None:
    """Every `mmjax ...` line only has flags that exist."""
    text = PAGES[name].read_text()
    inline = [line for line in re.findall(r"`(mmjax (?:serve|chat|run-batch|demo|bench) [^`]*)`", text) if "--" in line]
    for line in [*commands_of(name), *inline]:
        command = re.search(r"\bmmjax ((?!-gpu\b)[a-z-]+ ?.*)$", line)
        if command is None or line.startswith(("docker", "pip")):
            continue
        words = shlex.split(command[1])
        if words[0] in MODEL_COMMANDS:
            model_parser(words[0]).parse_args(flags.fold(words[1:], MAPPINGS))
        else:
            top_parser().parse_args(flags.fold(words))


@pytest.mark.parametrize("name", PAGES)
def test_scripts_that_are_run_exist(name: str) -> None:
    for line in commands_of(name):
        for file in re.findall(r"\b(?:python|bash) ([\w./]+\.(?:py|sh))", line):
            assert (ROOT / file).is_file(), line


def test_public_names_are_documented() -> None:
    """Every name of `mmjax.__all__` is on the page of the API, and everything on it exists."""
    import mmjax

    text = PAGES["api.md"].read_text()
    told = re.findall(r"^::: ([\w.]+)(.*?)(?=^:::|^#|\Z)", text, re.MULTILINE | re.DOTALL)
    for path, options in told:
        parts = path.split(".")
        for cut in range(len(parts), 0, -1):  # the longest prefix that is a module
            try:
                found = importlib.import_module(".".join(parts[:cut]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[cut:]:
            found = getattr(found, part)
        for member in re.findall(r"^        - (\w+)$", options, re.MULTILINE) or re.findall(r"(\w+)[,\]]", options):
            assert getattr(found, member).__doc__, (path, member)
    assert {f"mmjax.{name}" for name in mmjax.__all__} - {"mmjax.__version__"} <= {path for path, _ in told}


def test_continuous_integration_runs_what_contributors_are_told() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r"^ *step (.+)$", script, re.MULTILINE)
    told = " ".join(commands_of("CONTRIBUTING.md"))
    wanted = (
        "ruff format --check .",
        "ruff check .",
        "mypy",
        "mypy benchmarks examples docs",
        "mkdocs build --strict",
        "mmjax demo",
        "python examples/quickstart.py",
        "pytest",
        "pytest -m parity",
        "pytest -m clients",
        "pytest -m published",
        "pytest -m hosts",
    )
    for step in wanted:
        assert step in told and any(line.startswith(step) for line in steps), step
    assert len(steps) == len(wanted)


def test_commits_are_checked_as_in_continuous_integration() -> None:
    """The hooks before a commit are the first steps of .ci/run."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    steps = re.findall(r"^ *step (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert entries == [step.replace(" --check .", "").removesuffix(" .") for step in steps[: len(entries)]]


def test_extras_that_are_named_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = " ".join(page.read_text() for page in PAGES.values())
    named = {name for group in re.findall(r"(?:'\.|mmjax)\[([\w,]+)\]'", pages) for name in group.split(",")}
    assert named and named <= set(extras)
