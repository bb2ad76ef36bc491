"""Bodies with fields that are not served, and bodies that are not JSON."""

import logging
import re

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_fields_that_are_not_served_are_told(
    client: TestClient, path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmjax.serve.schema._unserved", set())
    caplog.set_level("WARNING", "mmjax.serve.schema")
    monkeypatch.setattr(logging.getLogger("mmjax"), "propagate", True)
    body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a"}
    fields = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
    given = {fields[path]: body[fields[path]], "max_output_tokens" if "responses" in path else "max_tokens": 1}
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "best_of"):
        refused = client.post(path, json={**given, name: 7})
        error = refused.json()["error"]
        assert refused.status_code == 400 and f"{name} is not served" in error["message"] and error["param"] == name
    assert not caplog.records
    for _ in range(2):
        assert client.post(path, json={**given, "wings": 2, "guided_json": None, "best_of": 1}).is_success
    assert [record.getMessage() for record in caplog.records] == [
        "the field 'wings' of a request is not served, and has no effect"
    ]


def test_invalid_json_is_told_without_an_offset(client: TestClient) -> None:
    for text in ('{"messages": [', "{'a': 1}", "nonsense", '{"a": \x00}'):
        refused = client.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] is None
        assert error["message"].startswith("The body is not valid JSON: ") and not re.search(r"\d", error["message"])
