"""Servers over tiny engines, and what tests of them ask and read."""

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
    """An engine that must not keep a page once it is closed."""
    llm = LLM(str(folder), **{**SMALL, **arguments})
    engine = AsyncLLM(llm)
    yield engine
    engine.close()
    assert not any(each.has_work for each in llm.model.engines)
    assert llm.reset_prefix_cache(), "a request kept pages"


def client_over(engine: AsyncLLM, **settings: Any) -> TestClient:
    """A client of a server over an engine; leaving it does not close the engine."""
    app = create_app(engine, ServerSettings(names=("tiny", "alias"), **settings))
    app.router.lifespan_context = contextlib.nullcontext  # the engine outlives its servers
    return TestClient(app, raise_server_exceptions=False)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not so after {seconds} s: {what}"
        time.sleep(0.02)


def sse_events(response: Any) -> list[dict[str, Any]]:
    """The JSON of each server-sent event but the last, which says [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
