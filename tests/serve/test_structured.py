"""Structured outputs, in every route that generates text."""

import json
import re
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmjax import AsyncLLM

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}


def chat(client: TestClient, **body: Any) -> Any:
    given = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 90}
    return client.post("/v1/chat/completions", json={**given, **body})


def test_every_route(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    result = chat(client, response_format=form).json()["choices"][0]
    assert set(json.loads(result["message"]["content"])) == {"a"} and result["finish_reason"] == "stop"
    body = {"prompt": "Hi", "temperature": 0, "max_tokens": 40, "structured_outputs": {"regex": "[ab]{3}"}}
    assert re.fullmatch("[ab]{3}", client.post("/v1/completions", json=body).json()["choices"][0]["text"])
    request = {
        "prompts": "Hi",
        "sampling_params": {"max_tokens": 40, "structured_outputs": {"choice": ["red", "blue"]}},
    }
    assert client.post("/generate", json=request).json()[0]["outputs"][0]["text"] in ("red", "blue")


def test_whitespace_is_limited(client: TestClient) -> None:
    whitespace = [token for text in (" ", "\n", "\t") for token in _tokens(client, text)]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    bias = {str(token): 100 for token in whitespace}
    result = chat(client, response_format=form, logit_bias=bias, max_tokens=250).json()["choices"][0]
    assert result["finish_reason"] == "stop", result
    assert set(json.loads(result["message"]["content"])) == {"a"} and not result["message"]["content"][-1].isspace()


def _tokens(client: TestClient, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    return list(client.post("/tokenize", json=body).json()["tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_constraints_are_refused_before_a_stream_begins(client: TestClient, stream: bool) -> None:
    for constraint in ({"regex": "("}, {"json": {"type": "nonsense"}}, {}, {"grammar": "start: %"}):
        refused = chat(client, structured_outputs=constraint, stream=stream)
        assert refused.status_code == 400 and "error" in refused.json(), refused.text
        body = {"prompt": "Hi", "structured_outputs": constraint, "stream": stream}
        assert client.post("/v1/completions", json=body).status_code == 400


def test_a_slow_grammar_does_not_delay_others(
    client: TestClient, served: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, begun, go, threads = served.llm.model.grammar_compiler, threading.Event(), threading.Event(), []
    plain = vocabulary.compile

    def slow(structured: Any) -> Any:
        if isinstance(structured, dict):
            threads.append(threading.current_thread().name)
            begun.set()
            assert go.wait(300)
        return plain(structured)

    monkeypatch.setattr(vocabulary, "compile", slow)
    result: list[Any] = []
    slow_request = threading.Thread(target=lambda: result.append(chat(client, structured_outputs={"choice": ["yes"]})))
    slow_request.start()
    assert begun.wait(300)
    for _ in range(2):
        assert chat(client, max_tokens=3).status_code == 200
    assert not result
    go.set()
    slow_request.join()
    assert result[0].json()["choices"][0]["message"]["content"] == "yes"
    assert len(threads) == 1 and threads[0].startswith("inputs")
