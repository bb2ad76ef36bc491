"""The openai package for JavaScript against a server that listens. Needs node and the package.

MMJAX_NODE_MODULES names the node_modules folder that holds it; one at the root of the repository is found by itself.
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
    """`node(script, *arguments)`: what a script of examples/clients prints."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no node")
    modules = Path(os.environ.get("MMJAX_NODE_MODULES", ROOT / "node_modules"))
    if not (modules / "openai" / "package.json").is_file():
        pytest.skip(f"no openai package in {modules} (npm install openai; MMJAX_NODE_MODULES=FOLDER)")
    # node looks for packages beside the script, and an environment variable does not move that.
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
        said = dict(line.split(": ", 1) for line in text.splitlines())
        assert said["answer"] == said["streamed"] and '"completion_tokens":24' in said["usage"]
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
    told = node("errors.mjs").splitlines()
    assert len(told) == 9
    for i, (kind, status, param) in enumerate(
        [
            ("NotFoundError", 404, "model"),
            ("BadRequestError", 400, "temperature"),
            ("BadRequestError", 400, "null"),
            ("BadRequestError", 400, "max_tokens"),
        ]
    ):
        for line in told[2 * i : 2 * i + 2]:  # whole and streamed
            assert f": {kind} (status {status}, param {param}): {status} " in line
    assert told[8] == "a wrong key: AuthenticationError (status 401)"
