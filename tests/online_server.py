"""A server for the duration of a test, over an engine shared with other tests, and OpenAI's client for it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from api_server import client_over
from http_server import listening_server
from mmjax import LLM, AsyncLLM, RequestOutput

openai = pytest.importorskip("openai")

TokenIds = tuple[tuple[int, ...], tuple[int, ...]]


@contextlib.contextmanager
def openai_client(llm: LLM, **settings: Any) -> Iterator["openai.OpenAI"]:
    """A client of a server that listens on a port. Meanwhile the engine must not be used in other ways."""
    engine = AsyncLLM(llm)
    try:
        with (
            listening_server(client_over(engine, **settings).app) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
        ):
            yield client
    finally:
        engine.close()
        del engine.llm  # FastAPI caches the functions of every app, which would keep the model and its programs alive
    assert not any(each.has_work for each in llm.model.engines)


def complete_chat(client: "openai.OpenAI", messages: Any, n: int = 6, **body: Any) -> Any:
    """The greedy response to one conversation; `body`: fields that OpenAI's API does not have."""
    extra = {"ignore_eos": True, "return_token_ids": True, **body}
    done = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_completion_tokens=n, extra_body=extra
    )
    assert done.usage.prompt_tokens == len(done.prompt_token_ids)
    return done


def token_ids_of(*answers: Any) -> list[TokenIds]:
    """The prompt and output token ids of each response, of a client or of `LLM`."""
    found = []
    for answer in answers:
        offline = isinstance(answer, RequestOutput)
        said = answer.outputs[0] if offline else answer.choices[0]
        found.append((tuple(answer.prompt_token_ids or ()), tuple(said.token_ids)))
    return found


def same_tokens(*answers: Any) -> bool:
    """Whether all responses, of a client or of `LLM`, have the same prompt and output tokens."""
    return len(set(token_ids_of(*answers))) == 1
