"""Traces of requests for OpenTelemetry: one span for a request, and one below it for each of its phases.

The spans are made when a request has ended, from the times that the engine has recorded: tracing costs the engine
nothing. Attributes have the names of OpenTelemetry's conventions for generative AI, and vLLM's where these have none.
OpenTelemetry is imported only here, and only if traces are wanted.
"""

from __future__ import annotations

import contextvars
import dataclasses
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from mmjax import RequestOutput
from mmjax.types import RequestMetrics

EXTRA = "--otlp-traces-endpoint needs OpenTelemetry: pip install 'mmjax[otel]'"
HEADERS = ("traceparent", "tracestate")  # by which a caller says of which trace its request is a part


@dataclasses.dataclass(frozen=True)
class HTTPRequest:
    """The HTTP request that is being answered. start: when it arrived, seconds of the monotonic clock."""

    start: float
    request_id: str
    headers: Mapping[str, str]


_current: contextvars.ContextVar[HTTPRequest | None] = contextvars.ContextVar("http_request", default=None)


class TracedRequests:
    """ASGI middleware that notes which HTTP request is being answered. It runs inside of RequestGate."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            headers = {name: given[name] for name in HEADERS if name in given}
            _current.set(HTTPRequest(time.monotonic(), scope["state"]["request_id"], headers))
        await self.app(scope, receive, send)


class RequestTracer:
    """Makes the spans of finished requests. provider: OpenTelemetry's TracerProvider. model: the name of the model."""

    def __init__(self, provider: Any, model: str) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.model = model
        self._provider = provider
        self._tracer = provider.get_tracer("mmjax")
        self._kind = SpanKind.SERVER
        self._read_context = TraceContextTextMapPropagator().extract

    @classmethod
    def to(cls, endpoint: str, model: str) -> RequestTracer:
        """A tracer that sends spans to a collector in batches, on a thread of its own. ValueError without the extra."""
        check(endpoint)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": "mmjax"}))
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        return cls(provider, model)

    def record(self, output: Any) -> None:
        """Make the spans of a finished request. Requests for vectors have no times, and no spans."""
        times = output.metrics if isinstance(output, RequestOutput) else None
        if times is None:
            return
        request = _current.get()
        start = times.arrival_time if request is None else min(request.start, times.arrival_time)
        end = time.monotonic() if times.finished_time is None else times.finished_time
        offset = time.time_ns() - time.monotonic_ns()  # from the monotonic clock to the time of day

        def ns(seconds: float) -> int:
            return int(seconds * 1e9) + offset

        from opentelemetry.trace import set_span_in_context

        whole = self._tracer.start_span(
            "llm_request",
            context=self._read_context({} if request is None else request.headers),
            kind=self._kind,
            start_time=ns(start),
            attributes=self._attributes(output, times, request),
        )
        inside = set_span_in_context(whole)
        for name, first, last in _phases(times, start):
            self._tracer.start_span(name, context=inside, start_time=ns(first)).end(end_time=ns(last))
        whole.end(end_time=ns(end))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _attributes(
        self, output: RequestOutput, times: RequestMetrics, request: HTTPRequest | None
    ) -> dict[str, str | int | float]:
        lengths = [len(completion.token_ids) for completion in output.outputs]
        found: dict[str, str | int | float | None] = {
            "gen_ai.response.model": self.model,
            "gen_ai.request.id": output.request_id if request is None else request.request_id,
            "gen_ai.request.n": len(lengths),
            "gen_ai.request.max_tokens": times.max_tokens,
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids or ()),
            "gen_ai.usage.completion_tokens": sum(lengths),
            "gen_ai.latency.time_in_queue": times.time_in_queue,
            "gen_ai.latency.time_to_first_token": _between(times.arrival_time, times.first_token_time),
            "gen_ai.latency.e2e": _between(times.arrival_time, times.finished_time),
        }
        for phase, first, last in _phases(times, times.arrival_time):
            if phase in ("prefill", "decode"):
                found[f"gen_ai.latency.time_in_model_{phase}"] = last - first
        return {name: value for name, value in found.items() if value is not None}


def check(endpoint: str) -> None:
    """ValueError without OpenTelemetry, or for an endpoint that is not a URL."""
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https", "grpc"):
        raise ValueError(
            f"--otlp-traces-endpoint {endpoint!r}: give a URL, such as http://localhost:4317 for gRPC, or "
            f"http://localhost:4318/v1/traces for HTTP"
        )
    try:
        _exporter_class(endpoint)
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ValueError(EXTRA) from error


def _exporter(endpoint: str) -> Any:
    exporter, address = _exporter_class(endpoint), urllib.parse.urlsplit(endpoint)
    if _is_http(endpoint):
        return exporter(endpoint=endpoint)
    return exporter(endpoint=address.netloc, insecure=address.scheme != "https")


def _exporter_class(endpoint: str) -> Any:
    if _is_http(endpoint):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HTTPExporter

        return HTTPExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


def _is_http(endpoint: str) -> bool:
    """Collectors take HTTP at a path, and gRPC at the root."""
    return urllib.parse.urlsplit(endpoint).path not in ("", "/")


def _phases(times: RequestMetrics, start: float) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of each phase that the request has ended: processing of its input, queue, prefill, decode."""
    yield "input", start, times.arrival_time
    moments = (
        ("queue", times.arrival_time, times.first_scheduled_time),
        ("prefill", times.first_scheduled_time, times.first_token_time),
        ("decode", times.first_token_time, times.last_token_time),
    )
    for name, first, last in moments:
        if first is not None and last is not None:
            yield name, first, last


def _between(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
