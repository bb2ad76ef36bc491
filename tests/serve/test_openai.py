"""The clients people have: OpenAI's for Python, LangChain's and LiteLLM's where they are installed."""

import asyncio
import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest

from asking import pil, sound_of, tone, url, user
from listening import listening as on_a_port
from mmjax import AsyncLLM
from serving import over

openai = pytest.importorskip("openai")

WAV = base64.b64decode(sound_of(tone(1, 1.0)))


@pytest.fixture(scope="module")
def ask(address: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def hear(listening: AsyncLLM) -> Iterator["openai.OpenAI"]:
    with (
        on_a_port(over(listening).app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def vectors(pooling: AsyncLLM) -> Iterator["openai.OpenAI"]:
    with (
        on_a_port(over(pooling).app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


def test_conversations(ask: "openai.OpenAI") -> None:
    model = ask.models.list().data[0].id
    messages = user(url(pil(1)), "What is this?")
    whole = ask.chat.completions.create(model=model, messages=messages, max_completion_tokens=8, temperature=0)
    assert whole.usage.completion_tokens <= 8 and whole.choices[0].finish_reason in ("stop", "length")
    stream = ask.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"top_k": 5},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    told = ask.completions.create(model=model, prompt="the lazy", max_tokens=4, temperature=0)
    assert told.usage.completion_tokens <= 4


def test_many_at_once(address: str) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=300) as client:

            async def one(i: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=user(f"Count to {i % 3}"), max_tokens=6, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(9))))

    texts = asyncio.run(all_of_them())
    assert texts[:3] == texts[3:6] == texts[6:]


def test_errors_have_their_classes(ask: "openai.OpenAI") -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask.chat.completions.create(model="gpt-4", messages=user("hi"))
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask.chat.completions.create(model="tiny", messages=user("hi"), max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        ask.audio.transcriptions.create(model="tiny", file=("a.wav", WAV))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own, of its translations
def test_speech(hear: "openai.OpenAI") -> None:
    told = hear.audio.transcriptions.create(model="tiny", file=("a.wav", WAV), language="de")
    plain = hear.audio.transcriptions.create(model="tiny", file=io.BytesIO(WAV), language="de", response_format="text")
    assert plain == told.text + "\n"
    whole = hear.audio.transcriptions.create(
        model="tiny", file=("a.wav", WAV), language="de", response_format="verbose_json",
        timestamp_granularities=["segment"], temperature=0,
    )  # fmt: skip
    assert whole.language == "de" and whole.segments and whole.segments[0].end <= 1.0
    events = list(hear.audio.transcriptions.create(model="tiny", file=("a.wav", WAV), language="de", stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == told.text
    assert events[-1].type == "transcript.text.done" and events[-1].text == told.text
    assert hear.audio.translations.create(model="tiny", file=("a.wav", WAV)).text
    with pytest.raises(openai.NotFoundError):
        hear.chat.completions.create(model="tiny", messages=user("hi"))


def test_vectors(vectors: "openai.OpenAI") -> None:
    coded = vectors.embeddings.create(model="tiny", input=["the lazy dog", "a cat"])  # in base64, unless told otherwise
    plain = vectors.embeddings.create(model="tiny", input=["the lazy dog", "a cat"], encoding_format="float")
    for a, b in zip(coded.data, plain.data, strict=True):
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_langchain(address: str) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model="tiny", temperature=0, max_tokens=6
    )
    whole = chat.invoke("the lazy dog")
    assert whole.content == "".join(chunk.content for chunk in chat.stream("the lazy dog"))
    assert whole.usage_metadata["output_tokens"] <= 6


@pytest.mark.filterwarnings("default")
def test_litellm(address: str) -> None:
    litellm = pytest.importorskip("litellm")
    messages = [{"role": "user", "content": "the lazy dog"}]
    options = {
        "model": "openai/tiny",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = litellm.completion(messages=messages, **options)
    chunks = list(litellm.completion(messages=messages, stream=True, **options))
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
