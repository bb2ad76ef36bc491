"""Structured outputs, in every route that generates text."""

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmjax import AsyncLLM, SamplingParams
from mmjax.engine.logits.structured_output import GrammarCompiler

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
    assert len(threads) == 1 and threads[0].startswith("grammar")


def test_the_slowest_other_request_is_as_fast_under_bombardment(served: AsyncLLM) -> None:
    """The first mask of each of these took 1.3 s inside the engine's step."""
    patterns = [f"(abcdefghij){{{1_000_000 + i}}}" for i in range(8)]
    bombs = [SamplingParams(max_tokens=5, structured_outputs={"regex": pattern}) for pattern in patterns]
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0)

    async def bomb(prompt: Any, bomb_params: SamplingParams) -> None:
        with pytest.raises(ValueError, match="at most 20000"):
            await served.complete(prompt, bomb_params, await served.compile_grammar(bomb_params))

    async def slowest_of_three(prompt: Any) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            await served.complete(prompt, params)
            times.append(time.perf_counter() - start)
        return max(times)

    async def ratios() -> list[float]:
        prompt, found = await served.prepare("Hello"), []
        await slowest_of_three(prompt)
        while not found or (min(found) > 1.5 and len(found) < 5):  # other processes may disturb a round
            quiet = await slowest_of_three(prompt)
            busy, *_ = await asyncio.gather(slowest_of_three(prompt), *(bomb(prompt, each) for each in bombs))
            found.append(busy / quiet)
        return found

    measured = asyncio.run(ratios())
    assert min(measured) <= 1.5, measured


def test_a_slow_mask_does_not_delay_others(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun, go, threads = GrammarCompiler.allowed_tokens, threading.Event(), threading.Event(), set()

    def slow(self: GrammarCompiler, matcher: Any, num_tokens: int) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        if num_tokens == 2:
            begun.set()
            assert go.wait(300)
        return plain(self, matcher, num_tokens)

    monkeypatch.setattr(GrammarCompiler, "allowed_tokens", slow)
    result: list[Any] = []
    regex = {"structured_outputs": {"regex": "[ab]{9}"}}
    slow_request = threading.Thread(target=lambda: result.append(chat(client, **regex)))
    slow_request.start()
    assert begun.wait(300)
    for _ in range(2):
        assert chat(client, max_tokens=3).status_code == 200
    assert not result
    go.set()
    slow_request.join()
    assert re.fullmatch("[ab]{9}", result[0].json()["choices"][0]["message"]["content"])
    assert threads == {"grammar", "mask"}


@pytest.mark.parametrize(
    ("constraint", "limit"),
    [
        ({"regex": "(abcdefghij){1000000}"}, "at most 20000"),
        ({"regex": "a{1000000}"}, "at most 20000"),
        ({"regex": "((a{100}){100}){100}"}, "at most 20000"),
        ({"json": {"type": "string", "pattern": "^(abcdefghij){1000000}$"}}, "at most 20000"),
        ({"json": {"type": "object", "patternProperties": {"a{99999}": {}}}}, "at most 20000"),
        ({"grammar": "start: /a{1000000}/"}, "at most 20000"),
        ({"choice": [f"word {i}" for i in range(4097)]}, "at most 4096"),
        ({"json": {"$ref": "#"}}, "no end"),
        ({"json": {"anyOf": [{"$ref": "#"}]}}, "no end"),
        ({"grammar": "start: start"}, "no end"),
    ],
)
def test_limits_are_named(client: TestClient, constraint: Any, limit: str) -> None:
    refused = chat(client, structured_outputs=constraint)
    assert refused.status_code == 400 and limit in refused.json()["error"]["message"], refused.text
    assert refused.json()["error"]["param"] == "structured_outputs"


def test_a_long_list_of_choices(client: TestClient) -> None:
    choices = [f"word {i}" for i in range(4096)]
    body = {"structured_outputs": {"choice": choices}, "temperature": 2.0, "max_tokens": 60}
    choice = chat(client, **body).json()["choices"][0]
    assert choice["message"]["content"] in choices and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_gives_up_later_is_an_error(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    plain = GrammarCompiler.allowed_tokens

    def give_up(self: GrammarCompiler, matcher: Any, num_tokens: int) -> Any:
        if num_tokens == 2:
            matcher.consume_tokens([0])
            assert matcher.is_error()
        return plain(self, matcher, num_tokens)

    monkeypatch.setattr(GrammarCompiler, "allowed_tokens", give_up)
    response = chat(client, structured_outputs={"regex": "[ab]{9}"}, stream=stream)
    assert "after 2 tokens" in response.text and '"finish_reason":"stop"' not in response.text.replace(" ", "")
    assert response.status_code == (200 if stream else 400)
