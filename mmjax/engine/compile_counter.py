"""Counts the programs that XLA is asked to compile: a running engine should compile none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@dataclasses.dataclass
class CompileCounter:
    """count: programs requested, the same on every run. loaded: those of them that the persistent cache had."""

    count: int = 0
    loaded: int = 0

    @property
    def cache(self) -> str:
        """How much the persistent cache had: "cold" (nothing), "warm" (everything) or "mixed"."""
        return "cold" if not self.loaded else "warm" if self.loaded == self.count else "mixed"

    def reset(self) -> None:
        self.count = self.loaded = 0

    def on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def on_event(self, event: str, **_: object) -> None:
        self.loaded += event == "/jax/compilation_cache/cache_hits"


@contextmanager
def count_compiles() -> Iterator[CompileCounter]:
    """Count until the end of the `with` block, in all threads."""
    compiles = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(compiles.on_duration)
    jax.monitoring.register_event_listener(compiles.on_event)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(compiles.on_duration)
        jax.monitoring.unregister_event_listener(compiles.on_event)
