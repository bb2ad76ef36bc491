"""Transcripts: formats, languages, recordings longer than the window, streams."""

import asyncio
import base64
import re
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from api_server import sse_events
from mmjax import AsyncLLM, SamplingParams, Speech, SpeechTask
from mmjax.entrypoints.transcription import split_segments
from mmjax.processors.base import SuppressedTokens
from prompts import base64_wav, random_chord

LONG = 10.5  # seconds: three windows of the tiny model


def sound(seconds: float, seed: int = 1) -> bytes:
    """A WAV file whose loudness changes every tenth of a second."""
    samples = random_chord(seed, seconds)
    loudness = np.random.default_rng(seed).uniform(0.2, 1, len(samples) // 1600 + 1).repeat(1600)[: len(samples)]
    return base64.b64decode(base64_wav(samples * loudness.astype(np.float32)))


def listen(client: TestClient, content: bytes | None = None, *, to: str = "transcriptions", **fields: Any) -> Any:
    content = sound(1.0) if content is None else content
    return client.post(
        f"/v1/audio/{to}", files={"file": ("a.wav", content)}, data={"max_completion_tokens": 12, **fields}
    )


def test_formats(speech_client: TestClient) -> None:
    result = listen(speech_client, language="de").json()
    assert set(result) == {"text", "usage"} and result["usage"] == {"type": "duration", "seconds": 1}
    plain = listen(speech_client, language="de", response_format="text")
    assert plain.headers["content-type"].startswith("text/plain") and plain.text == result["text"] + "\n"
    whole = listen(speech_client, language="de", response_format="verbose_json").json()
    assert whole["language"] == "de" and whole["duration"] == 1.0 and whole["task"] == "transcribe"
    assert whole["segments"] and whole["text"] == "".join(s["text"] for s in whole["segments"]).strip()
    for segment in whole["segments"]:
        assert 0 <= segment["start"] <= segment["end"] <= 1.0
        assert segment["avg_logprob"] <= 0 and 0 <= segment["no_speech_prob"] <= 1 and segment["tokens"]
    time = r"\d\d:\d\d:\d\d"
    srt = listen(speech_client, language="de", response_format="srt").text
    assert re.match(rf"1\n{time},\d{{3}} --> {time},\d{{3}}\n\S", srt)
    vtt = listen(speech_client, language="de", response_format="vtt")
    assert vtt.headers["content-type"].startswith("text/vtt")
    assert re.match(rf"WEBVTT\n\n{time}\.\d{{3}} --> {time}\.\d{{3}}\n\S", vtt.text)


def test_words(speech_client: TestClient, listening: AsyncLLM) -> None:
    whole = listen(
        speech_client,
        sound(LONG),
        language="en",
        response_format="verbose_json",
        **{"timestamp_granularities[]": ["word", "segment"]},
    ).json()
    words = whole["words"]
    assert set(words[0]) == {"word", "start", "end"} and whole["segments"]
    assert "".join("".join(w["word"] for w in words).split()) == "".join(whole["text"].split())
    times = [time for w in words for time in (w["start"], w["end"])]
    assert times == sorted(times) and 0 <= times[0] < times[-1] <= LONG


def test_times_of_a_long_recording(speech_client: TestClient, listening: AsyncLLM) -> None:
    whole = listen(speech_client, sound(LONG), language="en", response_format="verbose_json").json()
    assert whole["duration"] == LONG and whole["usage"]["seconds"] == 11
    seeks = sorted({segment["seek"] / 100 for segment in whole["segments"]})
    assert len(seeks) >= 3 and seeks[0] == 0
    assert any(seek % 4 for seek in seeks), "clips end at quiet moments, not at the end of the window"
    times = [(segment["start"], segment["end"]) for segment in whole["segments"]]
    assert times == sorted(times) and times[-1][1] <= LONG
    assert [segment["id"] for segment in whole["segments"]] == list(range(len(times)))
    assert all(segment["start"] >= segment["seek"] / 100 - 0.01 for segment in whole["segments"])


def test_stream_has_the_same_text(speech_client: TestClient) -> None:
    content = sound(LONG)
    whole = listen(speech_client, content, language="en").json()
    chunks = sse_events(listen(speech_client, content, language="en", stream="true", stream_include_usage="true"))
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-1]) == whole["text"]
    assert "".join(c["delta"] for c in chunks if c.get("type") == "transcript.text.delta") == whole["text"]
    assert {chunk["object"] for chunk in chunks} == {"transcription.chunk"}
    assert chunks[-2]["type"] == "transcript.text.done" and chunks[-2]["text"] == whole["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["seconds"] == 11
    assert len(chunks) > 5


def test_usage_in_every_chunk(speech_client: TestClient) -> None:
    given = {"stream_include_usage": "true", "stream_continuous_usage_stats": "true"}
    *chunks, last = sse_events(listen(speech_client, sound(LONG), language="en", stream="true", **given))
    made = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert 0 < made[0] < made[-1] and made == sorted(made) and chunks[-1]["usage"] == last["usage"]


def test_languages_and_prompts(speech_client: TestClient, listening: AsyncLLM) -> None:
    found = listen(speech_client, response_format="verbose_json").json()["language"]
    assert found in Speech(listening).languages
    text = listen(speech_client, language=found).json()["text"]
    assert listen(speech_client).json()["text"] == text
    translated = listen(speech_client, language=found, to="translations").json()["text"]
    prompted = listen(speech_client, language=found, prompt="the lazy dog is on the tin " * 20).json()["text"]
    assert text and translated and prompted and prompted != text


def test_prompts_have_the_format_of_whispers_training(listening: AsyncLLM) -> None:

    speech = Speech(listening)

    async def prompt(task: SpeechTask) -> str:
        recording = await speech.decode(sound(1.0))
        work = await speech.prepare(recording, task, SamplingParams(temperature=0))
        return listening.decode(work.engine_inputs[0].token_ids)

    for task, wanted in (
        (SpeechTask("de"), "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>"),
        (SpeechTask("de", translate=True), "<|startoftranscript|><|de|><|translate|><|notimestamps|>"),
        (SpeechTask("fr", timestamps=True), "<|startoftranscript|><|fr|><|transcribe|><|0.00|>"),
        (
            SpeechTask("en", prompt=" said "),
            "<|startofprev|> said<|startoftranscript|><|en|><|transcribe|><|notimestamps|>",
        ),
    ):
        assert asyncio.run(prompt(task)) == wanted


def test_suppressed_tokens(listening: AsyncLLM) -> None:
    """As generation_config.json says: some never, some not as the first token. A logit_bias of the request wins."""
    speech = Speech(listening)
    assert len(speech.suppressed.first_ids) == 2 and speech.suppressed.ids == ()

    async def ids(task: SpeechTask, **params: Any) -> list[int]:
        recording = await speech.decode(sound(1.0))
        work = await speech.prepare(recording, task, SamplingParams(temperature=0, max_tokens=8, **params))
        transcript = await speech.transcribe(work, timestamps=task.timestamps)
        return list(transcript.outputs[0].outputs[0].token_ids)

    plain, timed = (asyncio.run(ids(SpeechTask("en", timestamps=timed))) for timed in (False, True))
    first = plain[0]
    speech.suppressed = SuppressedTokens(first_ids=(first,))
    other = asyncio.run(ids(SpeechTask("en")))
    assert other[0] != first and len(other) == 8
    assert asyncio.run(ids(SpeechTask("en"), logit_bias={first: 0.0})) == plain
    assert asyncio.run(ids(SpeechTask("en", timestamps=True))) == timed
    speech.suppressed = SuppressedTokens(ids=tuple(set(plain)))
    assert not set(asyncio.run(ids(SpeechTask("en")))) & set(plain)


@pytest.mark.parametrize(
    ("tokens", "seconds", "wanted"),
    [
        ([], 4.0, []),
        ([1, 2, 150, 150, 3, 200], 4.0, [(0.0, 1.0, 0, 2), (1.0, 2.0, 4, 5)]),
        ([1, 150, 160, 3], 4.0, [(0.0, 1.0, 0, 1), (1.2, 4.0, 3, 4)]),
        ([100, 150, 1, 2], 1.5, [(1.0, 1.5, 2, 4)]),
        ([1, 200, 150, 2, 999], 3.0, [(0.0, 2.0, 0, 1), (2.0, 3.0, 3, 4)]),
    ],
)
def test_segments(tokens: list[int], seconds: float, wanted: list[tuple[float, float, int, int]]) -> None:
    assert split_segments(tokens, 100, seconds) == [pytest.approx(segment) for segment in wanted]


def test_refusals(speech_client: TestClient) -> None:
    cases: list[tuple[bytes, dict[str, Any], int, str]] = [
        (b"not a sound", {}, 400, "Invalid or unsupported audio file"),
        (b"", {}, 400, "Invalid or unsupported audio file"),
        (sound(0.0), {}, 400, "audio"),
        (b"\0" * 1_100_000, {}, 400, "Maximum file size exceeded"),
        (sound(1.0), {"language": "xx"}, 400, "Unsupported language: 'xx'"),
        (sound(1.0), {"response_format": "yaml"}, 400, "Currently only support response_format"),
        (sound(1.0), {"response_format": "verbose_json", "stream": "true"}, 400, "streamed"),
        (sound(1.0), {"stream_include_usage": "true"}, 400, "stream=True"),
        (sound(1.0), {"timestamp_granularities[]": "word"}, 400, "verbose_json"),
        (sound(1.0), {"timestamp_granularities[]": "segment"}, 400, "verbose_json"),
        (sound(1.0), {"temperature": "-1"}, 400, "temperature"),
        (sound(1.0), {"temperature": "warm"}, 400, "temperature"),
        (sound(1.0), {"use_beam_search": "true"}, 400, "Beam"),
        (sound(1.0), {"max_completion_tokens": "0"}, 400, "max_completion_tokens"),
        (sound(1.0), {"model": "other"}, 404, "does not exist"),
    ]
    for content, fields, status, words in cases:
        response = listen(speech_client, content, **fields)
        assert response.status_code == status, (fields, response.text)
        assert words in response.json()["error"]["message"], (fields, response.text)
    assert speech_client.post("/v1/audio/transcriptions", data={"file": "text"}).status_code == 422
    assert speech_client.post("/v1/audio/transcriptions", json={"file": "text"}).status_code == 422
    assert listen(speech_client, to="translations", to_language="de").status_code == 400
    assert speech_client.post("/v1/chat/completions", json={"messages": []}).status_code == 404
    assert listen(speech_client).status_code == 200
