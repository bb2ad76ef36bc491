"""The thread that calls device programs, in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

Out = TypeVar("Out")
P = ParamSpec("P")


class DeviceQueue:
    """Calls programs one after the other on a thread of its own. call_s: seconds spent inside the calls.

    On a GPU the thread that launches the kernels of a decode dispatch is busy for as long as the GPU runs them (92 % of
    the wall time at batch 1); on the CPU the call itself computes. Meanwhile the engine's thread reads the results of
    the previous dispatch.
    """

    def __init__(self) -> None:
        self.call_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._calls: list[Future[Any]] = []

    def run(self, program: Callable[P, Out], *args: P.args, **kwargs: P.kwargs) -> Future[Out]:
        """Queue a call of a program that belongs to the next step."""
        future = self.run_apart(program, *args, **kwargs)
        self._calls.append(future)
        return future

    def run_apart(self, program: Callable[P, Out], *args: P.args, **kwargs: P.kwargs) -> Future[Out]:
        """Queue a call of a program that belongs to no step: its error is the caller's alone."""

        def call() -> Out:
            start = time.perf_counter()
            try:
                return program(*args, **kwargs)
            finally:
                self.call_s += time.perf_counter() - start

        return self._thread.submit(call)

    def take_calls(self) -> list[Future[Any]]:
        """The calls queued since the last `take_calls`."""
        calls, self._calls = self._calls, []
        return calls
