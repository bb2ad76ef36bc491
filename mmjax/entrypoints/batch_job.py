"""Runs the prompts of one call to completion."""

from __future__ import annotations

import concurrent.futures
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from tqdm import tqdm

from mmjax.engine.engine import Engine
from mmjax.outputs.request import EngineRequest

Output = TypeVar("Output")


class TqdmBar(Protocol):
    """The part of `tqdm` that is used."""

    def update(self, n: int) -> object: ...

    def close(self) -> object: ...


UseTqdm = bool | Callable[..., TqdmBar]
"""Whether to show progress bars, or a function that makes them in place of `tqdm`."""

MAX_PROCESSED_AHEAD = 32  # prompts processed before the engine takes them; bounds the memory for decoded media

Start = Callable[[], EngineRequest[Output]]
"""Starts a request. Called on the thread that steps the engines."""

Prepare = Callable[[], Start[Output]]
"""Processes a prompt. Called on a worker thread."""


class BatchJob(Generic[Output]):
    """Prepares prompts on worker threads, in order, while the engines already run the first ones. As a context manager,
    it aborts every request if an exception leaves it."""

    def __init__(
        self, engines: Sequence[Engine], workers: concurrent.futures.Executor, use_tqdm: UseTqdm, total: int
    ) -> None:
        self.engines = engines
        self.workers = workers
        self.outputs: dict[int, Output] = {}
        self._unprepared: deque[tuple[int, Prepare[Output]]] = deque()
        self._prepared: deque[tuple[int, concurrent.futures.Future[Start[Output]]]] = deque()
        self._running: dict[int, tuple[int, EngineRequest[Output]]] = {}  # by the id of each sequence
        self._bars = [_progress_bar(use_tqdm, total, name) for name in ("Rendering prompts", "Processed prompts")]

    def __enter__(self) -> BatchJob[Output]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._abort()
        finally:
            for bar in self._bars:
                bar.close()

    def submit(self, i: int, prepare: Prepare[Output]) -> None:
        """Queue prompt i."""
        self._unprepared.append((i, prepare))

    def run(self) -> dict[int, Output]:
        """Run all prompts to completion. Returns outputs by prompt number. Raises the first error of a prompt."""
        while self._unprepared or self._prepared or self._running:
            self._start_prepared(wait=not self._running)
            for engine in self.engines:
                for state in engine.step():
                    i, request = self._running.get(state.seq.seq_id, (-1, None))
                    if request is None:
                        continue  # left from an earlier call that was interrupted
                    request.check()
                    request.record_times(state)
                    if request.finished and i not in self.outputs:
                        self._finish(i, request)
        return self.outputs

    def _start_prepared(self, *, wait: bool) -> None:
        """Start the requests whose prompts are prepared, and prepare the next prompts. wait: for the first one."""
        while self._unprepared and len(self._prepared) < MAX_PROCESSED_AHEAD:
            i, prepare = self._unprepared.popleft()
            self._prepared.append((i, self.workers.submit(prepare)))
        while self._prepared and (wait or self._prepared[0][1].done()):
            i, future = self._prepared.popleft()
            request = future.result()()
            for state in request.states:
                self._running[state.seq.seq_id] = (i, request)
            self._bars[0].update(1)
            wait = False

    def _finish(self, i: int, request: EngineRequest[Output]) -> None:
        self.outputs[i] = request.output()
        for state in request.states:
            del self._running[state.seq.seq_id]
        self._bars[1].update(1)

    def _abort(self) -> None:
        """Abort all requests, and let the engines finish the dispatches in flight."""
        for _, future in self._prepared:
            future.cancel()
        for _, request in self._running.values():
            request.abort()
        for engine in self.engines:
            while engine.has_work:
                engine.step()


def _progress_bar(use_tqdm: UseTqdm, total: int, name: str) -> TqdmBar:
    make: Callable[..., TqdmBar] = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc=name, disable=not use_tqdm, dynamic_ncols=True)
