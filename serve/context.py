"""What all routes share: the engine, the server's settings and limits, and how responses are written."""

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
from mmjax.serve.closed_schemas import close_objects
from mmjax.serve.response_store import ResponseStore
from mmjax.serve.tracing import RequestTracer

from mmjax import AsyncLLM, EngineMetrics
from mmjax.parsers import REASONING_PARSERS, TOOL_PARSERS, reasoning_parser_for, tool_parser_for
from mmjax.types import RequestError, ValidationError

Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The settings that the operator chooses.

    names: names of the model; responses have the first. keys: API keys, any of which gives access; empty = no key is
    needed. role: of generated messages. max_queue: requests in progress at once; further ones get 429. max_body_mb:
    largest body of a request, MiB. audio_mb: largest uploaded audio file, MB. max_stops, max_prompts: most stop strings
    and prompts in one request; 0 = no limit. template_from_requests: a request may have its own chat template.
    content_format, template_kwargs: how chat templates are applied. prompt_details: usage reports cached tokens.
    always_usage: every stream ends with its usage. request_id_headers: responses have the header X-Request-Id. origins,
    origin_methods, origin_headers, credentials: CORS. tool_parser, reasoning_parser: the formats of tool calls and of
    reasoning in outputs; auto = as the chat template shows, None = they stay in the text. closed_objects: constrained
    objects have only the properties that their schema lists; None = those of forced tools and of strict schemas.
    api_docs: serve /docs, /redoc and /openapi.json. traces_endpoint: URL of the collector of OpenTelemetry's traces;
    None = no traces are made. development: add the routes for development. store_mb: MiB of the responses that are
    stored; 0 = none are.
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
    request_id_headers: bool = False
    origins: tuple[str, ...] = ("*",)
    origin_methods: tuple[str, ...] = ("*",)
    origin_headers: tuple[str, ...] = ("*",)
    credentials: bool = False
    tool_parser: str | None = "auto"
    reasoning_parser: str | None = "auto"
    closed_objects: bool | None = None
    api_docs: bool = True
    traces_endpoint: str | None = None
    development: bool = False
    store_mb: float = 64.0


class ServerContext:
    """The state that all routes of one server share.

    num_requests: how many requests are in progress. tool_parser, reasoning_parser: for the model's outputs; None = tool
    calls, or reasoning, stay in the text. tracer: None = no traces are made.
    """

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        endpoint = settings.traces_endpoint
        self.tracer = None if endpoint is None else RequestTracer.to(endpoint, settings.names[0])
        listener = None if self.tracer is None else self.tracer.record
        self.metrics = EngineMetrics(engine.model, settings.names[0], listener)
        self.started = int(time.time())
        self.num_requests = 0
        self.responses = ResponseStore(int(settings.store_mb * 2**20))
        template = engine.chat_template
        tools, reasoning = settings.tool_parser, settings.reasoning_parser
        tools = tool_parser_for(template) if tools == "auto" else tools
        reasoning = reasoning_parser_for(template) if reasoning == "auto" else reasoning
        self.tool_parser = None if tools is None else TOOL_PARSERS[tools]
        self.reasoning_parser = None if reasoning is None else REASONING_PARSERS[reasoning]

    @property
    def name(self) -> str:
        return self.settings.names[0]

    def check_model(self, name: str | None) -> None:
        """NoSuchModel unless the name is one of the model's names, or missing."""
        if name and name not in self.settings.names:
            raise errors.NoSuchModel(name)

    def check_stops(self, stop: Any) -> None:
        """ValidationError for more stop strings than the operator allows: the text is searched for each of them after
        every step."""
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

    def chat_kwargs(self, requested: dict[str, Any]) -> dict[str, Any]:
        """The keywords of `AsyncLLM.prepare_chat`: those of a request, combined with the operator's settings."""
        if requested["chat_template"] is not None and not self.settings.template_from_requests:
            raise RequestError(
                "Chat template is passed with request, but the server does not trust those: start it with "
                "`--trust-request-chat-template`."
            )
        template_kwargs = {**self.settings.template_kwargs, **(requested["chat_template_kwargs"] or {})}
        content_format = self.settings.content_format
        return {
            **requested,
            "chat_template_kwargs": template_kwargs,
            "chat_template_content_format": content_format,
        }

    def close_objects(self, body: Any) -> dict[str, Any]:
        """`sampling_fields` of a chat or completion, whose schema is closed if the request or the operator wants it."""
        fields: dict[str, Any] = body.sampling_fields()
        constraint, closed = fields.get("structured_outputs"), self.settings.closed_objects
        wants = body.has_strict_schema if closed is None else closed
        if wants and isinstance(constraint, dict) and isinstance(constraint.get("json"), dict):
            fields["structured_outputs"] = constraint | {"json": close_objects(constraint["json"])}
        return fields

    @asynccontextmanager
    async def admitted(self, *, again: bool = False) -> AsyncIterator[None]:
        """Count a request as in progress. again: it was already admitted once, and is not refused now.

        TooBusy if `max_queue` requests are in progress, EngineDeadError if the engine has stopped.
        """
        self.engine.check()
        if self.num_requests >= self.settings.max_queue and not again:
            raise errors.TooBusy(
                f"{self.num_requests} requests are under way, as many as `--max-queue` allows. Try again in a moment."
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Out]) -> Out:
    """The result of `work`. If the client closes the connection first, `work` is cancelled, which frees its blocks, and
    ClientDisconnected is raised."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientDisconnected
        return task.result()
    finally:
        disconnect.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def gather_or_cancel(*work: Coroutine[Any, Any, Out]) -> list[Out]:
    """The results, in order. If one coroutine fails, the others are cancelled and its exception is raised."""
    failure: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as group_error:
        failure = group_error.exceptions[0]
    if failure is not None:  # raised outside of `except`, which would set the group as its context
        raise failure
    return [task.result() for task in tasks]


def sse_response(
    events: AsyncGenerator[dict[str, Any], None], request_id: str, *, named: bool = False
) -> StreamingResponse:
    """A stream of server-sent events. An error after the start becomes an event.

    named: each event has its type as its name, and the stream ends after the last one; else it ends with [DONE].
    """

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


async def json_response(content: dict[str, Any]) -> Response:
    """A response of JSON, encoded in a thread: vectors and log-probabilities can be long."""
    text = await asyncio.to_thread(_write, content)
    return Response(text.encode(errors="replace"), media_type="application/json")


def _write(value: Any) -> str:
    """JSON, encoded piece by piece: `json.dumps` does not release the interpreter before it returns."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{_write(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[" + ",".join(map(_write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """OpenAI's usage object. cached: tokens of the prompt found in the prefix cache; None = not reported."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


def token_text(token: int, entry: Any, tokens_as_ids: bool) -> str:
    """The text of a token in log-probabilities; `token_id:ID` if it has none, or if as_ids."""
    return f"token_id:{token}" if tokens_as_ids or entry.decoded_token is None else str(entry.decoded_token)


def finite_logprob(logprob: float) -> float:
    """At least -9999.0, which vLLM's clients expect for -inf: JSON has no infinity."""
    return max(logprob, -9999.0)


def flatten(lists: Sequence[list[Any]]) -> list[Any]:
    return [entry for part in lists for entry in part]
