"""Bugs planted at each stage of a request: the response is a 500, the bug is logged, and other requests are not
affected."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pytest
from fastapi.testclient import TestClient

from api_server import sse_events
from mmjax import AsyncLLM
from mmjax.chat import ChatRenderer
from mmjax.engine.logits.structured_output import StructuredOutput
from mmjax.outputs.completion import CompletionState
from mmjax.outputs.request import GenerateRequest, PoolingRequest
from prompts import base64_wav, image_url_part, random_chord, random_image, user_messages

Json = dict[str, Any]
Plant = Callable[[pytest.MonkeyPatch, AsyncLLM, Callable[..., Any]], None]
POISON = 66_666  # the seed of the request that triggers the bug
FAULTS = (
    ValueError, TypeError, OverflowError, NotImplementedError, RecursionError, KeyError, jinja2.TemplateError,
)  # fmt: skip
SECRET = "planted in secret"
HELLO: Json = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 4, "temperature": 0}
LONG: Json = {**HELLO, "max_tokens": 60, "ignore_eos": True, "stream": True}


def in_processor(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    patch.setattr(engine.llm.model.input_processor.processor, "process_item", fail)


def in_template(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    plain = ChatRenderer.render

    def render(self: ChatRenderer, messages: Any, options: Any) -> Any:
        return fail() if "poison" in str(messages) else plain(self, messages, options)

    patch.setattr(ChatRenderer, "render", render)


def in_tokenizer(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    tokenizer = engine.llm.model.tokenizer
    assert tokenizer is not None
    plain = tokenizer.encode

    def encode(text: str, *options: Any, **more: Any) -> Any:
        return fail() if "poison" in text else plain(text, *options, **more)

    patch.setattr(tokenizer, "encode", encode)


def in_start(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    plain = CompletionState.__init__

    def init(self: CompletionState, seq: Any, *more: Any) -> None:
        _ = fail() if seq.params.seed == POISON else plain(self, seq, *more)

    patch.setattr(CompletionState, "__init__", init)


def in_constraint(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    plain, calls = StructuredOutput.bias_row, iter(range(9))

    def bias_row(self: StructuredOutput, output_ids: Any) -> Any:
        return fail() if next(calls) > 1 else plain(self, output_ids)

    patch.setattr(StructuredOutput, "bias_row", bias_row)


def in_output(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    plain = CompletionState.take

    def take(self: CompletionState, *result: Any) -> None:
        _ = fail() if self.seq.params.seed == POISON else plain(self, *result)

    patch.setattr(CompletionState, "take", take)


def in_request_output(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    plain = GenerateRequest.output

    def output(self: GenerateRequest) -> Any:
        return fail() if self.states[0].seq.params.seed == POISON else plain(self)

    patch.setattr(GenerateRequest, "output", output)


def in_route(patch: pytest.MonkeyPatch, engine: AsyncLLM, fail: Callable[..., Any]) -> None:
    from mmjax.serve import chat

    plain = chat.usage

    def usage(prompt: int, made: int, cached: int | None = None) -> Json:
        return fail() if made == 3 else plain(prompt, made, cached)

    patch.setattr(chat, "usage", usage)


POISONED: Json = {**HELLO, "messages": [{"role": "user", "content": "poison"}]}
SEEDED: Json = {**HELLO, "temperature": 1, "seed": POISON, "ignore_eos": True}
PLANTED: dict[str, tuple[Plant, Json]] = {
    "processor": (in_processor, {**HELLO, "messages": user_messages(image_url_part(random_image(1)), "What is this?")}),
    "template": (in_template, POISONED),
    "tokenizer": (in_tokenizer, POISONED),
    "start": (in_start, SEEDED),
    "constraint": (in_constraint, {**HELLO, "structured_outputs": {"regex": "[ab]{9}"}}),
    "output": (in_output, SEEDED),
    "answer": (in_request_output, {**SEEDED, "n": 2}),
    "route": (in_route, {**HELLO, "max_tokens": 3, "ignore_eos": True}),
}


@pytest.fixture(autouse=True)
def empty_cache(served: AsyncLLM) -> None:
    """Empty the cache of processed media, so that the processor must run."""
    served.llm.model.input_processor.cache.clear()


@pytest.fixture
def others(client: TestClient) -> Iterator[None]:
    """A long stream of another request, whose text must be the same as without the bug."""
    expected = "".join(_texts(client.post("/v1/chat/completions", json=LONG)))
    texts: list[str] = []
    began = threading.Event()

    def listen() -> None:
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            began.set()
            response.read()
            texts.extend(_texts(response))

    listener = threading.Thread(target=listen)
    listener.start()
    assert began.wait(60)
    yield
    listener.join(60)
    assert "".join(texts) == expected != ""


def _texts(response: Any) -> list[str]:
    return [choice["delta"].get("content", "") for event in sse_events(response) for choice in event["choices"]]


def raises(error: type[Exception]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error(SECRET)

    return fail


def check_fault(text: str, request_id: str, error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    """The response has only the request's id; the log has the id, the exception and its traceback."""
    assert f"under request {request_id}" in text and SECRET not in text and error.__name__ not in text
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR and request_id in r.getMessage()]
    assert record.exc_info is not None
    found, chain = record.exc_info[1], []
    while found is not None:
        chain.append(type(found))
        found = found.__cause__
    assert error in chain and record.exc_info[2] is not None


@pytest.mark.parametrize("phase", PLANTED)
def test_a_bug_is_logged_and_other_requests_are_answered(
    phase: str, client: TestClient, served: AsyncLLM, others: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plant, body = PLANTED[phase]
    caplog.set_level("INFO", logger="mmjax")
    for error in FAULTS if phase in ("processor", "output") else FAULTS[:1]:
        with monkeypatch.context() as patch:
            plant(patch, served, raises(error))
            name = f"bug-in-{phase}-{FAULTS.index(error)}"
            response = client.post("/v1/chat/completions", json=body, headers={"x-request-id": name})
            assert response.status_code == 500, response.text
            fault = response.json()["error"]
            assert (fault["type"], fault["code"], fault["param"]) == ("InternalServerError", 500, None)
            check_fault(response.text, name, error, caplog)
            assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
    served.check()
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("phase", ["start", "output", "answer", "constraint"])
def test_a_bug_after_the_start_of_a_stream_is_its_last_event(
    phase: str, client: TestClient, served: AsyncLLM, others: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plant, body = PLANTED[phase]
    plant(monkeypatch, served, raises(ValueError))
    name = f"bug-in-stream-{phase}"
    response = client.post("/v1/chat/completions", json={**body, "stream": True}, headers={"x-request-id": name})
    last = sse_events(response)[-1]
    assert last["error"]["code"] == 500
    check_fault(json.dumps(last), name, ValueError, caplog)
    assert client.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_a_bug_in_every_route(
    client: TestClient, speech_client: TestClient, vector_client: TestClient, served: AsyncLLM, listening: AsyncLLM,
    pooling: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    picture = image_url_part(random_image(7))["image_url"]["url"]
    prompt = {"prompt": "What is <image>?", "multi_modal_data": {"image": picture}}
    messages = user_messages(image_url_part(random_image(7)), "What is this?")
    inputs = [{"role": "user", "content": [{"type": "input_image", "image_url": picture}]}]
    sound = {"file": ("a.wav", b"RIFF")}
    asks: list[tuple[TestClient, str, Json]] = [
        (client, "/v1/chat/completions/batch", {"json": {"messages": [messages, messages]}}),
        (client, "/v1/responses", {"json": {"input": inputs}}),
        (client, "/generate", {"json": {"prompts": [prompt, "Hi"]}}),
        (client, "/tokenize", {"json": {"messages": messages}}),
        (vector_client, "/v1/embeddings", {"json": {"messages": messages}}),
        (speech_client, "/generate", {"json": {"prompts": {"prompt": "", "multi_modal_data": {"audio": sound_url()}}}}),
    ]
    for engine in (served, listening, pooling):
        in_processor(monkeypatch, engine, raises(ValueError))
    monkeypatch.setattr("mmjax.entrypoints.transcription.load", raises(ValueError))
    asks += [(speech_client, f"/v1/audio/{name}", {"files": sound}) for name in ("transcriptions", "translations")]
    for number, (api, path, given) in enumerate(asks):
        response = api.post(path, **given, headers={"x-request-id": f"route-{number}"})
        assert response.status_code == 500, (path, response.text)
        check_fault(response.text, f"route-{number}", ValueError, caplog)


def sound_url() -> str:
    return f"data:audio/wav;base64,{base64_wav(random_chord(3, 0.3))}"


def test_a_bug_in_a_stream_of_responses(
    client: TestClient, served: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_output(monkeypatch, served, raises(ValueError))
    body = {"input": "Hi", "max_output_tokens": 4, "temperature": 1, "seed": POISON, "stream": True}
    response = client.post("/v1/responses", json=body, headers={"x-request-id": "bug-in-items"})
    last = json.loads(response.text.strip().split("\n\n")[-1].partition("data: ")[2])
    assert last["type"] == "response.failed"
    check_fault(last["response"]["error"]["message"], "bug-in-items", ValueError, caplog)


def test_a_bug_in_an_embedding(
    vector_client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PoolingRequest, "output", raises(ValueError))
        response = vector_client.post("/v1/embeddings", json={"input": "Hi"}, headers={"x-request-id": "bug-in-vector"})
    assert response.status_code == 500
    check_fault(response.text, "bug-in-vector", ValueError, caplog)
    assert vector_client.post("/v1/embeddings", json={"input": "Hi"}).status_code == 200


def test_a_bug_has_the_headers_of_every_response(
    make_client: Callable[..., TestClient], served: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_tokenizer(monkeypatch, served, raises(ValueError))
    headers = {"x-request-id": "mine", "origin": "http://page"}
    response = make_client(request_id_headers=True).post("/v1/chat/completions", json=POISONED, headers=headers)
    assert response.status_code == 500 and response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == "*"
