"""The tables of the documentation agree with the code: flags, variables, families, routes, metrics."""

import argparse
import re
from types import ModuleType

import pytest
from mmjax.serve import command

from doc_blocks import PAGES, ROOT
from mmjax.cli import flags
from mmjax.cli.main import MODEL_COMMANDS
from mmjax.config import VARIABLES
from mmjax.models import FAMILIES
from mmjax.types import SAMPLING_PARAMETERS

HIDDEN = {"/"}  # the page
COMMANDS = (*MODEL_COMMANDS, "bench throughput", "bench latency", "bench serve", "demo", "run", "convert", "inspect")


def between(page: str, name: str) -> list[str]:
    """The rows of the table between two marks, without the header."""
    match = re.search(rf"<!-- {name}:.*?-->\n(.*?)<!-- end of {name} -->", PAGES[page].read_text(), re.DOTALL)
    assert match is not None
    return match[1].splitlines()[2:]


@pytest.fixture(scope="module")
def reference(tables: ModuleType) -> str:
    """The command line page, as on the site."""
    page: str = tables.on_page_markdown(PAGES["cli.md"].read_text())
    return page


def test_every_flag_of_the_engine_has_a_meaning() -> None:
    assert [name for name in flags.FIELDS if not flags.FIELDS[name].metadata.get("help")] == []


def test_flags_of_the_engine(reference: str) -> None:
    for name in flags.FIELDS:
        default = flags.shown(flags.default(name))
        shown = default if default == "unset" else f"`{default}`"
        forms = ", ".join(f"`{form}`" for form in flags.names(name))
        assert f"| {forms} | {shown} | {flags.meaning(name)} |" in reference


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_a_command(name: str, tables: ModuleType, reference: str) -> None:
    """Every argument in a command's --help is in the reference, with a description."""
    section = re.search(rf"^## mmjax {name.split()[0]}\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL)
    assert section is not None
    shared = re.search(r"^## mmjax serve\n(.*?)(?=^## )", reference, re.MULTILINE | re.DOTALL)
    assert shared is not None
    told = section[1] + (shared[1] if name in MODEL_COMMANDS else "")
    for action in tables.actions_of(tables.parser_of(name), engine=False):
        assert action.help, action
        for option in action.option_strings or [action.dest.upper()]:
            assert option.startswith("--no-") or f"`{option}`" in told, option


def test_flags_of_the_server(reference: str) -> None:
    """Names and defaults as `serve/command.py` declares them."""
    parser = argparse.ArgumentParser(add_help=False)
    command.add_flags(parser)
    for action in parser._actions:
        default = action.default
        while isinstance(default, list):
            [default] = default
        shown = "unset" if default in (None, "") else flags.shown(default)
        shown = shown if shown == "unset" else f"`{shown}`"
        assert f"| `{action.option_strings[0]}` | {shown} | {action.help}" in reference


def test_every_table_is_used(tables: ModuleType) -> None:
    """No table is left out, and no mark is left over."""
    marks = [name for page in PAGES.values() for name in tables.MARK.findall(page.read_text())]
    assert sorted(marks) == sorted(tables.TABLES)
    with pytest.raises(KeyError):
        tables.on_page_markdown("<!-- table: of no such thing -->")
    assert tables.on_page_markdown("words <!-- table: environment -->") == "words <!-- table: environment -->"


def test_environment(tables: ModuleType, reference: str) -> None:
    """Every `env("NAME", ...)`, `env_number` and `env_flag` of the product, and nothing else."""
    read = tables.variables_read()
    assert set(VARIABLES) == set(read) and len(read) > 25
    assert set(re.findall(r"^\| `MMJAX_(\w+)` \|", reference, re.MULTILINE)) == set(read)
    assert all(VARIABLES.values())


def test_defaults_of_variables(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the code, whatever is set in the environment of the build."""
    monkeypatch.setenv("MMJAX_CACHE_ROOT", "/elsewhere")
    read = tables.variables_read()
    for name, shown in (
        ("CACHE_ROOT", "`~/.cache/mmjax`"),
        ("COMPILATION_CACHE", "`~/.cache/mmjax/xla`"),
        ("IMAGE_FETCH_TIMEOUT", "`5`"),
        ("MEDIA_CACHE", "unset"),
        ("MEDIA_EGRESS_BLOCK_PRIVATE", "`1`"),
        ("MAX_EMBED_DECODE_BYTES", "`2147483648` (2048 MiB)"),
        ("MAX_N_SEQUENCES", "`16384`"),
    ):
        assert tables.amount(name, read[name]) == shown


def test_variables_that_pages_name_exist() -> None:
    """Also with a star for the last part."""
    pages = " ".join(page.read_text() for page in PAGES.values())
    named = set(re.findall(r"`MMJAX_(\w+?\*?)`", pages)) - {"SHARED"}  # of the tests
    assert named
    assert {
        name for name in named if not any(re.fullmatch(name.replace("*", r"\w*"), known) for known in VARIABLES)
    } == (set())


def test_sampling_parameters(tables: ModuleType) -> None:
    page = tables.on_page_markdown(PAGES["server.md"].read_text())
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", page, re.MULTILINE))
    for name, parameter in SAMPLING_PARAMETERS.items():
        assert name == "output_kind" or rows[name] == parameter.help


def test_families() -> None:
    """Of the README, which the page of families includes. A row names one architecture or several."""
    rows = PAGES["README.md"].read_text().partition("## Families")[2].partition("\n## ")[0].splitlines()
    cells = [row.split("|")[2] for row in rows if row.startswith("|")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(FAMILIES)
    assert '--8<-- "README.md:families"' in PAGES["families.md"].read_text()


def test_inputs_by_family(tables: ModuleType) -> None:
    rows = tables.inputs_table().splitlines()[2:]
    named = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in rows]
    assert {name for [name] in filter(None, named)} == set(FAMILIES.values()) - {"causal"}
    assert any("`<|image_{i}|>`" in row and "`num_crops`" in row for row in rows)


def test_routes() -> None:
    """Every route with its methods, but the page; those of MMJAX_SERVER_DEV_MODE in a table of their own."""
    sources = set((ROOT / "serve").glob("*.py"))
    developing = {ROOT / "serve" / "development_routes.py"}
    for name, files in (("routes", sources - developing), ("development routes", developing)):
        code = "".join(path.read_text() for path in files)
        there = {
            (method.upper(), path.replace(":path", ""))
            for method, path in re.findall(r'@routes\.(get|post)\("([^"]+)"', code)
        }
        told = set()
        for row in between("server.md", name):
            method = ""
            for given, path in re.findall(r"`(POST |GET )?(/[\w/{}]*)`", row.split("|")[1]):
                method = given.strip() or method
                told.add((method, path))
        assert told == {(method, path) for method, path in there if path not in HIDDEN}


def test_metrics() -> None:
    """All metrics of the server, and no others."""
    code = (ROOT / "mmjax" / "entrypoints" / "metrics.py").read_text()
    there = set(re.findall(r'"((?:vllm|mmjax):\w+)"', code))
    told = re.findall(r"`((?:vllm|mmjax):\w+)`", "\n".join(between("server.md", "metrics")))
    assert there and sorted(told) == sorted(there)
    pages = " ".join(page.read_text() for page in PAGES.values())
    assert set(re.findall(r"`((?:vllm|mmjax):\w+)`", pages)) == there


def test_parts_of_messages() -> None:
    """The parts listed on the page on inputs are those that are accepted."""
    from mmjax.chat.parts import MEDIA_TYPES

    text = PAGES["multimodal_inputs.md"].read_text()
    rows = re.search(r"^\| part \| .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert rows is not None
    told = {name for row in rows[0].splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == (set(MEDIA_TYPES) | {"text"}) - {"input_image"}  # the last is how /v1/responses calls image_url


def test_options_of_videos() -> None:
    from mmjax.multimodal.media import VideoMediaIO

    text = PAGES["multimodal_inputs.md"].read_text()
    rows = re.search(r"^\| option \| .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert rows is not None
    assert re.findall(r"^\| `(\w+)` \|", rows[0], re.MULTILINE) == sorted(
        VideoMediaIO.OPTIONS, key=["num_frames", "fps", "max_duration", "video_backend", "frame_recovery"].index
    )
