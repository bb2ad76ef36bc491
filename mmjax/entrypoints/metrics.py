"""Metrics for Prometheus, under the names that vLLM's dashboards read (`vllm:*`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.samples import Sample

from mmjax.engine.loaded_model import LoadedModel
from mmjax.types import PoolingRequestOutput, RequestOutput
from mmjax.types.metrics import Counter, Gauge, Histogram, Metric

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
COUNTERS = {  # engine counter -> (metric, meaning)
    "prefill_tokens": ("vllm:prompt_tokens", "prompt tokens run through the model"),
    "output_tokens": ("vllm:generation_tokens", "tokens generated"),
    "preemptions": ("vllm:num_preemptions", "requests preempted because the KV cache was full"),
    "prefix_cache_queries": ("vllm:prefix_cache_queries", "prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("vllm:prefix_cache_hits", "prompt tokens found in the prefix cache"),
    "mm_cache_queries": ("vllm:mm_cache_queries", "media items looked up in the cache of processed media"),
    "mm_cache_hits": ("vllm:mm_cache_hits", "media items found in the cache of processed media"),
    "compiles_after_warmup": ("mmjax:compiles_after_warmup", "programs compiled after start; should stay 0"),
    "encoded_items": ("mmjax:encoded_items", "media items encoded on the device"),
}


class EngineMetrics:
    """The metrics of one LLM or server. Counters are read from the engine when they are asked for.

    name: of the model, their label.
    """

    def __init__(self, model: LoadedModel, name: str) -> None:
        self.model = model
        self.name = name
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "seconds to the first token", SECONDS)
        self._tpot = self._histogram("vllm:time_per_output_token_seconds", "seconds per token after the first", SECONDS)
        self._e2e_latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "seconds from arrival to the end", SECONDS
        )
        self._prompt_tokens = self._histogram("vllm:request_prompt_tokens", "prompt tokens of a request", TOKENS)
        self._output_tokens = self._histogram("vllm:request_generation_tokens", "generated tokens of a request", TOKENS)
        self._finished: dict[str, int] = {}

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Any:
        histogram = prometheus_client.Histogram(name, meaning, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self.name)

    def record(self, output: RequestOutput | PoolingRequestOutput) -> None:
        """Count a finished request. One for a vector has no times."""
        if isinstance(output, PoolingRequestOutput):
            self._prompt_tokens.observe(len(output.prompt_token_ids))
            self._finished["stop"] = self._finished.get("stop", 0) + 1
            return
        times = output.metrics
        output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self._prompt_tokens.observe(len(output.prompt_token_ids or ()))
        self._output_tokens.observe(output_tokens)
        for completion in output.outputs:
            reason = completion.finish_reason or "abort"
            self._finished[reason] = self._finished.get(reason, 0) + 1
        if times is None or times.first_token_time is None or times.finished_time is None:
            return
        self._ttft.observe(times.first_token_time - times.arrival_time)
        self._e2e_latency.observe(times.finished_time - times.arrival_time)
        if output_tokens > len(output.outputs):
            decode_s = times.finished_time - times.first_token_time
            self._tpot.observe(decode_s / (output_tokens / len(output.outputs) - 1))

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """The current counters and gauges; the registry calls this."""
        counts = self.model.counters()
        for name, (metric, meaning) in COUNTERS.items():
            counter = CounterMetricFamily(metric, meaning, labels=["model_name"])
            counter.add_metric([self.name], counts.get(name, 0))
            yield counter
        running, waiting, used = self.model.load()
        for metric, meaning, value in (
            ("vllm:num_requests_running", "requests on the device", running),
            ("vllm:num_requests_waiting", "requests waiting to be scheduled", waiting),
            ("vllm:kv_cache_usage_perc", "share of the KV cache's blocks in use, 0 to 1", used),
            ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc under its older name", used),
        ):
            gauge = GaugeMetricFamily(metric, meaning, labels=["model_name"])
            gauge.add_metric([self.name], value)
            yield gauge
        finished = CounterMetricFamily(
            "vllm:request_success", "finished requests", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([self.name, reason], count)
        yield finished
        yield from self._infos()

    def _infos(self) -> Iterator[prometheus_client.Metric]:
        """What gateways read from labels: the size of each engine's KV cache, and which LoRA adapters are loaded."""
        names = ["engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"]
        cache = GaugeMetricFamily("vllm:cache_config_info", "KV cache of an engine", labels=["model_name", *names])
        for number, engine in enumerate(self.model.engines):
            pool = engine.block_pool
            # without block 0, which no sequence gets
            values = (number, pool.block_size, pool.num_blocks - 1, engine.scheduler.prefix_caching)
            cache.add_metric([self.name, *map(str, values)], 1)
        yield cache
        names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        adapters = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters and the time: none here", labels=names)
        adapters.add_metric(["0", "", ""], time.time())
        yield adapters

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)

    def snapshot(self) -> list[Metric]:
        """The current metrics as objects; a counter's name is without `_total`."""
        found: list[Metric] = []
        for family in self.registry.collect():
            if family.type == "histogram":
                found += _histograms(family.name, family.samples)
            elif family.type == "gauge":
                found += [Gauge(family.name, dict(sample.labels), sample.value) for sample in family.samples]
            else:
                samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                found += [Counter(family.name, dict(sample.labels), int(sample.value)) for sample in samples]
        return found


def _histograms(name: str, samples: list[Sample]) -> list[Histogram]:
    """The histograms of one family, which has one for each of its labels."""
    found: dict[tuple[str, ...], Histogram] = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key != "le"}
        histogram = found.setdefault(tuple(labels.values()), Histogram(name, labels, 0, 0.0, {}))
        if sample.name.endswith("_bucket"):
            histogram.buckets[sample.labels["le"]] = int(sample.value)
        elif sample.name.endswith("_count"):
            histogram.count = int(sample.value)
        elif sample.name.endswith("_sum"):
            histogram.sum = sample.value
    return list(found.values())
