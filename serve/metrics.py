"""Figures for Prometheus, under the names that dashboards of the best-known GPU engine read (`vllm:*`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mmjax import AsyncLLM, RequestOutput

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
COUNTERS = {  # engine counter -> (metric, meaning)
    "prefill_tokens": ("vllm:prompt_tokens", "prompt tokens run through the model"),
    "output_tokens": ("vllm:generation_tokens", "tokens generated"),
    "preemptions": ("vllm:num_preemptions", "requests set back for lack of pages"),
    "mm_cache_queries": ("vllm:mm_cache_queries", "media items looked up"),
    "mm_cache_hits": ("vllm:mm_cache_hits", "media items found processed"),
    "compiles_after_warmup": ("mmjax:compiles_after_warmup", "programs compiled after start; should stay 0"),
    "encoded_items": ("mmjax:encoded_items", "media items encoded on the device"),
}


class Metrics:
    """One registry per server. Counters are read from the engine when they are asked for."""

    def __init__(self, engine: AsyncLLM, model: str) -> None:
        self.engine = engine
        self.model = model
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._first = self._histogram("vllm:time_to_first_token_seconds", "seconds to the first token", SECONDS)
        self._each = self._histogram("vllm:time_per_output_token_seconds", "seconds per token after the first", SECONDS)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "seconds from arrival to the end", SECONDS)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "prompt tokens of a request", TOKENS)
        self._made = self._histogram("vllm:request_generation_tokens", "generated tokens of a request", TOKENS)
        self._ended: dict[str, int] = {}

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Any:
        whole = Histogram(name, meaning, ["model_name"], buckets=buckets, registry=self.registry)
        return whole.labels(self.model)

    def note(self, output: RequestOutput) -> None:
        """Count a request that has ended."""
        times, made = output.metrics, sum(len(answer.token_ids) for answer in output.outputs)
        self._prompt.observe(len(output.prompt_token_ids or ()))
        self._made.observe(made)
        for answer in output.outputs:
            reason = answer.finish_reason or "abort"
            self._ended[reason] = self._ended.get(reason, 0) + 1
        if times is None or times.first_token_time is None or times.finished_time is None:
            return
        self._first.observe(times.first_token_time - times.arrival_time)
        self._whole.observe(times.finished_time - times.arrival_time)
        if made > len(output.outputs):
            spent = times.finished_time - times.first_token_time
            self._each.observe(spent / (made / len(output.outputs) - 1))

    def collect(self) -> Iterator[Metric]:
        """Counters and gauges as they stand, for the registry."""
        counts = self.engine.llm.get_metrics()
        for name, (metric, meaning) in COUNTERS.items():
            counter = CounterMetricFamily(metric, meaning, labels=["model_name"])
            counter.add_metric([self.model], counts.get(name, 0))
            yield counter
        running, waiting, pages = self.engine.load()
        for metric, meaning, value in (
            ("vllm:num_requests_running", "requests on the device", running),
            ("vllm:num_requests_waiting", "requests that wait for room", waiting),
            ("vllm:kv_cache_usage_perc", "share of the cache's pages in use, 0 to 1", pages),
        ):
            gauge = GaugeMetricFamily(metric, meaning, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        ended = CounterMetricFamily("vllm:request_success", "requests ended", labels=["model_name", "finished_reason"])
        for reason, count in self._ended.items():
            ended.add_metric([self.model, reason], count)
        yield ended

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)
