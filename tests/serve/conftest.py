"""Servers over tiny engines for the tests of this folder, reached through ASGI or over a socket."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api_server import client_over, running_engine
from http_server import listening_server as on_a_port
from mmjax import AsyncLLM


@pytest.fixture(scope="session")
def served(tiny_dir: Callable[[str], Path]) -> Iterator[AsyncLLM]:
    """The engine of a tiny Qwen2-VL."""
    yield from running_engine(tiny_dir("qwen2_vl"), max_model_len=384)


@pytest.fixture(scope="session")
def listening(tiny_dir: Callable[[str], Path]) -> Iterator[AsyncLLM]:
    """The engine of a tiny Whisper, whose window is four seconds."""
    yield from running_engine(tiny_dir("whisper"), max_model_len=64)


@pytest.fixture(scope="session")
def pooling(tiny_dir: Callable[[str], Path]) -> Iterator[AsyncLLM]:
    """The engine of a tiny Qwen2-VL that computes embeddings."""
    yield from running_engine(tiny_dir("qwen2_vl"), max_model_len=256, runner="pooling")


@pytest.fixture(scope="session")
def make_client(served: AsyncLLM) -> Callable[..., TestClient]:
    """`make_client(**settings)`: a client of a new server over the shared engine."""
    return lambda **settings: client_over(served, **settings)


@pytest.fixture(scope="session")
def client(make_client: Callable[..., TestClient]) -> TestClient:
    """A client of the server with default settings."""
    return make_client()


@pytest.fixture(scope="session")
def speech_client(listening: AsyncLLM) -> TestClient:
    """A client of a server that transcribes speech."""
    return client_over(listening, audio_mb=1.0)


@pytest.fixture(scope="session")
def vector_client(pooling: AsyncLLM) -> TestClient:
    """A client of a server that computes embeddings."""
    return client_over(pooling)


@pytest.fixture(scope="session")
def address(served: AsyncLLM) -> Iterator[str]:
    """The address of a server of the tiny Qwen2-VL."""
    with on_a_port(client_over(served).app) as where:
        yield where
