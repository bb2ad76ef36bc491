"""The caller's side of a request that another thread runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar

from mmjax.engine.output_processor import OutputProcessor
from mmjax.outputs.completion import Delta
from mmjax.outputs.request import EngineRequest

Output = TypeVar("Output", covariant=True)


class RequestStream(Generic[Output]):
    """The caller's side of a request. The engine's thread runs the request; its deltas arrive on the caller's event
    loop.

    request_id: the caller's name of the request. output: None until the request has finished. closed: the caller has
    dropped the stream, or the request has failed.
    """

    def __init__(self, start: Callable[[], EngineRequest[Output]], *, streaming: bool, request_id: str = "") -> None:
        self.streaming = streaming
        self.request_id = request_id
        self.output: Output | None = None
        self.closed = False
        self._start = start
        self._request: EngineRequest[Output] | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()  # None: the request has finished

    async def deltas(self) -> AsyncIterator[Delta]:
        """The deltas of a streaming request, until it finishes. Raises the error if it fails."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def fail(self, error: BaseException) -> None:
        """Raise an error on the caller's side. May be called from any thread."""
        self._put(error)

    # -- on the engine's thread --------------------------------------------------------------------------------------

    @property
    def states(self) -> Sequence[OutputProcessor]:
        """The output processors of the request; none before it has started."""
        return () if self._request is None else self._request.states

    def start(self) -> None:
        """Start the request, unless its caller has dropped it."""
        if self.closed:
            return
        try:
            self._request = self._start()
        except Exception as error:  # of this request only; the others continue
            self.closed = True
            self.fail(error)

    def record_times(self, state: OutputProcessor) -> None:
        """Record that one of the outputs has changed now."""
        if self._request is not None:
            self._request.record_times(state)

    def publish(self) -> bool:
        """Send new deltas to the caller. Returns whether the request has finished. Raises its error if it failed."""
        assert self._request is not None
        self._request.check()
        if self.streaming:
            for delta in self._request.new_deltas():
                self._put(delta)
        if not self._request.finished:
            return False
        self.output = self._request.output()
        self._put(None)
        return True

    def abort(self) -> None:
        """Abort the request, if it has started."""
        if self._request is not None:
            self._request.abort()

    def _put(self, item: Delta | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the caller's loop is closed
            self.closed = True
