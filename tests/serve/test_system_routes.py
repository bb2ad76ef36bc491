"""Tokenization, POST /generate, models, health, metrics, limits."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from mmjax.serve.context import json_response
from prometheus_client.parser import text_string_to_metric_families

from mmjax import AsyncLLM
from prompts import base64_image, image_url_part, random_image, user_messages


def test_tokens_round_trip(client: TestClient) -> None:
    result = client.post("/tokenize", json={"prompt": "the lazy dog", "return_token_strs": True}).json()
    assert result["count"] == len(result["tokens"]) == len(result["token_strs"]) and result["max_model_len"] == 384
    assert client.post("/detokenize", json={"tokens": result["tokens"]}).json() == {"prompt": "the lazy dog"}
    for wrong in ([10**9], [-1], "no"):
        assert client.post("/detokenize", json={"tokens": wrong}).status_code == 400


def test_tokens_of_a_conversation_include_its_images(client: TestClient) -> None:
    messages = user_messages(image_url_part(random_image(1)), "What is this?")
    result = client.post("/tokenize", json={"messages": messages}).json()
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert result["count"] == answer["usage"]["prompt_tokens"]
    assert client.post("/tokenize", json={"messages": messages, "prompt": "both"}).status_code == 400
    assert client.post("/tokenize", json={"messages": messages, "chat_template": "{{ 1 }}"}).status_code == 400


def test_generate(client: TestClient, served: AsyncLLM) -> None:
    seen = {
        "prompt": "<image>What is this?",
        "multi_modal_data": {"image": f"data:image/png;base64,{base64_image(random_image(1))}"},
    }
    params = {"temperature": 0, "max_tokens": 3, "logprobs": 1, "logit_bias": {"5": 1.5}}
    outputs = client.post("/generate", json={"prompts": [seen, "the", [5, 6]], "sampling_params": params}).json()
    assert [output["outputs"][0]["index"] for output in outputs] == [0, 0, 0]
    assert len(outputs[0]["prompt_token_ids"]) > 6 and outputs[2]["prompt_token_ids"] == [5, 6]
    [alone] = client.post("/generate", json={"prompts": [5, 6], "sampling_params": params}).json()
    assert alone["outputs"][0]["token_ids"] == outputs[2]["outputs"][0]["token_ids"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": [{"prompt": "<image>", "multi_modal_data": {"image": [[1, 2], [3, 4]]}}]},
        {"prompts": {"prompt": "<image>", "multi_modal_data": {"smell": "http://a/b"}}},
        {"prompts": {"prompt": "<image>", "multi_modal_data": {"image": "file:///etc/passwd"}}},
        {"prompts": ["the", {"prompt_token_ids": [10**8]}]},
        {"prompts": "the", "sampling_params": {"temprature": 1}},
        {"prompts": "the", "sampling_params": {"stop_token_ids": list(range(500))}},
        {"prompts": "the", "sampling_params": {"logit_bias": [1]}},
        {"prompts": "the", "sampling_params": {"logit_bias": {"x": 1}}},
        {"prompts": "the", "sampling_params": {"temperature": 10**400}},
        {"prompts": ["the"] * 1025},
        {},
    ],
)
def test_generate_refuses(client: TestClient, body: Any) -> None:
    response = client.post("/generate", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_models(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "alias"] and cards[0]["max_model_len"] == 384
    assert client.get("/v1/models/alias").json()["id"] == "alias"
    assert client.get("/v1/models/other").status_code == 404


def test_health_and_metrics(client: TestClient) -> None:
    for path in ("/health", "/ping", "/version", "/load", "/"):
        assert client.get(path).status_code == 200
    assert client.post("/ping").status_code == 200

    def metrics() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {m[1]: float(m[2]) for line in lines if (m := re.fullmatch(r"([\w:]+)\{.*\} (\S+)", line))}

    before = metrics()
    client.post("/v1/completions", json={"prompt": "the", "max_tokens": 5, "ignore_eos": True})
    after = metrics()
    assert after["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"] + 5
    assert after["vllm:e2e_request_latency_seconds_count"] == before["vllm:e2e_request_latency_seconds_count"] + 1
    assert after["vllm:num_requests_running"] == 0 and 0 <= after["vllm:kv_cache_usage_perc"] < 0.01


def test_what_gateways_read(client: TestClient, served: AsyncLLM) -> None:
    """The metrics by which the endpoint pickers of inference gateways choose a server, with true values."""

    def metrics() -> dict[str, Any]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {sample.name: sample for family in families for sample in family.samples}

    engine = served.model.engines[0]
    size = engine.block_pool.block_size
    body = {"prompt": [7] * (2 * size + 1), "max_tokens": 1, "cache_salt": "gateways"}
    before = metrics()
    assert [client.post("/v1/completions", json=body).status_code for _ in range(2)] == [200, 200]
    after = metrics()
    queries, hits = (
        after[name].value - before[name].value
        for name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    )
    assert (queries, hits) == (2 * (2 * size + 1), 2 * size)
    cache = after["vllm:cache_config_info"]
    assert cache.value == 1 and cache.labels["block_size"] == str(size)
    assert cache.labels["num_gpu_blocks"] == str(engine.block_pool.num_free)  # no request runs
    assert cache.labels["enable_prefix_caching"] == "True"
    assert after["vllm:num_requests_waiting"].value == 0
    assert after["vllm:gpu_cache_usage_perc"].value == after["vllm:kv_cache_usage_perc"].value
    adapters = after["vllm:lora_requests_info"]
    labels = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert adapters.labels == labels and adapters.value > before["vllm:lora_requests_info"].value


DEVELOPMENT = [
    ("POST", "/reset_mm_cache"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
    ("GET", "/tokenizer_info"),
    ("POST", "/v1/chat/completions/render"),
]


def test_caches_are_emptied_in_development_only(make_client: Any) -> None:
    plain, developing = make_client(), make_client(development=True)
    for path in ("/reset_mm_cache", "/reset_prefix_cache"):
        assert developing.post(path).status_code == 200
    for method, path in DEVELOPMENT:
        assert plain.request(method, path, json={} if method == "POST" else None).status_code == 404


def test_sleep(make_client: Any, served: AsyncLLM) -> None:
    client = make_client(development=True)
    body = {"prompt": "the lazy dog", "max_tokens": 4, "temperature": 0}
    before = client.post("/v1/completions", json=body).json()["choices"]
    for wrong in ("level=3", "level=a", "mode=now"):
        assert client.post(f"/sleep?{wrong}").status_code == 400
    assert client.post("/sleep?level=1").status_code == 200
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400 and "call wake_up first" in refused.json()["error"]["message"]
    assert client.post("/wake_up?tags=memory").status_code == 400
    assert client.post("/wake_up?tags=weights").status_code == 200
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    assert client.post("/wake_up").status_code == 200
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    assert client.post("/v1/completions", json=body).json()["choices"] == before


def test_profiles(make_client: Any, served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    client, calls = make_client(development=True), []

    def refuse() -> None:
        raise RuntimeError("No profile started")

    monkeypatch.setattr(served.llm, "start_profile", lambda: calls.append("start"))
    monkeypatch.setattr(served.llm, "stop_profile", lambda: calls.append("stop"))
    assert client.post("/start_profile").status_code == client.post("/stop_profile").status_code == 200
    assert calls == ["start", "stop"]
    monkeypatch.setattr(served.llm, "stop_profile", refuse)
    refused = client.post("/stop_profile")
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "No profile started"


def test_the_tokenizer_is_described(make_client: Any, served: AsyncLLM) -> None:
    info = make_client(development=True).get("/tokenizer_info").json()
    tokenizer = served.get_tokenizer()
    assert info["tokenizer_class"] == type(tokenizer).__name__ and info["chat_template"] == tokenizer.chat_template


def test_a_rendered_chat_can_be_generated(make_client: Any) -> None:
    client = make_client(development=True)
    body = {"messages": user_messages("the lazy dog"), "max_tokens": 4, "temperature": 0, "stop": ["zzz"]}
    rendered = client.post("/v1/chat/completions/render", json=body).json()
    chat = client.post("/v1/chat/completions", json=body).json()
    assert len(rendered["token_ids"]) == chat["usage"]["prompt_tokens"] and "the lazy dog" in rendered["prompt"]
    given = {"prompts": rendered["token_ids"], "sampling_params": rendered["sampling_params"]}
    [output] = client.post("/generate", json=given).json()
    assert output["outputs"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert client.post("/v1/chat/completions/render", json={"messages": []}).status_code == 400


def test_head_is_get_without_the_body(make_client: Any, address: str) -> None:
    client = make_client(keys=("sesame",))
    for path in ("/", "/health", "/metrics", "/version", "/openapi.json", "/docs"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b""
        if path != "/metrics":
            assert head.headers["content-length"] == get.headers["content-length"]
    assert client.head("/v1/models").status_code == 401 and client.head("/none").status_code == 401
    key = {"Authorization": "Bearer sesame"}
    assert client.head("/v1/models", headers=key).status_code == 200
    assert client.head("/none", headers=key).status_code == 404
    refused = client.head("/v1/completions", headers=key)
    assert refused.status_code == 405 and refused.content == b""
    with httpx.Client(base_url=address) as connection:  # over a socket, where a body would break the next response
        assert [connection.head("/version").status_code, connection.get("/version").status_code] == [200, 200]
        assert connection.head("/v1/models").content == b""


def test_routes_depend_on_the_model(client: TestClient, speech_client: TestClient, vector_client: TestClient) -> None:
    def routes(of: TestClient) -> set[str]:
        return {
            path for path in of.get("/openapi.json").json()["paths"] if path.startswith("/v1/") and "models" not in path
        }

    chats = {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/responses/{name}"}
    messages = {"/v1/messages", "/v1/messages/count_tokens"}
    assert routes(client) == {*chats, *messages, "/v1/completions"}
    assert routes(speech_client) == {"/v1/audio/transcriptions", "/v1/audio/translations"}
    assert routes(vector_client) == {"/v1/embeddings", "/v1/score", "/v1/rerank"}
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 404


def test_json_is_the_same_as_of_json_dumps() -> None:
    content = {"a": [], "b": [{"c": [1.5, None, True]}, {}], "d": {"ü": "日本\n\ud800"}, "e": [[1], [2]], "f": [1, "x"]}
    body = asyncio.run(json_response(content)).body.decode()
    assert json.loads(body) == {**content, "d": {"ü": "日本\n?"}} and "日本" in body


def test_the_tokenizer_has_limits(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": "a" * (1 << 20 | 1)}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [1] * (1 << 20 | 1)}).status_code == 400


def _nested(depth: int) -> Any:
    return {"a": _nested(depth - 1)} if depth else 1


def test_deeply_nested_bodies_are_refused(client: TestClient) -> None:
    deep = "[" * 5000 + "]" * 5000
    call = {"function": {"name": "f", "arguments": deep}}
    bodies = {
        "/v1/chat/completions": json.dumps({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}),
        "/v1/completions": f'{{"prompt": {deep}}}',
        "/generate": f'{{"prompts": {{"prompt": "a", "multi_modal_data": {{"image": {deep}}}}}}}',
    }
    level = json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "documents": [_nested(250)]})
    for path, body in [*bodies.items(), *((path, level) for path in ("/v1/chat/completions", "/tokenize"))]:
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], path
    assert client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).status_code == 200
