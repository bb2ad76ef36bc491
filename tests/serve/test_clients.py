"""The curl and Python scripts of examples/clients, run against a server on a port."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from http_server import listening_server

pytestmark = pytest.mark.clients

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "clients"


@pytest.fixture(scope="module")
def address(make_client: Callable[..., TestClient]) -> Iterator[str]:
    with listening_server(make_client(keys=("sesame",)).app) as where:
        yield where


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (80, 60), (10, 200, 30)).save(tmp_path / "green.png")
    return tmp_path / "green.png"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MMJAX_"))}
    return subprocess.run(
        [str(word) for word in command], env={**plain, **environment}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(address: str, picture: Path) -> None:
    refused = run("bash", CLIENTS / "curl.sh", address)
    assert refused.returncode != 0 and "Unauthorized" in refused.stdout
    for more in ((), (picture,)):
        done = run("bash", CLIENTS / "curl.sh", address, *more, MMJAX_API_KEY="sesame")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count('"object":"chat.completion"') >= 2
        assert "data: [DONE]" in done.stdout and '"object":"text_completion"' in done.stdout
        assert "vllm:generation_tokens_total" in done.stdout
        assert "temperature must be non-negative" in done.stdout  # the last request of the script fails on purpose


def test_python(address: str, picture: Path) -> None:
    pytest.importorskip("openai")
    known = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "sesame"}
    done = run(sys.executable, CLIENTS / "openai_client.py", picture, **known)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert printed["answer"] == printed["streamed"] and printed["picture"]
    assert "no forms" in printed or printed["call"].startswith("weather {'celsius': ")
