"""Counts of observed values, in the buckets of a Prometheus histogram."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class Histogram:
    """How many values fell into each bucket. bounds: the upper limits of the buckets, ascending, without infinity.

    One thread observes; others may read, and then see a count late, but none twice.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that was observed so many times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times
