"""Checks before every route: keys, sizes, content types, the queue; and the headers of responses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

Make = Callable[..., TestClient]
ASK = {"prompt": "the", "max_tokens": 1}


def test_keys(make_client: Make) -> None:
    guarded = make_client(keys=("first", "second"))
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic first"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer first"}, 200),
        ({"authorization": "bearer second"}, 200),
    ):
        response = guarded.post("/v1/completions", json=ASK, headers=headers)
        assert response.status_code == status
        if status == 401:
            assert response.json() == {"error": "Unauthorized"}
    for path in ("/v1/models", "/v1/nothing"):
        assert guarded.get(path).status_code == 401
    for path in ("/tokenize", "/generate"):
        assert guarded.post(path, json={"prompt": "a", "prompts": "a"}).status_code == 401
    for path in ("/health", "/metrics", "/version", "/load", "/"):
        assert guarded.get(path).status_code == 200


def test_a_path_prefix_does_not_bypass_the_key(make_client: Make) -> None:
    app = make_client(keys=("key",)).app
    guarded = TestClient(app, root_path="/api")
    for path in ("/api/v1/models", "/v1/models", "/api/tokenize"):
        assert guarded.get(path).status_code == 401
    assert guarded.get("/api/v1/models", headers={"authorization": "Bearer key"}).status_code == 200
    assert guarded.get("/api/health").status_code == 200


def test_sizes(make_client: Make) -> None:
    small = make_client(max_body_mb=0.001)
    assert small.post("/v1/completions", json=ASK).status_code == 200
    large = b'{"prompt": "' + b"a" * 2000 + b'"}'

    def pieces() -> Iterator[bytes]:
        yield large[:1000]
        yield large[1000:]

    for content in (large, pieces()):
        response = small.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413, response.text
        assert "--max-body-mb" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_types(client: TestClient, kind: str) -> None:
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_a_full_queue(make_client: Make) -> None:
    full = make_client(max_queue=0)
    response = full.post("/v1/completions", json=ASK)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert full.get("/health").status_code == 200


def test_request_ids(make_client: Make) -> None:
    with_headers = make_client(request_id_headers=True)
    assert with_headers.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert len(with_headers.get("/health", headers={"x-request-id": "x" * 999}).headers["x-request-id"]) == 32
    assert "x-request-id" not in make_client().get("/health").headers


def test_other_origins(make_client: Make) -> None:
    ask: dict[str, Any] = {"origin": "http://page", "access-control-request-method": "POST"}
    guarded = make_client(keys=("key",))
    assert guarded.options("/v1/completions", headers=ask).status_code == 200
    assert guarded.post("/v1/completions", json=ASK, headers=ask).headers["access-control-allow-origin"] == "*"
    assert make_client(origins=("http://home",)).options("/v1/completions", headers=ask).status_code == 400


def test_the_log_has_one_line_per_request_with_its_id(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mmjax")
    result = client.post("/v1/completions", json=ASK, headers={"x-request-id": "mine-7"}).json()
    assert result["id"] == "cmpl-mine-7"
    client.get("/v1/no%0Asuch")
    client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "mmjax.serve.middleware"]
    assert len(lines) == 2
    assert "POST /v1/completions 200 in" in lines[0] and lines[0].endswith("request mine-7")
    assert "GET /v1/no%0Asuch 404 in" in lines[1]
