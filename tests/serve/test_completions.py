"""Completions of text and of token ids, complete and streamed."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from api_server import sse_events
from mmjax import AsyncLLM


def complete(client: TestClient, prompt: Any, **body: Any) -> Any:
    given = {"prompt": prompt, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **body}
    return client.post("/v1/completions", json=given)


def test_prompts_of_every_form(client: TestClient, served: AsyncLLM) -> None:
    tokens = client.post("/tokenize", json={"prompt": "the lazy dog"}).json()["tokens"]
    one = complete(client, "the lazy dog").json()
    assert one["object"] == "text_completion" and one["usage"]["completion_tokens"] == 6
    text = one["choices"][0]["text"]
    assert complete(client, tokens).json()["choices"][0]["text"] == text
    both = complete(client, ["the lazy dog", "a"]).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == text
    assert complete(client, [tokens, tokens]).json()["choices"][1]["text"] == text
    assert both["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"]


def test_several_choices_of_several_prompts(client: TestClient) -> None:
    body = {"n": 2, "temperature": 1.2, "seed": 3, "max_tokens": 4}
    whole = complete(client, ["the", "a"], **body).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    chunks = sse_events(complete(client, ["the", "a"], **body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["completion_tokens"] == 16 and chunks[-1]["choices"] == []
    texts = ["", "", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole]


def test_echo_and_log_probabilities(client: TestClient) -> None:
    [choice] = complete(client, "the dog", echo=True, logprobs=2).json()["choices"]
    report = choice["logprobs"]
    assert choice["text"].startswith("the dog")
    assert "".join(report["tokens"]) == choice["text"]
    assert report["token_logprobs"][0] is None and all(value <= 0 for value in report["token_logprobs"][1:])
    assert all(1 <= len(tops) <= 3 for tops in report["top_logprobs"][1:])  # tokens with the same text share a key
    assert report["text_offset"][:2] == [0, len(report["tokens"][0])]
    assert sse_events(complete(client, "the dog", echo=True, stream=True))[0]["choices"][0]["text"] == "the dog"


@pytest.mark.parametrize("as_ids", [False, True])
def test_text_offsets(client: TestClient, as_ids: bool) -> None:
    """In streams, after an echo, and where several tokens make one character."""
    smileys = {"max_tokens": 30, "ignore_eos": False, "structured_outputs": {"choice": ["a😀b😀c"]}}
    body = {"logprobs": 1, "echo": True, "return_tokens_as_token_ids": as_ids, **smileys}
    pytest.importorskip("llguidance")
    for prompt in ("the dög", client.post("/tokenize", json={"prompt": "the dög"}).json()["tokens"]):
        [whole] = complete(client, prompt, **body).json()["choices"]
        chunks = [event["choices"][0] for event in sse_events(complete(client, prompt, **body, stream=True))]
        offsets = [offset for chunk in chunks for offset in (chunk["logprobs"] or {}).get("text_offset", ())]
        assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == "the döga😀b😀c"
        reported = whole["logprobs"]["text_offset"]
        assert reported[0] == 0 and reported[-len(offsets) :] == offsets and reported == sorted(reported)
        for sign in "abc":
            assert whole["text"].index(sign) in offsets
        assert offsets[0] == len("the dög") and max(offsets) <= len(whole["text"])
        assert sum(offset == whole["text"].index("😀") for offset in offsets) > 1, "a character of several tokens"


def test_only_the_prompt(client: TestClient) -> None:
    body = {"echo": True, "logprobs": 1, "max_tokens": 0, "n": 2, "temperature": 1}
    answer = complete(client, ["a b", "the dog"], **body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a b", "a b", "the dog", "the dog"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert all("".join(choice["logprobs"]["tokens"]) == choice["text"] for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 0
    chunks = sse_events(complete(client, "a b", stream=True, stream_options={"include_usage": True}, **body))
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["a b", "a b", "", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[2:-1]] == ["length"] * 2
    assert chunks[-1]["usage"]["completion_tokens"] == 0
    refused = complete(client, "a b", max_tokens=0)
    assert refused.status_code == 400 and "with `echo`" in refused.json()["error"]["message"]


def test_refusals(client: TestClient) -> None:
    cases: list[tuple[Any, dict[str, Any], int]] = [
        ([], {}, 400),
        ("", {}, 400),
        (["a", ""], {}, 400),
        ([10**7], {}, 400),
        (["a"] * 1025, {}, 400),
        ("a", {"suffix": "b"}, 400),
        ("a", {"logprobs": -2}, 400),
        ("a", {"model": "other"}, 404),
        ("a", {"max_tokens": 10**6}, 400),
        ({"prompt": "a"}, {}, 400),
    ]
    for prompt, more, status in cases:
        for stream in (False, True):
            response = complete(client, prompt, **more, stream=stream)
            assert response.status_code == status, (prompt, response.text)
            assert response.json()["error"]["code"] == status


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ({"top_k": 10**12}, 200),
        ({"top_k": 2**31}, 200),
        ({"min_tokens": 10**12, "max_tokens": None}, 200),
        ({"stop_token_ids": [2**31, -1, -(10**12), 10**20]}, 200),
        ({"seed": 2**63 - 1, "n": 3}, 200),
        ({"seed": 2**63}, 400),
        ({"temperature": 1e300}, 400),
        ({"temperature": 1e38}, 200),
        ({"temperature": 1e-300}, 200),
        ({"repetition_penalty": 1e300}, 400),
        ({"repetition_penalty": 1e38}, 200),
        ({"repetition_penalty": 1e-300}, 200),
        ({"top_p": 1e-300}, 200),
        ({"min_p": 1e-300}, 200),
        ({"logit_bias": {"5": 1e300}}, 400),
        ({"logit_bias": {"99999999999999": 1}}, 400),
        ({"allowed_token_ids": [10**20]}, 400),
        ({"logprobs": 10**12}, 400),
        ({"truncate_prompt_tokens": 10**20}, 200),
        ({"truncation_side": "top"}, 400),
        ({"n": 10**20}, 400),
        ({"prompt": [2**40]}, 400),
        ({"prompt": [-1]}, 400),
    ],
)
@pytest.mark.filterwarnings("ignore:.*too small to compute with", "ignore:overflow encountered")
def test_numbers_beyond_the_range_of_the_device(client: TestClient, field: dict[str, Any], status: int) -> None:
    given = {"temperature": 1.0, "max_tokens": 3, **field}
    response = complete(client, given.pop("prompt", "the lazy dog"), **given)
    assert response.status_code == status, response.text
    assert complete(client, "a").status_code == 200


@pytest.mark.parametrize(("side", "used"), [("left", [4, 5]), ("right", [1, 2])])
def test_a_part_of_the_prompt(client: TestClient, side: str, used: list[int]) -> None:
    part = complete(client, [1, 2, 3, 4, 5], truncate_prompt_tokens=2, truncation_side=side, echo=True).json()
    alone = complete(client, used, echo=True).json()
    assert part["choices"] == alone["choices"] and part["usage"] == alone["usage"]


@pytest.mark.parametrize("prompt", ["the lazy dog " * 3000, [5] * 3000, {"messages": "dog " * 3000}])
def test_a_prompt_that_is_too_long(client: TestClient, prompt: Any) -> None:
    if isinstance(prompt, dict):
        messages = [{"role": "user", "content": prompt["messages"]}]
        response = client.post("/v1/chat/completions", json={"messages": messages})
    else:
        response = complete(client, prompt)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("This model's maximum context length is ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "model": "\\ud800"}', 404),
        (b'{"prompt": "a", "stop": "\\ud800", "max_tokens": 1}', 200),
        (b'{"prompt": "a", "bad_words": ["\\ud800"]}', 400),
        (b'{"prompt": "a", "cache_salt": "\\ud800"}', 400),
    ],
)
def test_lone_surrogates(client: TestClient, sent: bytes, status: int) -> None:
    response = client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
