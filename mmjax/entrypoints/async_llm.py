"""`AsyncLLM`: runs the engines on a thread of their own, for callers on an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from mmjax.chat import ChatOptions
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits.structured_output import CompiledGrammar
from mmjax.engine.output_processor import OutputProcessor
from mmjax.entrypoints.llm import LLM
from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.completion import Delta
from mmjax.outputs.request import EngineRequest, GenerateRequest, PoolingRequest
from mmjax.types import PoolingParams, PoolingRequestOutput, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
Output = TypeVar("Output", covariant=True)


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, because of an error or because it was closed. No request can be served."""


class RequestStream(Generic[Output]):
    """The caller's side of a request. The engine's thread runs the request; its deltas arrive on the caller's event
    loop.

    output: None until the request has finished. closed: the caller has dropped the stream, or the request has failed.
    """

    def __init__(self, start: Callable[[], EngineRequest[Output]], *, streaming: bool) -> None:
        self.streaming = streaming
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


class AsyncLLM:
    """An LLM for many concurrent callers; `llm` must not be used for generation beside it.

    Prompts are processed on the LLM's worker threads. Only the engine's thread uses the engines: between steps, it
    makes the calls that other threads have put into its inbox. The event loop never waits for either.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.fault: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: close
        self._streams: set[RequestStream[object]] = set()
        self._stream_of: dict[int, RequestStream[object]] = {}  # by the id of each running sequence
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> LoadedModel:
        return self.llm.model

    # -- prompts -----------------------------------------------------------------------------------------------------

    async def prepare(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Process one prompt as `LLM.generate` takes it. RequestError for a prompt that cannot be processed."""
        return await self._on_worker(self.model.process, prompt, tokenization_kwargs)

    async def prepare_chat(
        self, messages: Any, tokenization_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EngineInput:
        """Process one conversation as `LLM.chat` takes it. No thread waits while its media are fetched.

        options: fields of `mmjax.chat.ChatOptions`.
        """
        chat = self.model.chat
        rendered = await self._on_worker(lambda: chat.render(messages, ChatOptions(**options)))
        prompt = await chat.fetch_async(rendered)
        return await self._on_worker(self.model.process_chat, prompt, tokenization_kwargs)

    async def prepare_from_urls(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Process a prompt whose media are URLs (http, https, data, file), and whose embeddings are base64 tensors."""
        return await self.prepare(await self.model.fetch(prompt), tokenization_kwargs)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text. add_special_tokens: whether the tokenizer adds its special tokens around it."""
        return await self._on_worker(functools.partial(self.model.encode, text, add_special_tokens=add_special_tokens))

    async def texts(self, token_lists: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several lists, on a worker thread: they may be long."""
        return await self._on_worker(lambda: [self.decode(tokens) for tokens in token_lists])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        return self.model.decode(tokens)

    # -- parameters --------------------------------------------------------------------------------------------------

    async def compile_grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        """Check parameters, and compile their grammar, if any, on a worker thread, where it delays no other request.

        RequestError for parameters that this model cannot serve.
        """
        self.model.params_checker.check_sampling(params)
        if params.structured_outputs is None:
            return None
        return await self._on_worker(self.model.compile_grammar, params)

    def check_length(self, engine_input: EngineInput, params: SamplingParams) -> None:
        """ValidationError when the prompt leaves too little room for max_tokens."""
        self.model.params_checker.check_max_tokens(len(engine_input.token_ids), params)

    # -- requests ----------------------------------------------------------------------------------------------------

    async def generate(
        self, engine_input: EngineInput, params: SamplingParams, grammar: CompiledGrammar | None = None
    ) -> RequestOutput:
        """Generate the output of one prompt. If this is cancelled or fails, the request's blocks are freed at once."""
        return await self._finish(self.submit(engine_input, params, grammar, streaming=False))

    async def generate_all(
        self, requests: Sequence[tuple[EngineInput, SamplingParams]], grammar: CompiledGrammar | None = None
    ) -> list[RequestOutput]:
        """Generate the outputs of several prompts together, in their order. If one fails, the others are dropped."""
        streams: list[RequestStream[RequestOutput]] = []
        try:
            for engine_input, params in requests:
                streams.append(self.submit(engine_input, params, grammar, streaming=False))
            return [await self._finish(stream) for stream in streams]
        finally:
            for stream in streams:
                self.drop(stream)

    async def embed(self, engine_input: EngineInput, params: PoolingParams) -> PoolingRequestOutput:
        """The embedding of one prompt. RequestError unless the model was loaded to pool."""
        self.check()
        self.model.params_checker.check_pooling("embed")
        [checked] = self.model.params_checker.pooling_params(params, 1, "embed")
        stream = RequestStream(lambda: PoolingRequest(self.model, engine_input, checked), streaming=False)
        self._submit(stream)
        return await self._finish(stream)

    def submit(
        self,
        engine_input: EngineInput,
        params: SamplingParams,
        grammar: CompiledGrammar | None = None,
        *,
        streaming: bool,
    ) -> RequestStream[RequestOutput]:
        """Queue a request. The caller must `drop` the stream in the end.

        grammar: from `compile_grammar`; without it, the engine's thread compiles it. EngineDeadError if that thread has
        ended, RequestError for parameters that this model cannot serve.
        """
        self.check()
        self.model.params_checker.check_sampling(params)
        stream = RequestStream(lambda: GenerateRequest(self.model, engine_input, params, grammar), streaming=streaming)
        self._submit(stream)
        return stream

    async def stream(self, stream: RequestStream[RequestOutput]) -> AsyncIterator[Delta]:
        """The deltas of a streaming request, step by step. Closing this early aborts the request."""
        try:
            async for delta in stream.deltas():
                yield delta
        finally:
            self.drop(stream)

    def drop(self, stream: RequestStream[object]) -> None:
        """Release a request. If it is still running, it is aborted."""
        self._streams.discard(stream)
        if stream.output is None and not stream.closed:
            stream.closed = True
            self._inbox.put(lambda: self._abort(stream))

    def _submit(self, stream: RequestStream[object]) -> None:
        self._streams.add(stream)
        self._inbox.put(lambda: self._start(stream))
        if self._closed or self.fault is not None:  # the engine's thread may have ended before it saw this stream
            stream.fail(self._dead_error())

    async def _finish(self, stream: RequestStream[Output]) -> Output:
        """Wait until a request has finished."""
        try:
            async for _ in stream.deltas():
                pass
        finally:
            self.drop(stream)
        assert stream.output is not None
        return stream.output

    async def _on_worker(self, work: Callable[..., T], *args: Any) -> T:
        """Call a slow function on one of the LLM's worker threads."""
        return await asyncio.get_running_loop().run_in_executor(self.llm.workers, work, *args)

    async def alignment_scores(self, engine_input: EngineInput, token_ids: Sequence[int]) -> np.ndarray:
        """f32[A, T, U]: for each alignment head, token of a transcript and step of the encoder, the score of its cross
        attention before the softmax. engine_input: with the recording, as its only item."""
        [entry] = engine_input.items
        engine = min(self.model.engines, key=lambda each: each.num_unfinished)
        tokens = np.asarray(token_ids, np.int32)
        scores = await self.between_steps(lambda: engine.align(entry.modality, entry.item, tokens))
        found = await asyncio.wrap_future(scores)
        return await self._on_worker(lambda: np.asarray(found)[:, : len(tokens)])

    # -- the engine --------------------------------------------------------------------------------------------------

    async def between_steps(self, work: Callable[[], T]) -> T:
        """Call a function on the engine's thread, between two steps."""
        self.check()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            try:
                result = work()
            except Exception as error:
                if done.set_running_or_notify_cancel():
                    done.set_exception(error)
            else:
                if done.set_running_or_notify_cancel():
                    done.set_result(result)

        self._inbox.put(call)
        return await asyncio.wrap_future(done)

    def load(self) -> tuple[int, int, float]:
        """(running sequences, waiting sequences, share of the KV cache's blocks in use) at this moment."""
        return self.model.load()

    @property
    def open(self) -> int:
        """The number of requests that are queued or running."""
        return len(self._streams)

    def check(self) -> None:
        """EngineDeadError if the engine's thread has ended."""
        if self._closed or self.fault is not None or not self._thread.is_alive():
            raise self._dead_error()

    def close(self) -> None:
        """Abort all requests and end the engine's thread. Idempotent."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError("The engine has stopped" + (f": {self.fault}" if self.fault else "."))

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._handle_inbox():
                for engine in self.model.engines:
                    if engine.has_work:
                        self._publish(engine.step())
        except BaseException as error:
            logger.exception("the engine has stopped")
            self.fault = error
        finally:
            for stream in list(self._streams):
                stream.fail(self._dead_error())

    def _handle_inbox(self) -> bool:
        """Make the calls in the inbox; while the engines have no work, wait for one. Returns False to close."""
        busy = any(engine.has_work for engine in self.model.engines)
        while True:
            try:
                call = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if call is None:
                for stream in list(self._streams):
                    self._abort(stream)
                return False
            call()
            busy = True  # make the other calls in the inbox without waiting for more

    def _start(self, stream: RequestStream[object]) -> None:
        stream.start()
        for state in stream.states:
            self._stream_of[state.seq.seq_id] = stream

    def _abort(self, stream: RequestStream[object]) -> None:
        stream.abort()
        self._forget(stream)

    def _forget(self, stream: RequestStream[object]) -> None:
        for state in stream.states:
            self._stream_of.pop(state.seq.seq_id, None)

    def _publish(self, changed: Sequence[OutputProcessor]) -> None:
        """Send the results of a step to the callers."""
        streams: dict[RequestStream[object], None] = {}
        for state in changed:
            stream = self._stream_of.get(state.seq.seq_id)
            if stream is not None:
                stream.record_times(state)
                streams[stream] = None
        for stream in streams:
            try:
                ended = stream.publish()
            except Exception as error:  # of this request only; the others continue
                stream.closed = ended = True
                stream.fail(error)
                stream.abort()
            if ended:
                self._forget(stream)
