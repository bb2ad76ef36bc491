"""The openai package for JavaScript against a server on a port. Needs node and the package.

MMJAX_NODE_MODULES names the node_modules folder with the package; the default is the one at the root of the repository.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from http_server import listening_server

pytestmark = pytest.mark.clients

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def address(make_client: Callable[..., TestClient]) -> Iterator[str]:
    with listening_server(make_client(keys=("sesame",)).app) as where:
        yield where


@pytest.fixture
def node(address: str, tmp_path: Path) -> Callable[..., str]:
    """`node(script, *arguments)`: the output of a script of examples/clients."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no node")
    modules = Path(os.environ.get("MMJAX_NODE_MODULES", ROOT / "node_modules"))
    if not (modules / "openai" / "package.json").is_file():
        pytest.skip(f"no openai package in {modules} (npm install openai; MMJAX_NODE_MODULES=FOLDER)")
    # node looks for packages beside the script; no environment variable changes that for ES modules.
    (tmp_path / "node_modules").symlink_to(modules.resolve())

    def run(script: str, *arguments: object) -> str:
        shutil.copy(ROOT / "examples" / "clients" / script, tmp_path)
        environment = {**os.environ, "OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "sesame"}
        done = subprocess.run(
            [program, str(tmp_path / script), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_chat(node: Callable[..., str], tmp_path: Path) -> None:
    Image.new("RGB", (112, 84), (10, 200, 30)).save(tmp_path / "green.jpg")
    plain, given = node("chat.mjs"), node("chat.mjs", tmp_path / "green.jpg")
    for text in (plain, given):
        printed = dict(line.split(": ", 1) for line in text.splitlines())
        assert printed["answer"] == printed["streamed"] and '"completion_tokens":24' in printed["usage"]
    tokens = [int(re.findall(r"(\d+) tokens of prompt", text)[0]) for text in (plain, given)]
    assert tokens[1] > tokens[0]  # the larger picture


def test_leaving_frees_the_request(node: Callable[..., str]) -> None:
    assert node("abort.mjs").splitlines() == [
        "left with 1 under way",
        "after leaving: 0",
        "aborted: APIUserAbortError",
        "after aborting: 0",
    ]


def test_errors_are_the_packages_own(node: Callable[..., str]) -> None:
    lines = node("errors.mjs").splitlines()
    assert len(lines) == 9
    for i, (kind, status, param) in enumerate(
        [
            ("NotFoundError", 404, "model"),
            ("BadRequestError", 400, "temperature"),
            ("BadRequestError", 400, "null"),
            ("BadRequestError", 400, "max_tokens"),
        ]
    ):
        for line in lines[2 * i : 2 * i + 2]:  # complete and streamed
            assert f": {kind} (status {status}, param {param}): {status} " in line
    assert lines[8] == "a wrong key: AuthenticationError (status 401)"
