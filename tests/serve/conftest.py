"""One small server for all the tests of this folder, spoken to through its own ASGI interface."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from mmjax.serve.app import create_app
from mmjax.serve.context import Settings

from mmjax import LLM, AsyncLLM


@pytest.fixture(scope="session")
def served(tiny_dir: Callable[[str], Path]) -> Iterator[AsyncLLM]:
    """The engine of a tiny Qwen2-VL."""
    llm = LLM(
        str(tiny_dir("qwen2_vl")), max_model_len=384, block_size=16, max_num_seqs=8, max_num_batched_tokens=128,
        num_decode_steps=4, enforce_eager=True,
    )  # fmt: skip
    engine = AsyncLLM(llm)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def make_client(served: AsyncLLM) -> Callable[..., TestClient]:
    """`make_client(**settings)`: a server of its own over the shared engine."""

    def make(**settings: object) -> TestClient:
        app = create_app(served, Settings(names=("tiny", "alias"), **settings))  # type: ignore[arg-type]
        return TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture(scope="session")
def client(make_client: Callable[..., TestClient]) -> TestClient:
    """The server with default settings."""
    return make_client()
