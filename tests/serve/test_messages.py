"""POST /v1/messages: Anthropic's API over HTTP, and with its client for Python."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from mmjax.serve.messages import MessageBuilder
from mmjax.serve.messages_schema import MessagesRequest, chat_messages

from api_server import client_over, wait_until
from http_server import listening_server
from mmjax import AsyncLLM, EngineDeadError
from prompts import base64_image, image_url_part, random_image, user_messages

Json = dict[str, Any]
SOURCE = {"type": "base64", "media_type": "image/png", "data": base64_image(random_image(1))}
IMAGE = {"type": "image", "source": SOURCE}
CALL = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
TOOL = {
    "name": "weather",
    "description": "Tells it.",
    "input_schema": {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    },
}
GREEDY: Json = {"model": "tiny", "max_tokens": 8, "temperature": 0}


def ask(client: TestClient, content: Any, **body: Any) -> Json:
    """The message that answers one message of the user."""
    response = client.post("/v1/messages", json={"messages": user_turn(content), **GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def user_turn(content: Any) -> list[Json]:
    return [{"role": "user", "content": content}]


def events_of(client: TestClient, content: Any, **body: Any) -> list[Json]:
    """The events of a stream. The name of each must be its type."""
    given = {"messages": user_turn(content), "stream": True, **GREEDY, **body}
    blocks = client.post("/v1/messages", json=given).text.rstrip("\n").split("\n\n")
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def names(events: list[Json]) -> list[str]:
    """The types of events, each run of deltas once."""
    found = [event["type"] for event in events]
    return [name for i, name in enumerate(found) if not (name == "content_block_delta" and i and found[i - 1] == name)]


BLOCK_EVENTS = ["content_block_start", "content_block_delta", "content_block_stop"]


def test_a_message_is_a_chat(client: TestClient) -> None:
    whole = ask(client, "the lazy dog", system=[{"type": "text", "text": "Be brief."}], metadata={"user_id": "a"})
    messages = [{"role": "system", "content": "Be brief."}, *user_messages("the lazy dog")]
    chat = client.post("/v1/chat/completions", json={"messages": messages, **GREEDY}).json()
    assert whole["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert whole["stop_reason"] == "max_tokens" and whole["stop_sequence"] is None
    assert whole["type"] == "message" and whole["role"] == "assistant" and whole["id"].startswith("msg_")
    usage = whole["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 8 and usage["cache_creation_input_tokens"] == 0
    counted = client.post("/v1/messages/count_tokens", json={"messages": messages[1:], "system": "Be brief."})
    assert counted.json() == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_an_image(client: TestClient) -> None:
    seen = ask(client, [IMAGE, {"type": "text", "text": "What is this?"}])
    given = user_messages(image_url_part(random_image(1)), "What is this?")
    chat = client.post("/v1/chat/completions", json={"messages": given, **GREEDY}).json()
    assert seen["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    link = {"type": "image", "source": {"type": "url", "url": f"data:image/png;base64,{SOURCE['data']}"}}
    body = {"messages": user_turn([link, {"type": "text", "text": "What is this?"}])}
    counted = client.post("/v1/messages/count_tokens", json=body).json()
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_events(client: TestClient) -> None:
    whole = ask(client, "the lazy dog")
    events = events_of(client, "the lazy dog")
    assert names(events) == ["message_start", "ping", *BLOCK_EVENTS, "message_delta", "message_stop"]
    started = events[0]["message"]
    assert started["content"] == [] and started["usage"]["input_tokens"] > 0 and started["stop_reason"] is None
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 8
    word = text.strip()[1:3]
    stopped = ask(client, "the lazy dog", stop_sequences=[word])
    assert stopped["stop_reason"] == "stop_sequence" and stopped["stop_sequence"] == word
    assert events_of(client, "the lazy dog", stop_sequences=[word])[-2]["delta"]["stop_sequence"] == word


def test_the_last_message_of_the_assistant_is_continued(client: TestClient) -> None:
    whole = ask(client, "the lazy dog")["content"][0]["text"]
    begun = whole[: len(whole) // 2]
    turns = [*user_turn("the lazy dog"), {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    response = client.post("/v1/messages", json={"messages": turns, **GREEDY}).json()
    chat = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True, **GREEDY}
    expected = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert response["content"] == [{"type": "text", "text": expected}]


def test_tools(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    forced = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 60}
    whole = ask(client, "Is it warm?", **forced)
    [call] = whole["content"]
    assert call["type"] == "tool_use" and call["name"] == "weather" and set(call["input"]) == {"warm"}
    assert whole["stop_reason"] == "tool_use"
    events = events_of(client, "Is it warm?", **forced)
    assert names(events) == ["message_start", "ping", *BLOCK_EVENTS, "message_delta", "message_stop"]
    assert events[2]["content_block"] | {"id": ""} == {"type": "tool_use", "id": "", "name": "weather", "input": {}}
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == call["input"] and events[-2]["delta"]["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "yes"}]}
    turns = [*user_turn("Is it warm?"), {"role": "assistant", "content": [call]}, *user_turn([result])]
    body = {"messages": turns, "tools": [TOOL], **GREEDY}
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 200 and response.json()["usage"]["input_tokens"] > 0, response.text


def test_text_and_calls_are_blocks(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    given: Json = {"structured_outputs": {"choice": [f"Wait.{CALL}{CALL}"]}, "max_tokens": 200}
    given["tools"] = [{"name": "now", "input_schema": {"type": "object"}}]
    text, first, second = ask(client, "Time?", **given)["content"]
    assert text == {"type": "text", "text": "Wait."} and first["input"] == second["input"] == {"a": 1}
    assert first["id"] != second["id"]
    events = events_of(client, "Time?", **given)
    assert names(events)[2:] == [*BLOCK_EVENTS * 3, "message_delta", "message_stop"]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2]
    once = ask(client, "Time?", tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **given)
    assert [block["type"] for block in once["content"]] == ["text", "tool_use"] and once["stop_reason"] == "tool_use"


def test_arguments_that_come_in_pieces() -> None:
    builder = MessageBuilder({"content": []})
    pieces: list[Json] = [
        {"id": "1", "function": {"name": "now", "arguments": '{"a"'}},
        {"function": {"arguments": ": 1}"}},
        {"id": "2", "function": {"name": "now", "arguments": "noon"}},
    ]
    events = [event for piece in pieces for event in builder.add({"tool_calls": [piece]})]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    events += builder.end("stop", None, usage)
    assert [block["input"] for block in builder.message["content"]] == [{"a": 1}, {"arguments": "noon"}]
    assert [event["content_block"]["input"] for event in events if event["type"] == "content_block_start"] == [{}, {}]
    assert builder.message["stop_reason"] == "tool_use" and builder.message["usage"]["input_tokens"] == 2


def test_reasoning_is_a_block_of_thinking() -> None:
    builder = MessageBuilder({"content": []})
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}}
    pieces = [{"reasoning": "Hm"}, {"reasoning": "m."}, {"content": "No"}, {"content": "on."}]
    events = [event for piece in pieces for event in builder.add(piece)] + list(builder.end("stop", None, usage))
    assert names(events) == [*BLOCK_EVENTS, *BLOCK_EVENTS, "message_delta", "message_stop"]
    assert events[1]["delta"] == {"type": "thinking_delta", "thinking": "Hm"}
    thinking, text = builder.message["content"]
    assert thinking == {"type": "thinking", "thinking": "Hmm.", "signature": ""}
    assert text == {"type": "text", "text": "Noon."} and builder.message["stop_reason"] == "end_turn"


def test_messages_of_a_chat() -> None:
    use = {"type": "tool_use", "id": "1", "name": "now", "input": {"a": "ü"}}
    given: list[Json] = [
        *user_turn("a"),
        *user_turn([{"type": "text", "text": "b"}, IMAGE]),
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, use]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {**use, "id": "2"}]},
        *user_turn(
            [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "noon"}, IMAGE]},
                {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                {"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}},
            ]
        ),
    ]
    user, assistant, first, second, last = chat_messages(given, None)
    assert [part.get("text") for part in user["content"]] == ["a", "b", None]
    assert user["content"][2]["image_url"]["url"].startswith("data:image/png;base64,")
    assert [call["id"] for call in assistant["tool_calls"]] == ["1", "2"] and assistant["reasoning"] == "Hm."
    assert assistant["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": "ü"}'}
    assert first["tool_call_id"] == "1" and [part["type"] for part in first["content"]] == ["text", "image_url"]
    assert second == {"role": "tool", "tool_call_id": "2", "content": ""}
    assert last == {"role": "user", "content": [{"type": "text", "text": "c"}]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"type": "json_schema", "schema": {"type": "array"}},
                }
            },
        ),
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"stop_sequences": ["a"], "stop": "b", "top_k": 3}, {"stop": ["b", "a"], "top_k": 3, "max_tokens": 5}),
    ],
)
def test_fields_become_those_of_a_chat(given: Json, expected: Json) -> None:
    chat = MessagesRequest(messages=user_turn("a"), max_tokens=5, tools=[TOOL], **given).chat()
    assert {name: getattr(chat, name) for name in expected} == expected
    function = {"name": "weather", "parameters": TOOL["input_schema"], "description": "Tells it."}
    assert chat.tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("words", "body"),
    [
        ("max_tokens: Field required", {"max_tokens": None}),
        ("messages: the list is empty", {"messages": []}),
        ("messages.0: role must be", {"messages": [{"role": "tool", "content": "a"}]}),
        ("messages.0: content must be", {"messages": [{"role": "user"}]}),
        ("messages.0.content.0: blocks of type 'document'", {"messages": user_turn([{"type": "document"}])}),
        ("messages.0.content.0: blocks of type None", {"messages": user_turn(["a"])}),
        ("no files are kept", {"messages": user_turn([{"type": "image", "source": {"type": "file"}}])}),
        ("tool_use_id must be a text", {"messages": user_turn([{"type": "tool_result"}])}),
        ("system.content.0: blocks of type 'image'", {"system": [IMAGE]}),
        (
            "messages.1: the results of its calls",
            {
                "messages": [
                    *user_turn("a"),
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": {}}]},
                ]
            },
        ),
        ("tools of type 'bash_20250124' are not offered", {"tools": [{"type": "bash_20250124", "name": "bash"}]}),
        ("each must be", {"tools": [{"name": "a"}]}),
        ("tool_choice: must be", {"tool_choice": {"type": "auto "}}),
        ("`tools` must be set", {"tool_choice": {"type": "any"}}),
        ("output_config: format must be", {"output_config": {"format": {"type": "json_schema"}}}),
        ("thinking: type must be", {"thinking": {"type": "a"}}),
        ("maximum context length", {"max_tokens": 10**6}),
    ],
)
def test_refusals(client: TestClient, words: str, body: Json) -> None:
    given = {"messages": user_turn("a"), **GREEDY, **body}
    given = {name: value for name, value in given.items() if value is not None}
    for stream in (False, True):
        response = client.post("/v1/messages", json={**given, "stream": stream})
        refused = response.json()
        assert response.status_code == 400 and refused["type"] == "error" and refused["request_id"], response.text
        assert refused["error"]["type"] == "invalid_request_error" and words in refused["error"]["message"], refused


def test_errors_have_anthropics_form(make_client: Callable[..., TestClient]) -> None:
    client = make_client(keys=("sesame",), max_queue=0, max_body_mb=0.001)
    body = {"messages": user_turn("a"), **GREEDY}

    def refused(**more: Any) -> tuple[int, str]:
        response = client.post("/v1/messages", **{"json": body, "headers": {"x-api-key": "sesame"}, **more})
        found = response.json()
        assert found["type"] == "error" and set(found) == {"type", "error", "request_id"}
        return response.status_code, found["error"]["type"]

    assert refused(headers={}) == refused(headers={"x-api-key": "no"}) == (401, "authentication_error")
    assert refused(json={**body, "model": "claude"}) == (404, "not_found_error")
    assert refused() == refused(headers={"Authorization": "Bearer sesame"}) == (429, "rate_limit_error")
    assert refused(json={**body, "system": "a" * 2000}) == (413, "request_too_large")
    assert client.post("/v1/chat/completions", json={}, headers={"x-api-key": "sesame"}).status_code == 401


def test_a_failure_is_the_last_event(client: TestClient, served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = served.stream

    async def broken(request: Any) -> AsyncIterator[Any]:
        async for delta in plain(request):
            yield delta
            raise EngineDeadError("no device")

    monkeypatch.setattr(served, "stream", broken)
    last = events_of(client, "the lazy dog")[-1]
    assert last["type"] == "error" and last["error"] == {"type": "overloaded_error", "message": "no device"}
    wait_until(lambda: served.open == 0 and served.load() == (0, 0, 0), "its blocks are free", 10)


@pytest.fixture(scope="module")
def sdk(served: AsyncLLM) -> Iterator[Any]:
    """Anthropic's client for Python."""
    anthropic = pytest.importorskip("anthropic")
    with (
        listening_server(client_over(served, keys=("sesame",)).app) as address,
        anthropic.Anthropic(base_url=address, api_key="sesame", max_retries=0, timeout=300) as client,
    ):
        yield client


SDK: Json = {"model": "tiny", "max_tokens": 8, "extra_body": {"temperature": 0}}  # it has no temperature any more


@pytest.mark.clients
def test_anthropics_client(sdk: Any) -> None:
    import anthropic

    content: Any = [IMAGE, {"type": "text", "text": "What is this?"}]
    whole = sdk.messages.create(messages=user_turn(content), system="Be brief.", **SDK)
    anthropic.types.Message.model_validate(whole.to_dict(), strict=False)
    with sdk.messages.stream(messages=user_turn(content), system="Be brief.", **SDK) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert whole.content[0].text == text == streamed.content[0].text and streamed.stop_reason == "max_tokens"
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 8
    for event in sdk.messages.create(messages=user_turn("a"), stream=True, **SDK):
        type(event).model_validate(event.to_dict())
    counted = sdk.messages.count_tokens(model="tiny", messages=user_turn(content), system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    turns = [*user_turn("a"), {"role": "assistant", "content": whole.content}, *user_turn("b")]
    assert sdk.messages.create(messages=turns, **SDK).content[0].text
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        sdk.messages.create(messages=user_turn("a"), **SDK | {"max_tokens": 10000})
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        sdk.messages.create(messages=user_turn("a"), **SDK | {"model": "claude"})
    with pytest.raises(anthropic.AuthenticationError):
        sdk.with_options(api_key="no").messages.create(messages=user_turn("a"), **SDK)


@pytest.mark.clients
def test_calls_of_anthropics_client(sdk: Any) -> None:
    pytest.importorskip("llguidance")
    forced: Json = {"tools": [TOOL], **SDK, "max_tokens": 120}
    forced["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    whole = sdk.messages.create(messages=user_turn("Is it warm?"), **forced)
    call = whole.content[0]
    assert whole.stop_reason == "tool_use" and call.name == "weather" and set(call.input) == {"warm"}
    with sdk.messages.stream(messages=user_turn("Is it warm?"), **forced) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content] == [block.input for block in whole.content]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "yes", "is_error": False} for block in whole.content
    ]
    turns = [*user_turn("Is it warm?"), {"role": "assistant", "content": whole.content}, *user_turn(results)]
    assert sdk.messages.create(messages=turns, tools=[TOOL], **SDK).role == "assistant"
