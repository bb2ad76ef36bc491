"""Traces: one span for a request, and one below it for each of its phases."""

import itertools
import sys
from typing import Any

import pytest
from fastapi.testclient import TestClient
from mmjax.serve import tracing
from mmjax.serve.tracing import EXTRA, RequestTracer

from mmjax.cli.main import main

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, Any]:
    """(client, exporter that keeps the spans) of a server that makes traces."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(RequestTracer, "to", lambda _, name: RequestTracer(provider, name))
    return make_client(traces_endpoint="http://localhost:4317"), exporter


@pytest.mark.parametrize("stream", [False, True])
def test_phases(spans: tuple[TestClient, Any], stream: bool) -> None:
    client, exporter = spans
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    body = {"prompt": "the", "max_tokens": 5, "ignore_eos": True, "stream": stream}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    *phases, whole = exporter.get_finished_spans()
    assert [span.name for span in phases] == ["input", "queue", "prefill", "decode"] and whole.name == "llm_request"
    assert f"{whole.context.trace_id:032x}" == TRACE and f"{whole.parent.span_id:016x}" == PARENT
    assert all(span.parent.span_id == whole.context.span_id for span in phases)
    assert all(span.end_time <= after.start_time + 1000 for span, after in itertools.pairwise(phases))
    assert whole.start_time == phases[0].start_time and phases[-1].end_time <= whole.end_time
    wanted = {
        "gen_ai.request.id": "mine", "gen_ai.usage.completion_tokens": 5, "gen_ai.request.max_tokens": 5,
        "gen_ai.request.n": 1, "gen_ai.response.model": whole.attributes["gen_ai.response.model"],
    }  # fmt: skip
    assert wanted.items() <= dict(whole.attributes).items()
    parts = [f"gen_ai.latency.{name}" for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")]
    assert sum(whole.attributes[name] for name in parts) == pytest.approx(whole.attributes["gen_ai.latency.e2e"], abs=1)


def test_a_request_without_a_caller_begins_a_trace(spans: tuple[TestClient, Any]) -> None:
    client, exporter = spans
    for _ in range(2):
        client.post("/v1/completions", json={"prompt": "the", "max_tokens": 2}, headers={"traceparent": "nonsense"})
    roots = [span for span in exporter.get_finished_spans() if span.name == "llm_request"]
    assert len({span.context.trace_id for span in roots}) == 2 and not any(span.parent for span in roots)


def test_what_cannot_be_traced_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", "demo", "--otlp-traces-endpoint", "localhost:4317"]) == 1
    assert "give a URL, such as http://localhost:4317" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    assert main(["serve", "demo", "--otlp-traces-endpoint", "http://localhost:4317"]) == 1
    assert EXTRA in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["http://localhost:4317", "grpc://localhost:4317", "http://localhost/v1/traces"])
def test_endpoints(endpoint: str) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp")
    tracing.check(endpoint)
    exporter = tracing._exporter(endpoint)
    assert ("http" in type(exporter).__module__.split(".")) == endpoint.endswith("traces")
    exporter.shutdown()
