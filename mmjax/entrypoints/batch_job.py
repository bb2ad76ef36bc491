"""One call for many outputs."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from mmjax.engine.loaded_model import LoadedModel
from mmjax.inputs.input_processor import EngineInput

Progress = bool | Callable[..., Any]


MAX_PROCESSED_AHEAD = 32  # prompts rendered before the engine has taken them: bounds the decoded media held at once


class BatchJob:
    """One call for answers: prompts are rendered on threads, in order, while the engine already runs the first."""

    def __init__(
        self,
        model: LoadedModel,
        start: Callable[[EngineInput, Any], Any],
        workers: concurrent.futures.Executor,
        use_tqdm: Progress,
        total: int,
    ) -> None:
        self.model = model
        self.start = start
        self.workers = workers
        self.unseen: deque[tuple[int, Callable[[], EngineInput], Any]] = deque()
        self.waiting: deque[tuple[int, concurrent.futures.Future[EngineInput], Any]] = deque()
        self.open: dict[int, tuple[int, Any]] = {}
        self.runs: dict[int, Any] = {}
        self.bars = [_bar(use_tqdm, total, name) for name in ("Rendering prompts", "Processed prompts")]

    def submit(self, i: int, render: Callable[[], EngineInput], params: Any) -> None:
        """Queue prompt i, which `render` renders on a thread."""
        self.unseen.append((i, render, params))

    def run(self) -> dict[int, Any]:
        """Run everything to its end: outputs by index."""
        outputs = {}
        engines = self.model.engines
        while self.unseen or self.waiting or self.open:
            self._admit(block=not self.open)
            for engine in engines:
                for state in engine.step():
                    i, request = self.open.get(state.seq.seq_id, (-1, None))
                    if request is None:
                        continue  # of an earlier call that was interrupted
                    request.record_times(state)
                    if request.finished and i not in outputs:
                        outputs[i] = request.output()
                        for each in request.states:
                            self.open.pop(each.seq.seq_id)
                        self.bars[1].update(1)
        return outputs

    def _admit(self, *, block: bool) -> None:
        """Hand rendered prompts to the engine and have the next ones rendered; `block` waits for one."""
        while self.unseen and len(self.waiting) < MAX_PROCESSED_AHEAD:
            i, render, params = self.unseen.popleft()
            self.waiting.append((i, self.workers.submit(render), params))
        while self.waiting and (block or self.waiting[0][1].done()):
            i, future, params = self.waiting.popleft()
            request = self.start(future.result(), params)
            self.runs[i] = request
            for state in request.states:
                self.open[state.seq.seq_id] = (i, request)
            self.bars[0].update(1)
            block = False

    def abort(self) -> None:
        """Drop whatever is queued or running, and let the device come to rest."""
        for _, future, _ in self.waiting:
            future.cancel()
        for request in self.runs.values():
            request.abort()
        for engine in self.model.engines:
            while engine.has_work:
                engine.step()

    def close(self) -> None:
        """Take the progress bars down."""
        for bar in self.bars:
            bar.close()


def _bar(use_tqdm: Progress, total: int, name: str) -> Any:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc=name, disable=not use_tqdm, dynamic_ncols=True)
