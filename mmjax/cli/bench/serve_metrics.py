"""The figures of `mmjax bench serve`, with the names, definitions and form that vLLM's users know.

TTFT    from sending the request to the first output
TPOT    (end - first output) / (output tokens - 1), of requests with several tokens
ITL     between two chunks of a stream; a server may put several tokens into one
E2EL    from sending the request to the last output
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.cli.bench import METRICS

SHOWN_ERRORS = 10
WIDTH = 50


@dataclasses.dataclass(frozen=True)
class RequestResult:
    """One request. Times in seconds; start: on a common clock. gaps: between chunks of the output. error: why it
    failed; the other fields are then of no use."""

    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    gaps: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    audio_s: float = 0.0
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None if there is none."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclasses.dataclass(frozen=True)
class Load:
    """How requests are sent. request_rate: per second, inf for all at once. burstiness: the shape of the gamma
    distribution of the gaps between requests; 1: a Poisson process. max_concurrency: None for no limit."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is reported. goals: upper limits in ms that a good request keeps."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ServeResult:
    """A run. duration: from the first request to the end of the last one, in seconds."""

    load: Load
    selection: Selection
    requests: Sequence[RequestResult]
    duration: float

    @property
    def completed(self) -> list[RequestResult]:
        return [request for request in self.requests if request.error is None]

    @property
    def errors(self) -> list[str]:
        return [request.error for request in self.requests if request.error is not None]

    def seconds(self, metric: str) -> list[float]:
        """The values of a metric over the completed requests."""
        done = self.completed
        if metric == "itl":
            return [gap for request in done for gap in request.gaps]
        if metric == "tpot":
            return [request.tpot for request in done if request.tpot is not None]
        return [request.ttft if metric == "ttft" else request.latency for request in done]

    def is_good(self, request: RequestResult) -> bool:
        """Whether a request keeps all goals. One without a second token keeps that of `tpot`."""
        values = {"ttft": request.ttft, "tpot": request.tpot or 0.0, "e2el": request.latency}
        return all(values[name] * 1e3 <= limit for name, limit in self.selection.goals.items())

    @property
    def peak_concurrency(self) -> int:
        """The most requests in flight at once."""
        ends = [(request.start + request.latency, -1) for request in self.completed]
        changes = sorted([*((request.start, 1) for request in self.completed), *ends])
        return max(np.cumsum([change for _, change in changes]), default=0)

    def statistics(self, metric: str) -> dict[str, float]:
        """Mean, median, standard deviation and percentiles in ms; empty if nothing was measured."""
        values = np.asarray(self.seconds(metric)) * 1e3
        if not values.size:
            return {}
        found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
        found |= {f"p{percentile:g}": np.percentile(values, percentile) for percentile in self.selection.percentiles}
        return {name: float(value) for name, value in found.items()}

    def as_json(self) -> dict[str, Any]:
        """The figures, with the keys of vLLM's result files."""
        done = self.completed
        inputs, outputs = sum(each.input_tokens for each in done), sum(each.output_tokens for each in done)
        rate = self.load.request_rate
        figures: dict[str, Any] = {
            "num_prompts": len(self.requests),
            "request_rate": "inf" if math.isinf(rate) else rate,
            "burstiness": self.load.burstiness,
            "max_concurrency": self.load.max_concurrency,
            "duration": self.duration,
            "completed": len(done),
            "failed": len(self.errors),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(done) / self.duration,
            "output_throughput": outputs / self.duration,
            "total_token_throughput": (inputs + outputs) / self.duration,
            "max_concurrent_requests": int(self.peak_concurrency),
            "rtfx": sum(each.audio_s for each in done) / self.duration,
            "errors": self.errors[:SHOWN_ERRORS],
        }
        if self.selection.goals:
            figures["request_goodput"] = sum(map(self.is_good, done)) / self.duration
        for metric in METRICS:
            figures |= {f"{name}_{metric}_ms": value for name, value in self.statistics(metric).items()}
        return figures

    def as_table(self) -> str:
        """The figures as vLLM prints them."""
        figures = self.as_json()
        rows = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
        for name, (label, digits) in ROWS.items():
            value = figures.get(name)
            if value is not None and (name != "rtfx" or value) and value != "inf":
                rows.append(f"{label:<40} {value:<10.{digits}f}")
        for metric in self.selection.metrics:
            short, heading = METRICS[metric]
            rows.append(f"{heading:-^{WIDTH}}")
            statistics = self.statistics(metric)
            rows += [
                f"{f'{name.capitalize()} {short} (ms):':<40} {value:<10.2f}"
                for name, value in statistics.items()
                if name != "std"
            ]
            if not statistics:
                rows.append("not measured")
        rows.append("=" * WIDTH)
        if self.errors:
            rows.append(f"The first errors of {len(self.errors)}:")
            rows += [f"  {error}" for error in self.errors[:SHOWN_ERRORS]]
        return "\n".join(rows)


ROWS: Mapping[str, tuple[str, int]] = {
    "completed": ("Successful requests:", 0),
    "failed": ("Failed requests:", 0),
    "max_concurrency": ("Maximum request concurrency:", 0),
    "request_rate": ("Request rate configured (RPS):", 2),
    "duration": ("Benchmark duration (s):", 2),
    "total_input_tokens": ("Total input tokens:", 0),
    "total_output_tokens": ("Total generated tokens:", 0),
    "request_throughput": ("Request throughput (req/s):", 2),
    "request_goodput": ("Request goodput (req/s):", 2),
    "output_throughput": ("Output token throughput (tok/s):", 2),
    "max_concurrent_requests": ("Peak concurrent requests:", 0),
    "total_token_throughput": ("Total token throughput (tok/s):", 2),
    "rtfx": ("RTFx (audio s/s):", 2),
}
"""key of `ServeResult.as_json` -> (label, digits after the point)."""
