"""Reasoning and tool calls of a model's own format, in the bodies and events of chats and responses."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api_server import sse_events
from mmjax import Delta
from mmjax.parsers import REASONING_PARSERS, TOOL_PARSERS

TEXT = "<think>\nThe time?\n</think>\n\nLook: [TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}"
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
BODY = {"messages": [{"role": "user", "content": "Time?"}], "max_tokens": 4, "temperature": 0, "tools": TOOLS}


@pytest.fixture
def context(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's context, with a model that writes TEXT in the formats of Qwen3's reasoning and Mistral's calls."""
    found: Any = client.app
    context = found.state.context
    complete, stream = context.engine.complete, context.engine.stream

    async def with_text(*arguments: Any) -> Any:
        output = await complete(*arguments)
        outputs = [dataclasses.replace(each, text=TEXT, finish_reason="stop") for each in output.outputs]
        return dataclasses.replace(output, outputs=outputs)

    async def in_pieces(given: Any) -> AsyncIterator[Delta]:
        async for _ in stream(given):
            pass
        for at in range(0, len(TEXT), 5):
            yield Delta(0, TEXT[at : at + 5], [], None, "stop" if at + 5 >= len(TEXT) else None, None)

    monkeypatch.setattr(context.engine, "complete", with_text)
    monkeypatch.setattr(context.engine, "stream", in_pieces)
    monkeypatch.setattr(context, "reasoning_parser", REASONING_PARSERS["qwen3"])
    monkeypatch.setattr(context, "tool_parser", TOOL_PARSERS["mistral"])
    return context


@pytest.mark.parametrize("parallel", [True, False])
def test_chat(client: TestClient, context: Any, parallel: bool) -> None:
    body = {**BODY, "parallel_tool_calls": parallel}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    message = choice["message"]
    assert message["reasoning"] == "The time?" and message["content"] == "Look: "
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["now", "now"][: 2 if parallel else 1] and choice["finish_reason"] == "tool_calls"

    events = sse_events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "The time?"
    assert "".join(delta.get("content") or "" for delta in deltas) == "Look: "
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [*enumerate(names)]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_special_tokens_stay_in_the_text(client: TestClient, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    complete = context.engine.complete

    async def noted(engine_input: Any, params: Any, grammar: Any) -> Any:
        asked.append(params.skip_special_tokens)
        return await complete(engine_input, params, grammar)

    monkeypatch.setattr(context.engine, "complete", noted)
    for tools in (TOOLS, None):
        client.post("/v1/chat/completions", json={**BODY, "tools": tools})
    assert asked == [False, True], "only where the marks are special tokens"


def test_responses(client: TestClient, context: Any) -> None:
    tools = [{"type": "function", "name": "now", "parameters": {"type": "object"}}]
    body = {"input": "Time?", "max_output_tokens": 4, "tools": tools}
    whole = client.post("/v1/responses", json=body).json()["output"]
    assert [item["type"] for item in whole] == ["reasoning", "message", "function_call", "function_call"]
    assert whole[0]["content"] == [{"type": "reasoning_text", "text": "The time?"}]
    text = client.post("/v1/responses", json={**body, "stream": True}).text
    for kind in ("reasoning_text.delta", "reasoning_text.done", "output_text.done", "function_call_arguments.done"):
        assert f"event: response.{kind}\n" in text
    assert text.index("response.reasoning_text.done") < text.index("response.output_text.delta")


def test_a_constrained_output_has_no_reasoning(client: TestClient, context: Any) -> None:
    pytest.importorskip("llguidance")
    body = {**BODY, "tools": None, "structured_outputs": {"choice": ["yes"]}}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"] == TEXT and "reasoning" not in choice["message"]
