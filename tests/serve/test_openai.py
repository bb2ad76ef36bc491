"""Common clients: OpenAI's for Python, and LangChain's and LiteLLM's where they are installed."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api_server import client_over
from http_server import listening_server as on_a_port
from mmjax import AsyncLLM
from prompts import base64_wav, image_url_part, random_chord, random_image, user_messages

openai = pytest.importorskip("openai")

WAV = base64.b64decode(base64_wav(random_chord(1, 1.0)))


@pytest.fixture(scope="module")
def ask(address: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def hear(listening: AsyncLLM) -> Iterator["openai.OpenAI"]:
    with (
        on_a_port(client_over(listening).app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def vectors(pooling: AsyncLLM) -> Iterator["openai.OpenAI"]:
    with (
        on_a_port(client_over(pooling).app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


def test_conversations(ask: "openai.OpenAI") -> None:
    model = ask.models.list().data[0].id
    messages = user_messages(image_url_part(random_image(1)), "What is this?")
    whole = ask.chat.completions.create(model=model, messages=messages, max_completion_tokens=8, temperature=0)
    assert whole.usage.completion_tokens <= 8 and whole.choices[0].finish_reason in ("stop", "length")
    stream = ask.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"top_k": 5},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    result = ask.completions.create(model=model, prompt="the lazy", max_tokens=4, temperature=0)
    assert result.usage.completion_tokens <= 4


def test_many_at_once(address: str) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=300) as client:

            async def one(i: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=user_messages(f"Count to {i % 3}"), max_tokens=6, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(9))))

    texts = asyncio.run(all_of_them())
    assert texts[:3] == texts[3:6] == texts[6:]


def test_errors_have_the_clients_classes(ask: "openai.OpenAI") -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask.chat.completions.create(model="gpt-4", messages=user_messages("hi"))
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask.chat.completions.create(model="tiny", messages=user_messages("hi"), max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        ask.audio.transcriptions.create(model="tiny", file=("a.wav", WAV))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client, about its translations
def test_speech(hear: "openai.OpenAI") -> None:
    result = hear.audio.transcriptions.create(model="tiny", file=("a.wav", WAV), language="de")
    plain = hear.audio.transcriptions.create(model="tiny", file=io.BytesIO(WAV), language="de", response_format="text")
    assert plain == result.text + "\n"
    whole = hear.audio.transcriptions.create(
        model="tiny", file=("a.wav", WAV), language="de", response_format="verbose_json",
        timestamp_granularities=["segment"], temperature=0,
    )  # fmt: skip
    assert whole.language == "de" and whole.segments and whole.segments[0].end <= 1.0
    events = list(hear.audio.transcriptions.create(model="tiny", file=("a.wav", WAV), language="de", stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == result.text
    assert events[-1].type == "transcript.text.done" and events[-1].text == result.text
    assert hear.audio.translations.create(model="tiny", file=("a.wav", WAV)).text
    with pytest.raises(openai.NotFoundError):
        hear.chat.completions.create(model="tiny", messages=user_messages("hi"))


def test_embeddings(vectors: "openai.OpenAI") -> None:
    coded = vectors.embeddings.create(model="tiny", input=["the lazy dog", "a cat"])  # the client's default is base64
    plain = vectors.embeddings.create(model="tiny", input=["the lazy dog", "a cat"], encoding_format="float")
    for a, b in zip(coded.data, plain.data, strict=True):
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-5)


@pytest.fixture
def local_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test connects to no other machine."""
    addresses: list[Any] = []
    plain = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if not str(address[0]).startswith("127."):
            addresses.append(address)
        plain(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert addresses == []


@pytest.mark.filterwarnings("default")
@pytest.mark.clients
def test_langchain(address: str, local_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    of = pytest.importorskip("langchain_openai").ChatOpenAI
    options = {"base_url": f"{address}/v1", "api_key": "none", "model": "tiny", "temperature": 0, "max_tokens": 6}
    chat, newer = (of(**options, max_retries=0, use_responses_api=responses_api) for responses_api in (False, True))
    whole = chat.invoke("the lazy dog")
    assert whole.content == "".join(chunk.content for chunk in chat.stream("the lazy dog"))
    assert whole.usage_metadata["output_tokens"] <= 6
    assert whole.content == newer.invoke("the lazy dog").text
    assert whole.content == "".join(chunk.text for chunk in newer.stream("the lazy dog"))
    picture = image_url_part(random_image(1))
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}]
    seen = chat.invoke(messages)
    assert seen.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]
    assert newer.invoke(messages).text == seen.content


FOUND = "import importlib.util as u, sys; sys.exit(u.find_spec('litellm') is None)"
LITELLM = """
import json, sys
import litellm

litellm.telemetry = False
options = {"model": "openai/tiny", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 6, "temperature": 0}
messages = [{"role": "user", "content": "the lazy dog"}]
whole = litellm.completion(messages=messages, **options)
chunks = list(litellm.completion(messages=messages, stream=True, **options))
try:
    litellm.completion(messages=[], **options)
except litellm.BadRequestError as error:
    refused = error.status_code
said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
print(json.dumps([whole.choices[0].message.content, said, refused]))
"""


@pytest.mark.clients
def test_litellm(address: str) -> None:
    """In a separate process: MMJAX_LITELLM_PYTHON, or this Python, has litellm."""
    python = os.environ.get("MMJAX_LITELLM_PYTHON", sys.executable)
    if not Path(python).exists() or subprocess.run([python, "-c", FOUND], check=False).returncode:
        pytest.skip(f"{python} has no litellm")
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it downloads prices at import
    done = subprocess.run(
        [python, "-c", LITELLM, f"{address}/v1"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    whole, streamed, refused = json.loads(done.stdout.splitlines()[-1])
    assert whole and whole == streamed and refused == 400
