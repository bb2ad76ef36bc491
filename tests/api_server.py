"""Servers over tiny engines, their clients, and readers of their responses."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from mmjax.serve.app import create_app
from mmjax.serve.context import ServerSettings

from mmjax import LLM, AsyncLLM

SMALL: dict[str, Any] = {
    "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 128, "num_decode_steps": 4, "enforce_eager": True,
}  # fmt: skip


def running_engine(folder: Path, **arguments: Any) -> Iterator[AsyncLLM]:
    """An engine. Once it is closed, none of its blocks may still be allocated."""
    llm = LLM(str(folder), **{**SMALL, **arguments})
    engine = AsyncLLM(llm)
    yield engine
    engine.close()
    assert not any(each.has_work for each in llm.model.engines)
    assert llm.reset_prefix_cache(), "a request has not freed its blocks"


def client_over(engine: AsyncLLM, **settings: Any) -> TestClient:
    """A client of a server over an engine. Closing the client does not close the engine."""
    app = create_app(engine, ServerSettings(names=("tiny", "alias"), **settings))
    app.router.lifespan_context = contextlib.nullcontext  # servers share the engine, so they must not close it
    return TestClient(app, raise_server_exceptions=False)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until a condition is true. what: the condition in words."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds} s: {what}"
        time.sleep(0.02)


def sse_events(response: Any) -> list[dict[str, Any]]:
    """The JSON of each server-sent event except the last, which is [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
