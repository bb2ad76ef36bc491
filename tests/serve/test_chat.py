"""Chat completions, complete and streamed."""

import base64
import io
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

HELLO = [{"role": "user", "content": "Hello there"}]


def image_data_url() -> str:
    """A small PNG as a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (200, 30, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(client: TestClient, **body: Any) -> Any:
    given = {"messages": HELLO, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **body}
    return client.post("/v1/chat/completions", json=given)


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_answer(client: TestClient) -> None:
    answer = chat(client).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["tool_calls"] == []
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8
    assert chat(client, model="alias").json()["choices"][0]["message"] == choice["message"]


def test_stream_has_the_same_text(client: TestClient) -> None:
    whole = chat(client, max_tokens=20).json()
    response = chat(client, max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert len(chunks) > 4
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_echo_of_the_message_that_is_continued(client: TestClient) -> None:
    goes_on = {"add_generation_prompt": False, "continue_final_message": True, "max_tokens": 4}
    for content in ("I am", [{"type": "text", "text": "I am"}]):
        messages = [*HELLO, {"role": "assistant", "content": content}]
        plain, echoed = (
            chat(client, messages=messages, echo=echo, **goes_on).json()["choices"][0]["message"]["content"]
            for echo in (False, True)
        )
        assert echoed == "I am" + plain != plain
        chunks = events(chat(client, messages=messages, echo=True, stream=True, **goes_on))
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == echoed
    assert chat(client, echo=True).json()["choices"] == chat(client).json()["choices"], "the last is the user's"


def test_usage_in_every_chunk(client: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for chunks in (
        events(chat(client, **options)),
        events(client.post("/v1/completions", json={"prompt": "the", "max_tokens": 8, "temperature": 0, **options})),
    ):
        made = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert made == sorted(made) and made[-1] == made[-2] > 0


def test_null_equals_a_missing_field(client: TestClient) -> None:
    from mmjax.serve.schema import ChatRequest

    result = chat(client).json()["choices"]
    given = {"messages", "temperature", "max_tokens", "ignore_eos"}
    unset = dict.fromkeys(set(ChatRequest.model_fields) - given)
    assert chat(client, **unset).json()["choices"] == result


def test_several_choices_and_log_probabilities(client: TestClient) -> None:
    body = {
        "n": 3,
        "temperature": 1.5,
        "top_k": -1,
        "top_p": 1.0,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 6,
    }
    whole = chat(client, **body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1
    for choice in whole["choices"]:
        reports = choice["logprobs"]["content"]
        assert len(reports) == 6 and all(len(report["top_logprobs"]) == 2 for report in reports)
        best = reports[0]["top_logprobs"]
        assert best[0]["logprob"] >= best[1]["logprob"]
    texts = {0: "", 1: "", 2: ""}
    counts = dict.fromkeys(texts, 0)
    for chunk in events(chat(client, **body, stream=True)):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        counts[choice["index"]] += len((choice["logprobs"] or {"content": []})["content"])
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole["choices"]]
    assert set(counts.values()) == {6}


def test_images(client: TestClient) -> None:
    parts = [{"type": "image_url", "image_url": {"url": image_data_url()}}, {"type": "text", "text": "What is this?"}]
    seen = chat(client, messages=[{"role": "user", "content": parts}]).json()
    unseen = chat(client, messages=[{"role": "user", "content": "What is this?"}]).json()
    assert seen["usage"]["prompt_tokens"] > unseen["usage"]["prompt_tokens"]


def test_the_server_works_after_refusals(client: TestClient) -> None:
    good = chat(client).json()["choices"]
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "gpt-4"}, 404, "does not exist"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": []}, 400, ""),
        ({"messages": [{"role": "user", "content": [broken]}]}, 400, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram", "hologram": 1}]}]}, 400, "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": 1}]}]}, 400, "video_url"),
        ({"stream_options": {"include_usage": True}}, 400, "stream=True"),
        ({"top_logprobs": 3}, 400, "logprobs"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 0, "n": 2}, 400, "n must be 1"),
        ({"max_tokens": 100_000}, 400, "maximum context length"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"chat_template": "{{ 1 }}"}, 400, "--trust-request-chat-template"),
        ({"tool_choice": "required"}, 400, "tools"),
        ({"tools": [{"name": "f"}]}, 400, "tools: each must be"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
        ({"cache_salt": ""}, 400, "cache_salt"),
        ({"stop": ["a"] * 100}, 400, "stop"),
        ({"mm_processor_kwargs": 3}, 400, "mm_processor_kwargs"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "maximum context length"),
    ]
    for change, status, words in cases:
        for stream in (False, True):
            change = {**change, "stream": stream} if "stream_options" not in change else change
            response = chat(client, **change)
            assert response.status_code == status, (change, response.text)
            error = response.json()["error"]
            assert error["code"] == status and words in error["message"], error
    assert (
        client.post("/v1/chat/completions", content="{", headers={"content-type": "application/json"}).status_code
        == 400
    )
    assert chat(client).json()["choices"] == good


def test_several_conversations_in_one_request(client: TestClient) -> None:
    talks = [[{"role": "user", "content": f"Count to {n}"}] for n in range(3)]
    parts = [{"type": "image_url", "image_url": {"url": image_data_url()}}, {"type": "text", "text": "What is this?"}]
    talks.append([{"role": "user", "content": parts}])
    body = {"messages": talks, "max_tokens": 5, "temperature": 0}
    result = client.post("/v1/chat/completions/batch", json=body).json()
    alone = [chat(client, messages=talk, max_tokens=5).json() for talk in talks]
    assert [choice["index"] for choice in result["choices"]] == [0, 1, 2, 3]
    for choice, one in zip(result["choices"], alone, strict=True):
        assert choice["message"] == one["choices"][0]["message"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert result["usage"][name] == sum(one["usage"][name] for one in alone)
    for wrong in ({"messages": []}, {"messages": talks[0]}, {"stream": True}, {"messages": [*talks, []]}):
        assert client.post("/v1/chat/completions/batch", json={**body, **wrong}).status_code == 400
    twice = client.post("/v1/chat/completions/batch", json={**body, "temperature": 1, "n": 2, "return_token_ids": True})
    assert [choice["index"] for choice in twice.json()["choices"]] == list(range(8))
    assert [len(ids) for ids in twice.json()["prompt_token_ids"]] == [one["usage"]["prompt_tokens"] for one in alone]


def test_the_bytes_of_tokens_are_their_own(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1, "max_tokens": 20}
    for more in ({}, {"return_tokens_as_token_ids": True}):
        given = {**body, **more, "structured_outputs": {"choice": ["x😀y"]}}
        [choice] = client.post("/v1/chat/completions", json=given).json()["choices"]
        content = choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).startswith("x😀y".encode())
        assert [240] in [entry["bytes"] for entry in content], "a part of a character"


def test_malformed_arguments_of_earlier_calls_are_passed_on(client: TestClient) -> None:
    def tokens(arguments: object) -> int:
        call = {"id": "c", "type": "function", "function": {"name": "w", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ]
        answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert tokens("not json") > 0 and tokens('{"a": 1') > 0 and tokens("") > 0


def test_base64_as_tools_write_it(client: TestClient) -> None:
    url = image_data_url()
    head, _, data = url.partition(",")
    broken = "\r\n".join(data[at : at + 76] for at in range(0, len(data), 76)) + "\n"
    texts = []
    for each in (url, f"{head},{broken}"):
        parts = [{"type": "image_url", "image_url": {"url": each}}, {"type": "text", "text": "What?"}]
        answer = chat(client, messages=[{"role": "user", "content": parts}], max_tokens=3)
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
