"""What every route needs: the engine, what is served under which limits, the way from a request to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from mmjax.serve import errors
from mmjax.serve.metrics import Metrics

from mmjax import AsyncLLM
from mmjax.types import RequestError, ValidationError

Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What the operator chose.

    names: under which the model is served, the first being the one that answers carry. max_queue: requests under way
    at once, those beyond are refused with 429. max_body_mb: of one request, in MiB. template_from_requests: whether a
    client may bring a chat template of its own. prompt_details: whether usage tells cached tokens. always_usage:
    whether every stream ends with its usage. audio_mb: largest upload of speech, in MB. max_stops, max_prompts: stop
    strings and prompts in one request; 0 is no limit.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    role: str = "assistant"
    max_queue: int = 1024
    max_body_mb: float = 256.0
    audio_mb: float = 25.0
    max_stops: int = 4
    max_prompts: int = 1024
    template_from_requests: bool = False
    content_format: str = "auto"
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt_details: bool = False
    always_usage: bool = False
    tell_ids: bool = False
    origins: tuple[str, ...] = ("*",)
    origin_methods: tuple[str, ...] = ("*",)
    origin_headers: tuple[str, ...] = ("*",)
    credentials: bool = False
    tool_parser: str | None = "hermes"
    development: bool = False


class ServerContext:
    """Shared by all routes of one server."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine, settings.names[0])
        self.started = int(time.time())
        self.open = 0

    @property
    def name(self) -> str:
        return self.settings.names[0]

    def check_model(self, name: str | None) -> None:
        """NoSuchModel for a name that is not served; none means the one that is."""
        if name and name not in self.settings.names:
            raise errors.NoSuchModel(name)

    def check_stops(self, stop: Any) -> None:
        """ValidationError for more stop strings than the operator allows: each is looked for in every new piece of
        text."""
        most = self.settings.max_stops
        if isinstance(stop, list) and len(stop) > most > 0:
            words = f"stop: at most {most} strings, got {len(stop)} (MMJAX_MAX_STOP_STRINGS of the server)."
            raise ValidationError(words, parameter="stop")

    def check_prompts(self, count: int) -> None:
        """ValidationError for more prompts in one request than the operator allows."""
        most = self.settings.max_prompts
        if count > most > 0:
            words = f"At most {most} prompts in one request, got {count} (MMJAX_MAX_COMPLETION_PROMPTS of the server)."
            raise ValidationError(words, parameter="prompt")

    def chat_options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The keywords of `AsyncLLM.prepare_chat`: what a request asks for, over what the operator chose."""
        if asked["chat_template"] is not None and not self.settings.template_from_requests:
            raise RequestError(
                "Chat template is passed with request, but the server does not trust those: start it with "
                "`--trust-request-chat-template`."
            )
        more = {**self.settings.template_kwargs, **(asked["chat_template_kwargs"] or {})}
        form = self.settings.content_format
        return {**asked, "chat_template_kwargs": more, "chat_template_content_format": form}

    @asynccontextmanager
    async def admitted(self, *, again: bool = False) -> AsyncIterator[None]:
        """Count a request in. TooBusy when the queue is full, unless it was let in before (`again`); EngineDeadError
        when nothing can run."""
        self.engine.check()
        if self.open >= self.settings.max_queue and not again:
            raise errors.TooBusy(
                f"{self.open} requests are under way, as many as `--max-queue` allows. Try again in a moment."
            )
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


async def unless_gone(request: Request, work: Coroutine[Any, Any, Out]) -> Out:
    """Do the work, unless the client leaves first: then it is cancelled, and what it holds freed."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def together(*work: Coroutine[Any, Any, Out]) -> list[Out]:
    """All results in order. When one fails, the others are cancelled, and its exception is raised."""
    failure: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as group_error:
        failure = group_error.exceptions[0]
    if failure is not None:  # raised out here, it keeps its own cause and has no other
        raise failure
    return [task.result() for task in tasks]


def event_stream(
    events: AsyncGenerator[dict[str, Any], None], request_id: str, *, named: bool = False
) -> StreamingResponse:
    """Server-sent events, ended by [DONE]. An error after the start becomes an event. `named`: each event goes under
    its type, and the type of the last one says that it is the last."""

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(events):
                async for event in events:
                    name = f"event: {event['type']}\n" if named else ""
                    yield f"{name}data: {json.dumps(event)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(errors.describe(error, request_id)[1])}\n\n"
        if not named:
            yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def as_json(content: dict[str, Any]) -> Response:
    """An answer as JSON, written on a thread: vectors and log-probabilities can be long."""
    text = await asyncio.to_thread(_write, content)
    return Response(text.encode(errors="replace"), media_type="application/json")


def _write(value: Any) -> str:
    """JSON piece by piece, for the interpreter is not free before the writer of one piece has returned."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{_write(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[" + ",".join(map(_write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """OpenAI's count of tokens; `cached` is told when asked for."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


def token_text(token: int, entry: Any, as_ids: bool) -> str:
    """How a token is written in reports of log-probabilities."""
    return f"token_id:{token}" if as_ids or entry.decoded_token is None else str(entry.decoded_token)


def finite(logprob: float) -> float:
    """JSON has no infinity; clients of the known server expect this number."""
    return max(logprob, -9999.0)


def merged(model: Sequence[list[Any]]) -> list[Any]:
    """One list of many."""
    return [entry for part in model for entry in part]
