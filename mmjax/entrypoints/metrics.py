"""Metrics for Prometheus, under the names that vLLM's dashboards read (`vllm:*`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from mmjax.engine.engine import TOKEN_SECONDS
from mmjax.engine.loaded_model import LoadedModel
from mmjax.types import PoolingRequestOutput, RequestMetrics, RequestOutput
from mmjax.types.metrics import Counter, Gauge, Histogram, Metric

# buckets are those of vLLM
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
OUTPUTS = (1, 2, 5, 10, 20)
TIMES = {  # histograms of the times of a request: (name, meaning, buckets)
    "first": ("vllm:time_to_first_token_seconds", "seconds to the first token", FIRST_TOKEN_SECONDS),
    "e2e": ("vllm:e2e_request_latency_seconds", "seconds from arrival to the end", REQUEST_SECONDS),
    "queue": ("vllm:request_queue_time_seconds", "seconds until a request is scheduled", REQUEST_SECONDS),
    "prefill": ("vllm:request_prefill_time_seconds", "seconds from scheduling to the first token", REQUEST_SECONDS),
    "decode": ("vllm:request_decode_time_seconds", "seconds from the first token to the last", REQUEST_SECONDS),
    "inference": ("vllm:request_inference_time_seconds", "seconds from scheduling to the last token", REQUEST_SECONDS),
    "per_token": (
        "vllm:request_time_per_output_token_seconds", "seconds per token of a request after the first", TOKEN_SECONDS
    ),
    "per_token_older": (
        "vllm:time_per_output_token_seconds", "request_time_per_output_token_seconds, by its older name", TOKEN_SECONDS
    ),
}  # fmt: skip
SIZES = {  # histograms of tokens of a request, in buckets up to the model's context length
    "prompt": ("vllm:request_prompt_tokens", "prompt tokens of a request"),
    "computed": ("vllm:request_prefill_kv_computed_tokens", "prompt tokens that were not in the prefix cache"),
    "output": ("vllm:request_generation_tokens", "generated tokens of a request"),
    "longest": ("vllm:request_max_num_generation_tokens", "generated tokens of the longest output of a request"),
    "max_tokens": ("vllm:request_params_max_tokens", "max_tokens of requests that set it"),
}
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

    name: of the model, their label. listener: also called with each finished request.
    """

    def __init__(self, model: LoadedModel, name: str, listener: Callable[[Any], None] | None = None) -> None:
        self.model = model
        self._listener = listener
        self.name = name
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._times = {key: self._histogram(*each) for key, each in TIMES.items()}
        buckets = one_two_five(model.max_model_len)
        self._sizes = {key: self._histogram(*each, buckets) for key, each in SIZES.items()}
        self._outputs = self._histogram("vllm:request_params_n", "outputs that a request wants", OUTPUTS)
        self._finished: dict[str, int] = {}

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Any:
        histogram = prometheus_client.Histogram(name, meaning, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self.name)

    def record(self, output: RequestOutput | PoolingRequestOutput) -> None:
        """Count a finished request. One for a vector has no times."""
        if self._listener is not None:
            self._listener(output)
        if isinstance(output, PoolingRequestOutput):
            self._sizes["prompt"].observe(len(output.prompt_token_ids))
            self._finished["stop"] = self._finished.get("stop", 0) + 1
            return
        times, lengths = output.metrics, [len(completion.token_ids) for completion in output.outputs]
        prompt_tokens = len(output.prompt_token_ids or ())
        self._sizes["prompt"].observe(prompt_tokens)
        self._sizes["computed"].observe(prompt_tokens - (output.num_cached_tokens or 0))
        self._sizes["output"].observe(sum(lengths))
        self._sizes["longest"].observe(max(lengths))
        self._outputs.observe(len(lengths))
        for completion in output.outputs:
            reason = completion.finish_reason or "abort"
            self._finished[reason] = self._finished.get(reason, 0) + 1
        if times is None:
            return
        if times.max_tokens:
            self._sizes["max_tokens"].observe(times.max_tokens)
        for key, seconds in _seconds(times, lengths):
            self._times[key].observe(seconds)

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
        yield self._of_engines("vllm:iteration_tokens_total", "tokens of a dispatch", "step_tokens")
        meaning = "seconds between tokens; those of one dispatch share the time since the last"
        yield self._of_engines("vllm:inter_token_latency_seconds", meaning, "inter_token_latency")
        yield from self._infos()

    def _of_engines(self, name: str, meaning: str, attribute: str) -> HistogramMetricFamily:
        """A histogram that the engines keep, summed over them."""
        each = [getattr(engine, attribute) for engine in self.model.engines]
        counts = itertools.accumulate(map(sum, zip(*(histogram.counts for histogram in each), strict=True)))
        bounds = [*map(floatToGoString, each[0].bounds), "+Inf"]
        family = HistogramMetricFamily(name, meaning, labels=["model_name"])
        total = sum(histogram.sum for histogram in each)
        family.add_metric([self.name], list(zip(bounds, counts, strict=True)), sum_value=total)
        return family

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
        sleeping = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 for the state that the engine is in", labels=["model_name", "sleep_state"]
        )
        for state in ("awake", "weights_offloaded", "discard_all"):
            sleeping.add_metric([self.name, state], self.model.sleep_state == state)
        yield sleeping
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


def one_two_five(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    steps = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    return tuple(itertools.takewhile(lambda step: step <= largest, steps))


def _seconds(times: RequestMetrics, lengths: Sequence[int]) -> Iterator[tuple[str, float]]:
    """(key of TIMES, seconds) of a request, as far as it came. lengths: tokens of its outputs."""
    arrival, scheduled, first = times.arrival_time, times.first_scheduled_time, times.first_token_time
    if scheduled is not None:
        yield "queue", scheduled - arrival
    if first is None or times.finished_time is None:
        return
    yield "first", first - arrival
    yield "e2e", times.finished_time - arrival
    last = times.finished_time if times.last_token_time is None else times.last_token_time
    yield "decode", last - first
    if scheduled is not None:
        yield "prefill", first - scheduled
        yield "inference", last - scheduled
    if sum(lengths) > len(lengths):
        seconds = (times.finished_time - first) / (sum(lengths) / len(lengths) - 1)
        yield from (("per_token", seconds), ("per_token_older", seconds))


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
