"""Counts compilations by XLA. A running engine should not compile anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@dataclasses.dataclass
class CompileCounter:
    """count: programs that XLA was asked to compile, the same on every run. loaded: how many of them came from the
    persistent cache instead."""

    count: int = 0
    loaded: int = 0

    @property
    def cache(self) -> str:
        """Whether the persistent cache held all programs ("warm"), none ("cold") or some ("mixed")."""
        return "cold" if not self.loaded else "warm" if self.loaded == self.count else "mixed"

    def reset(self) -> None:
        self.count = self.loaded = 0

    def on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def on_event(self, event: str, **_: object) -> None:
        self.loaded += event == "/jax/compilation_cache/cache_hits"


@contextmanager
def count_compiles() -> Iterator[CompileCounter]:
    """Count compilations of all threads until the end of the `with` block."""
    compiles = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(compiles.on_duration)
    jax.monitoring.register_event_listener(compiles.on_event)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(compiles.on_duration)
        jax.monitoring.unregister_event_listener(compiles.on_event)
