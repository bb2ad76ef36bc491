"""POST /v1/responses with OpenAI's client for Python."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pydantic
import pytest
from fastapi.testclient import TestClient
from mmjax.serve.responses_schema import messages_of

from api_server import wait_until
from mmjax import AsyncLLM, EngineDeadError
from prompts import base64_image, random_image

openai = pytest.importorskip("openai")

IMAGE = f"data:image/png;base64,{base64_image(random_image(1))}"
SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}},
    "required": ["warm"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "parameters": SHAPE, "strict": True}
NOW = {"type": "function", "name": "now"}
CALL = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
GREEDY: dict[str, Any] = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def ask(address: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def event_types(events: list[Any]) -> list[str]:
    """The types of events, each run of deltas once. Every event must fit the client's types."""
    for event in events:
        type(event).model_validate(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    found = [event.type.removeprefix("response.") for event in events]
    return [name for i, name in enumerate(found) if not (name.endswith(".delta") and found[i - 1] == name)]


MESSAGE_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
]
CALL_EVENTS = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]


def test_an_answer(ask: "openai.OpenAI") -> None:
    from openai.types.responses import Response

    whole = ask.responses.create(
        input="the lazy dog", instructions="Be brief.", metadata={"a": "b"}, store=False, **GREEDY
    )
    Response.model_validate(whole.to_dict(), strict=False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the lazy dog"}]
    chat = ask.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert whole.output_text == chat.choices[0].message.content and whole.id.startswith("resp_")
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == 8 and whole.usage.total_tokens == whole.usage.input_tokens + 8
    assert whole.usage.output_tokens_details.reasoning_tokens == 0
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].status == "incomplete" and whole.output[0].role == "assistant"
    assert whole.metadata == {"a": "b"} and whole.temperature == 0 and whole.instructions == "Be brief."
    again = ask.responses.create(input="the lazy dog " * 12, **GREEDY)
    cached = ask.responses.create(input="the lazy dog " * 12, **GREEDY)
    assert cached.output_text == again.output_text and cached.usage.input_tokens_details.cached_tokens >= 16


def test_events(ask: "openai.OpenAI") -> None:
    given = {"input": "the lazy dog", "include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    whole = ask.responses.create(**given)
    events = list(ask.responses.create(stream=True, **given))
    assert event_types(events) == ["created", "in_progress", *MESSAGE_EVENTS, "output_item.done", "incomplete"]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    [part] = whole.output[0].content
    assert len(part.logprobs) == 8 and all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    assert events[-1].response.output[0].content == [part] and events[-1].response.usage is not None
    assert events[0].response.status == "in_progress" and events[0].response.output == []


def test_an_image(ask: "openai.OpenAI") -> None:
    content = [
        {"type": "input_image", "image_url": IMAGE, "detail": "auto"},
        {"type": "input_text", "text": "What is this?"},
    ]
    seen = ask.responses.create(input=[{"role": "user", "content": content}], **GREEDY)
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What is this?"}]
    chat = ask.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=8, temperature=0
    )
    assert seen.output_text == chat.choices[0].message.content
    assert seen.usage.input_tokens == chat.usage.prompt_tokens
    turns = [{"role": "user", "content": content}, *seen.output, {"role": "user", "content": "And now?"}]
    more = ask.responses.create(input=turns, **GREEDY)
    assert more.usage.input_tokens > seen.usage.input_tokens + seen.usage.output_tokens


def test_calls(ask: "openai.OpenAI") -> None:
    pytest.importorskip("llguidance")
    turns: list[Any] = [{"role": "user", "content": "Is it warm?"}]
    given = {"input": turns, "tools": [WEATHER, NOW], "tool_choice": {"type": "function", "name": "weather"}}
    given |= GREEDY | {"max_output_tokens": 60}
    result = ask.responses.create(**given)
    [call] = result.output
    assert call.type == "function_call" and call.name == "weather" and result.status == "completed"
    assert set(json.loads(call.arguments)) == {"warm"} and result.output_text == ""
    assert result.tools[0].name == "weather" and result.tool_choice.name == "weather"
    events = list(ask.responses.create(stream=True, **given))
    assert event_types(events) == ["created", "in_progress", *CALL_EVENTS, "output_item.done", "completed"]
    assert events[-1].response.output[0].arguments == call.arguments
    turns += [call, {"type": "function_call_output", "call_id": call.call_id, "output": '{"warm": true}'}]
    assert ask.responses.create(input=turns, tools=[WEATHER], **GREEDY).usage.input_tokens > result.usage.input_tokens
    choice = {"structured_outputs": {"choice": [f"Wait.{CALL}{CALL}"]}}
    mixed = list(
        ask.responses.create(input="Time?", tools=[NOW], stream=True, extra_body=choice, model="tiny", temperature=0)
    )
    assert event_types(mixed)[2:] == [
        *MESSAGE_EVENTS,
        "output_item.done",
        *[*CALL_EVENTS, "output_item.done"] * 2,
        "completed",
    ]
    whole = ask.responses.create(input="Time?", tools=[NOW], extra_body=choice, model="tiny", temperature=0)
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    assert whole.output_text == "Wait." == mixed[-1].response.output_text
    assert len({item.id for item in whole.output}) == len({item.call_id for item in whole.output[1:]}) + 1 == 3


def test_a_format(ask: "openai.OpenAI") -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "name": "weather", "schema": SHAPE, "strict": True}
    result = ask.responses.create(
        model="tiny", input="Warm?", text={"format": form}, temperature=0, max_output_tokens=250
    )
    assert set(json.loads(result.output_text)) == {"warm"} and result.status == "completed"
    assert result.text.format.name == "weather"

    class Weather(pydantic.BaseModel):
        """The output that the model must generate."""

        model_config = pydantic.ConfigDict(extra="forbid")
        warm: bool

    read = ask.responses.parse(model="tiny", input="Warm?", text_format=Weather, temperature=0, max_output_tokens=250)
    assert isinstance(read.output_parsed, Weather)
    choice = {"structured_outputs": {"choice": ["yes"]}}
    with ask.responses.stream(model="tiny", input="Yes?", extra_body=choice) as stream:
        whole = stream.get_final_response()
    assert whole.status == "completed" and whole.output_text == "yes"


def test_asynchronous(address: str) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=300) as client:
            whole = await client.responses.create(input="the lazy dog", **GREEDY)
            stream = await client.responses.create(input="the lazy dog", stream=True, **GREEDY)
            text = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return whole.output_text, "".join(text)

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_refusals(ask: "openai.OpenAI") -> None:
    user = {"role": "user", "content": "hi"}
    file = {"type": "input_image", "file_id": "file-1"}
    wrong: dict[str, dict[str, Any]] = {
        "There is no response 'resp_1'": {"previous_response_id": "resp_1"},
        "send the whole conversation": {"conversation": "conv_1"},
        "use `stream`": {"background": True},
        "truncation: Input should be": {"truncation": "middle"},
        "list is empty": {"input": []},
        "input.1: items of type 'item_reference'": {"input": [user, {"type": "item_reference", "id": "msg_1"}]},
        "input.0: call_id": {"input": [{"type": "function_call_output", "output": "x"}]},
        "input.0: content": {"input": [{"role": "user"}]},
        "input.0: items of type": {"input": [{"type": ["message"], "role": "user", "content": "hi"}]},
        "no files are kept": {"input": [{"role": "user", "content": [file]}]},
        "Unknown part type": {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]},
        "arguments must be a text": {
            "input": [{"type": "function_call", "call_id": "a", "name": "now", "arguments": {}}]
        },
        "each must be": {"tools": [{"type": "web_search"}]},
        "`tools` must be set": {"tool_choice": "required"},
        "must be none, auto": {"tool_choice": {"type": "web_search"}, "tools": [NOW]},
        "needs `schema`": {"text": {"format": {"type": "json_schema", "name": "x"}}},
        "whose type is one of": {"text": {"format": {"type": "xml"}}},
        "max_output_tokens": {"max_output_tokens": 0},
        "maximum context length": {"max_output_tokens": 10**6},
    }
    for words, more in wrong.items():
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=words):
                ask.responses.create(**{"model": "tiny", "input": "hi", "stream": stream, **more})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask.responses.create(model="gpt-4", input="hi")
    for late in (ask.responses.retrieve, ask.responses.cancel, ask.responses.delete, ask.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="There is no response 'resp_1'"):
            late("resp_1")
    assert ask.responses.create(input="hi", **GREEDY).output_text


def test_a_stored_response_is_continued(ask: "openai.OpenAI") -> None:
    first = ask.responses.create(input="the lazy dog", instructions="Be brief.", **GREEDY)
    assert first.store and ask.responses.retrieve(first.id) == first
    second = ask.responses.create(input="And now?", previous_response_id=first.id, **GREEDY)
    turns = [{"role": "user", "content": "the lazy dog"}, *first.output, {"role": "user", "content": "And now?"}]
    whole = ask.responses.create(input=turns, store=False, **GREEDY)
    assert second.output_text == whole.output_text and second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id and not whole.store
    *_, last = ask.responses.create(input="Why?", previous_response_id=second.id, stream=True, **GREEDY)
    assert ask.responses.retrieve(last.response.id) == last.response
    assert last.response.usage.input_tokens > second.usage.input_tokens
    ask.responses.delete(first.id)
    for gone in (first.id, whole.id):
        with pytest.raises(openai.NotFoundError, match="There is no response"):
            ask.responses.retrieve(gone)
    assert ask.responses.create(input="Why?", previous_response_id=second.id, **GREEDY).output_text
    with pytest.raises(openai.BadRequestError, match=r"input\.0: content"):
        ask.responses.create(input=[{"role": "user"}], previous_response_id=second.id, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="in the background"):
        ask.responses.cancel(second.id)


def test_calls_of_a_stored_response_are_answered(ask: "openai.OpenAI") -> None:
    pytest.importorskip("llguidance")
    forced: Any = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}
    first = ask.responses.create(input="Is it warm?", **forced, **GREEDY | {"max_output_tokens": 60})
    [call] = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    given = {"tools": [WEATHER], **GREEDY}
    second = ask.responses.create(input=[output], previous_response_id=first.id, **given)
    turns = [{"role": "user", "content": "Is it warm?"}, call, output]
    assert second.usage.input_tokens == ask.responses.create(input=turns, **given).usage.input_tokens


def test_the_store_is_bounded(make_client: Callable[..., TestClient]) -> None:
    client, without = make_client(store_mb=0.008, keys=("one", "two")), make_client(store_mb=0)

    def respond(text: str, key: str = "one", **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        response = client.post("/v1/responses", json={"input": text, **GREEDY, **body}, headers=headers)
        return response.json()

    def is_there(response: Any, key: str = "one") -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return client.get(f"/v1/responses/{response['id']}", headers=headers).status_code == 200

    first = respond("the lazy dog")
    assert is_there(first) and not is_there(first, "two"), "responses belong to their key"
    later = [respond("the lazy dog") for _ in range(9)]
    assert not is_there(first) and is_there(later[-1]), "the oldest makes room"
    large = respond("the lazy dog", instructions="a", metadata={"a": "b" * 9000})
    assert large["store"] is False and not is_there(large)
    named = respond("a", request_id="same")
    assert named["id"] == "resp_same" and "is stored" in respond("b", request_id="same")["error"]["message"]
    assert respond("b", "two", request_id="same")["id"] == "resp_same"
    ids = [
        client.post(
            "/v1/responses", json={"input": "a", **GREEDY}, headers={"Authorization": "Bearer one", "X-Request-Id": "x"}
        ).json()["id"]
        for _ in range(2)
    ]
    assert ids[0] == "resp_x" != ids[1], "no stored response is overwritten"
    plain = without.post("/v1/responses", json={"input": "a", **GREEDY})
    assert plain.status_code == 200 and plain.json()["store"] is False
    refused = without.post("/v1/responses", json={"input": "a", "store": True, **GREEDY})
    assert refused.status_code == 400 and "MMJAX_RESPONSES_STORE_MB" in refused.json()["error"]["message"]
    assert client.get("/v1/responses/resp_same?stream=true", headers={"Authorization": "Bearer one"}).status_code == 400


def test_truncation(ask: "openai.OpenAI") -> None:
    """The length of the model is 384 tokens."""
    turns = []
    for i in range(12):
        turns += [{"role": "user", "content": f"{i} " + "the lazy dog " * 5}, {"role": "assistant", "content": "a"}]
    turns.append({"role": "user", "content": "And now?"})
    given = {"instructions": "Be brief.", **GREEDY}
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask.responses.create(input=turns, **given)
    whole = ask.responses.create(input=turns, truncation="auto", **given)
    assert whole.truncation == "auto"
    short, shorter = (
        ask.responses.create(input=turns[start:], **given).usage.input_tokens
        for start in (len(turns) - 5, len(turns) - 3)
    )
    assert short <= whole.usage.input_tokens <= 384 - 8
    assert whole.usage.input_tokens + (short - shorter) > 384 - 8, "as few turns as possible are left out"
    *_, last = ask.responses.create(input=turns, truncation="auto", stream=True, **given)
    assert last.response.usage.input_tokens == whole.usage.input_tokens
    for too_long in ("the lazy dog " * 300, "long " * 3000):
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            ask.responses.create(input=too_long, truncation="auto", **given)


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}", "id": "fc_1"}
    given = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
        call,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "noon"},
        call,
    ]
    system, early, output, late = messages_of(given, None)
    assert system == {"role": "system", "content": "Be brief."}
    assert [made["id"] for made in early["tool_calls"]] == ["1", "2"] and early["content"][0]["text"] == "Wait."
    assert output == {"role": "tool", "tool_call_id": "1", "content": "noon"}
    assert late["role"] == "assistant" and late["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert "tool_calls" not in given[1], "the request is not modified"


def test_events_are_named(client: TestClient) -> None:
    body = {"input": "the lazy dog", "stream": True, **GREEDY}
    blocks = client.post("/v1/responses", json=body).text.rstrip("\n").split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert blocks[-1].startswith("event: response.incomplete\n")


def test_a_failure_is_the_last_event(ask: "openai.OpenAI", served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = served.stream

    async def broken(request: Any) -> AsyncIterator[Any]:
        async for delta in plain(request):
            yield delta
            raise EngineDeadError("no device")

    monkeypatch.setattr(served, "stream", broken)
    events = list(ask.responses.create(input="the lazy dog", stream=True, **GREEDY))
    assert event_types(events) == ["created", "in_progress", *MESSAGE_EVENTS[:3], "failed"]
    assert events[-1].response.status == "failed" and events[-1].response.error.message == "no device"
    wait_until(lambda: served.open == 0 and served.load() == (0, 0, 0), "its blocks are free", 10)
