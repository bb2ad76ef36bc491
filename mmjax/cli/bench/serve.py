"""`mmjax bench serve`: sends random requests to a server with OpenAI's API and measures its responses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from mmjax.cli.bench import CHAT, COMPLETIONS, TRANSCRIPTIONS
from mmjax.cli.bench.random_inputs import AUDIO_RATE, random_audio, random_image, random_text
from mmjax.cli.bench.serve_metrics import Load, RequestResult, Selection, ServeResult
from mmjax.multimodal.utils import encode_audio_base64, encode_image_url

OUTPUT_FIELDS = ("content", "text", "reasoning_content", "reasoning", "tool_calls")


@dataclasses.dataclass(frozen=True)
class RandomRequests:
    """What requests hold. input_len, output_len: tokens of text in and out, each from a uniform distribution of this
    mean and range_ratio around it. image_size: (width, height). encode: of the model's tokenizer."""

    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    image_size: tuple[int, int] = (640, 480)
    images_per_request: int = 0
    audio_s: float = 0.0
    encode: Callable[[str], Sequence[int]] | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go. base_url: with or without /v1. extra: more fields of every request, such as ignore_eos."""

    base_url: str
    endpoint: str = CHAT
    model: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def url(self, path: str) -> str:
        return re.sub(r"/v1/?$|/$", "", self.base_url) + path


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that is ready to be sent. input_tokens: of its text, counted if the server does not."""

    http: httpx.Request
    input_tokens: int
    audio_s: float


def run(
    target: Target, inputs: RandomRequests, loads: Sequence[Load], selection: Selection, seed: int
) -> list[ServeResult]:
    """The results of one run for each load. Every run has prompts of its own. ValueError if the server cannot be
    reached, or refuses a first request, which is not measured."""
    return asyncio.run(_run(target, inputs, loads, selection, seed))


async def _run(
    target: Target, inputs: RandomRequests, loads: Sequence[Load], selection: Selection, seed: int
) -> list[ServeResult]:
    connections = Connections()
    try:
        [first] = prepare(target, dataclasses.replace(inputs, num_prompts=1), [seed, 0])
        tried = await send(connections, first)
        if tried.error:
            raise ValueError(f"{target.url(target.endpoint)} does not serve the first request: {tried.error}")
        results = []
        for number, load in enumerate(loads, 1):
            requests = prepare(target, inputs, [seed, number])
            times = arrivals(len(requests), load, np.random.default_rng([seed, number, 1]))
            results.append(await measure(connections, requests, times, load, selection))
        return results
    finally:
        await connections.close()


class Connections:
    """Clients of one connection each.

    One client for all requests searches its pool for each of them, and the event loop does nothing else: with 128
    streams on 2 cores, the first chunk took 3.9 s, and 0.3 s with a client for each.
    """

    def __init__(self) -> None:
        self._ssl_context = httpx.create_ssl_context()
        self._idle: list[httpx.AsyncClient] = []

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that nobody else uses meanwhile."""
        timeout = httpx.Timeout(None, connect=60)
        client = self._idle.pop() if self._idle else httpx.AsyncClient(verify=self._ssl_context, timeout=timeout)
        try:
            yield client
        finally:
            self._idle.append(client)

    async def close(self) -> None:
        """Close all clients. None may be in use."""
        for client in self._idle:
            await client.aclose()


def first_model(target: Target) -> str:
    """The first model that the server lists. ValueError if it cannot be reached."""
    url = target.url("/v1/models")
    try:
        response = httpx.get(url, headers=dict(target.headers), timeout=60)
    except httpx.HTTPError as error:
        raise ValueError(f"no server at {url}: {_describe(error)}. --base-url names another.") from error
    try:
        name: str = response.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} lists no model: {_describe(error)}. Name one with --model.") from error
    return name


def arrivals(count: int, load: Load, rng: np.random.Generator) -> np.ndarray:
    """Seconds from the start at which requests are sent, scaled so that the last is sent at count / rate."""
    if math.isinf(load.request_rate):
        return np.zeros(count)
    times = np.cumsum(rng.gamma(load.burstiness, 1.0, count))
    scaled: np.ndarray = times * (count / load.request_rate / times[-1])
    return scaled


def prepare(target: Target, inputs: RandomRequests, seed: Sequence[int]) -> list[Prepared]:
    """Random requests. Equal seeds give equal requests."""
    rng, url = np.random.default_rng(seed), target.url(target.endpoint)
    made = []
    for _ in range(inputs.num_prompts):
        input_len = random_length(inputs.input_len, inputs.range_ratio, rng)
        fields = _fields(target, inputs, input_len, rng)
        request = httpx.Request("POST", url, headers=dict(target.headers), **fields)
        made.append(Prepared(request, input_len, inputs.audio_s))
    return made


def random_length(mean: int, range_ratio: float, rng: np.random.Generator) -> int:
    """At least 1, from a uniform distribution over mean * (1 - range_ratio) to mean * (1 + range_ratio)."""
    low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
    return max(1, int(rng.integers(low, high, endpoint=True)))


def _fields(target: Target, inputs: RandomRequests, input_len: int, rng: np.random.Generator) -> dict[str, Any]:
    """The body of a request, as an argument of httpx."""
    output_len = random_length(inputs.output_len, inputs.range_ratio, rng)
    common = {"model": target.model, "stream": True, **target.extra}
    if target.endpoint == TRANSCRIPTIONS:
        wav = base64.b64decode(encode_audio_base64(random_audio(inputs.audio_s, rng), AUDIO_RATE))
        form = {**common, "language": "en", "stream_include_usage": True, "max_completion_tokens": output_len}
        words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in form.items()}
        return {"data": words, "files": {"file": ("noise.wav", wav, "audio/wav")}}
    common["stream_options"] = {"include_usage": True}
    text = random_text(input_len, rng, inputs.encode)
    if target.endpoint == COMPLETIONS:
        return {"json": {**common, "prompt": text, "max_tokens": output_len}}
    parts: list[dict[str, Any]] = []
    for _ in range(inputs.images_per_request):
        url = encode_image_url(random_image(inputs.image_size, rng), format="JPEG")
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if inputs.audio_s:
        sound = encode_audio_base64(random_audio(inputs.audio_s, rng), AUDIO_RATE)
        parts.append({"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}})
    content = [*parts, {"type": "text", "text": text}] if parts else text  # older servers take only strings
    messages = [{"role": "user", "content": content}]
    return {"json": {**common, "messages": messages, "max_completion_tokens": output_len}}


async def measure(
    connections: Connections, requests: Sequence[Prepared], times: np.ndarray, load: Load, selection: Selection
) -> ServeResult:
    """Send each request at its time, but not before one of `max_concurrency` places is free. Waiting for a place counts
    for no metric of the request."""
    places = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()
    with tqdm(total=len(requests), unit="req") as bar:

        async def one(request: Prepared) -> RequestResult:
            async with places:
                result = await send(connections, request)
            bar.update()
            return result

        begin = time.perf_counter()
        tasks = []
        for request, at in zip(requests, times, strict=True):
            wait = begin + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(request)))
        results = await asyncio.gather(*tasks)
        return ServeResult(load, selection, results, time.perf_counter() - begin)


async def send(connections: Connections, request: Prepared) -> RequestResult:
    """Send one request and read its response. Failures are results too."""
    reader = ResponseReader()
    try:
        async with connections.take() as client:
            start = time.perf_counter()
            response = await client.send(request.http, stream=True)
            try:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    return RequestResult(error=f"HTTP {response.status_code}: {text[:500]}")
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    async for data in response.aiter_bytes():
                        reader.feed(data, time.perf_counter())
                else:
                    reader.read(await response.aread(), time.perf_counter(), whole=True)
            finally:
                await response.aclose()
    except (httpx.HTTPError, httpx.StreamError) as error:
        return RequestResult(error=_describe(error))
    if reader.error or not reader.last:
        return RequestResult(error=reader.error or "the response has no output")
    usage, times = reader.usage, reader.times or [reader.last]
    return RequestResult(
        start=start,
        ttft=times[0] - start,
        latency=reader.last - start,
        gaps=tuple(np.diff(times).tolist()),
        input_tokens=usage.get("prompt_tokens") or usage.get("input_tokens") or request.input_tokens,
        output_tokens=usage.get("completion_tokens") or usage.get("output_tokens") or len(times),
        audio_s=request.audio_s,
    )


class ResponseReader:
    """Reads a response as it arrives.

    times: when each chunk with output arrived. last: when the last chunk of the response did, without that of the
    usage; 0 if none did.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last = 0.0
        self.usage: Mapping[str, Any] = {}
        self.error: str | None = None
        self._line = b""

    def feed(self, data: bytes, now: float) -> None:
        """More server-sent events, and when they arrived."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self.read(line[5:].strip(), now)

    def read(self, text: bytes, now: float, *, whole: bool = False) -> None:
        """A chunk of the response, or all of it where a server does not stream."""
        if text == b"[DONE]":
            return
        try:
            chunk = json.loads(text)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self.error = f"not a JSON object: {text[:200].decode(errors='replace')}"
            return
        if chunk.get("error"):
            self.error = f"error in the response: {json.dumps(chunk['error'])[:500]}"
        self.usage = chunk.get("usage") or self.usage
        if whole or has_output(chunk):
            self.times.append(now)
        if whole or chunk.get("choices") or str(chunk.get("type")).startswith("transcript."):
            self.last = now


def has_output(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk has generated tokens. Those without text count; the role that begins a chat does not, nor does a
    finish reason alone."""
    if chunk.get("type") == "transcript.text.delta":
        return True
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(field) for field in OUTPUT_FIELDS):
            return True
        if choice.get("finish_reason") is None and "role" not in delta:
            return True
    return False


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
