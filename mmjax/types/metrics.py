"""The forms in which `LLM.get_metrics` returns metrics. Names and fields are those of vLLM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Metric:
    """A metric of one engine. labels: what it is about, such as the name of the model."""

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass
class Vector(Metric):
    """Several counters in order. mmjax has no such metric; scripts ask for the type."""

    values: list[int]


@dataclass
class Gauge(Metric):
    """A number at this moment."""

    value: float


@dataclass
class Histogram(Metric):
    """Observed values. buckets: by their upper limit, as text, the number of values up to it; the last is "+Inf"."""

    count: int
    sum: float
    buckets: dict[str, int]
