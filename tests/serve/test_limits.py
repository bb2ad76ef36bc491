"""The limits of one request, and the environment variables that set them."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmjax.cli.main import _model_command, server_settings
from mmjax.types import ValidationError

Make = Callable[..., TestClient]
STOPS = ["one", "two", "three", "four"]


def post_all(client: TestClient, stop: Any) -> list[Any]:
    """The response of every route that takes stop strings."""
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    return [
        client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1, "stop": stop}),
        client.post("/v1/chat/completions", json={**talk, "max_tokens": 1, "stop": stop}),
        client.post("/v1/chat/completions", json={**talk, "max_tokens": 1, "stop": stop, "stream": True}),
        client.post("/generate", json={"prompts": "Hi", "sampling_params": {"max_tokens": 1, "stop": stop}}),
    ]


def test_stop_strings(client: TestClient, make_client: Make) -> None:
    assert {response.status_code for response in post_all(client, STOPS)} == {200}
    for response in post_all(client, [*STOPS, "five"]):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "stop" and "at most 4 strings, got 5" in error["message"]
    assert {response.status_code for response in post_all(make_client(max_stops=5), [*STOPS, "five"])} == {200}
    assert {response.status_code for response in post_all(make_client(max_stops=0), STOPS * 9)} == {200}


def test_prompts(make_client: Make) -> None:
    small = make_client(max_prompts=2)
    for path, name in (("/v1/completions", "prompt"), ("/generate", "prompts")):
        assert small.post(path, json={name: ["a", "b"], "max_tokens": 1}).status_code == 200
        response = small.post(path, json={name: ["a", "b", "c"], "max_tokens": 1})
        assert response.status_code == 400 and "At most 2 prompts" in response.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["MMJAX", "VLLM"])
def test_variables(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def limits() -> tuple[int, int]:
        chosen = server_settings(_model_command("serve", ["X"]))
        return chosen.max_stops, chosen.max_prompts

    assert limits() == (4, 1024)
    monkeypatch.setenv(f"{prefix}_MAX_STOP_STRINGS", "64")
    monkeypatch.setenv(f"{prefix}_MAX_COMPLETION_PROMPTS", "3")
    assert limits() == (64, 3)
    monkeypatch.setenv(f"{prefix}_MAX_STOP_STRINGS", "many")
    with pytest.raises(ValidationError, match="MAX_STOP_STRINGS must be a number"):
        limits()
