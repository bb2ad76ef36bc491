"""`AsyncLLM`: the engines on a thread of their own, for callers on an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from mmjax.chat import ChatOptions
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits.structured_output import CompiledGrammar
from mmjax.engine.output_processor import OutputProcessor
from mmjax.entrypoints.llm import LLM
from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.completion import Delta
from mmjax.outputs.request import EngineRequest, GenerateRequest, PoolingRequest
from mmjax.types import PoolingParams, PoolingRequestOutput, RequestOutput, SamplingParams, ValidationError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Output = TypeVar("Output", covariant=True)


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by an error or because it was closed. No request can be served."""


class RequestStream(Generic[Output]):
    """A request as its caller sees it. The engine's thread runs it; its deltas and its end arrive on the caller's event
    loop.

    output: None until the request has ended. closed: the caller has dropped it, or it has failed.
    """

    def __init__(self, start: Callable[[], EngineRequest[Output]], *, streaming: bool) -> None:
        self.streaming = streaming
        self.output: Output | None = None
        self.closed = False
        self._start = start
        self._request: EngineRequest[Output] | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()  # None: the request has ended

    async def deltas(self) -> AsyncIterator[Delta]:
        """The deltas of a streaming request, until it ends. Raises what made it fail."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def fail(self, error: BaseException) -> None:
        """Raise an error on the caller's side. May be called on any thread."""
        self._put(error)

    # -- on the engine's thread --------------------------------------------------------------------------------------

    @property
    def states(self) -> Sequence[OutputProcessor]:
        """The states of the request's outputs; none before it has been started."""
        return () if self._request is None else self._request.states

    def start(self) -> None:
        """Start the request, unless its caller has dropped it."""
        if self.closed:
            return
        try:
            self._request = self._start()
        except Exception as error:  # this request's own: the others go on
            self.closed = True
            self.fail(error)

    def record_times(self, state: OutputProcessor) -> None:
        """Note the time at which one of the outputs changed."""
        if self._request is not None:
            self._request.record_times(state)

    def publish(self) -> bool:
        """Send the caller what is new. Returns whether the request has ended. Raises what went wrong with it."""
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
        """End the request, if it has been started."""
        if self._request is not None:
            self._request.abort()

    def _put(self, item: Delta | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the caller's loop is closed
            self.closed = True


class AsyncLLM:
    """An LLM for many concurrent callers; `llm` must not be used for generation beside it.

    Prompts are processed on the LLM's worker threads. One thread alone uses the engines: it calls what others have put
    into its inbox, and steps. The event loop never waits for either.
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
        """Process one prompt as `LLM.generate` takes it. Raises RequestError for what is wrong with it."""
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

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. special: with the special tokens that the tokenizer puts around it."""
        return await self._on_worker(functools.partial(self.model.encode, text, add_special_tokens=special))

    async def texts(self, token_lists: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several lists, on a worker thread: they may be long."""
        return await self._on_worker(lambda: [self.decode(tokens) for tokens in token_lists])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        return self.model.decode(tokens)

    # -- parameters --------------------------------------------------------------------------------------------------

    async def compile_grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        """Check parameters, and compile the grammar they ask for on a worker thread, where it delays no other request.

        RequestError for parameters that cannot be served.
        """
        self.llm.verify(params)
        if params.structured_outputs is None:
            return None
        return await self._on_worker(self.model.compile_grammar, params)

    def check_length(self, engine_input: EngineInput, params: SamplingParams) -> None:
        """ValidationError when the prompt leaves too little room for max_tokens."""
        longest, length = self.model.max_model_len, len(engine_input.token_ids)
        if params.max_tokens is not None and length + params.max_tokens > longest:
            raise ValidationError(
                f"This model's maximum context length is {longest} tokens, but {length + params.max_tokens} were asked "
                f"for: {length} of the prompt and {params.max_tokens} of the answer. Shorten either.",
                parameter="max_tokens",
                value=params.max_tokens,
            )

    # -- requests ----------------------------------------------------------------------------------------------------

    async def generate(
        self, engine_input: EngineInput, params: SamplingParams, grammar: CompiledGrammar | None = None
    ) -> RequestOutput:
        """Generate the output of one prompt. If this is cancelled or raises, the request's blocks are freed at once."""
        return await self._finish(self.submit(engine_input, params, grammar, streaming=False))

    async def generate_all(
        self, requests: Sequence[tuple[EngineInput, SamplingParams]], grammar: CompiledGrammar | None = None
    ) -> list[RequestOutput]:
        """Generate the outputs of several prompts together, in their order. When one fails, the others are dropped."""
        streams: list[RequestStream[RequestOutput]] = []
        try:
            for engine_input, params in requests:
                streams.append(self.submit(engine_input, params, grammar, streaming=False))
            return [await self._finish(stream) for stream in streams]
        finally:
            for stream in streams:
                self.drop(stream)

    async def embed(self, engine_input: EngineInput, params: PoolingParams) -> PoolingRequestOutput:
        """The embedding of one prompt. ValueError unless the model was loaded to pool."""
        self.check()
        self.llm.check_pooling("embed")
        [checked] = self.llm.pooling_params(params, 1, "embed")
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
        """Queue a request. The caller must `drop` the stream when it needs no more of it.

        grammar: what `compile_grammar` made of the parameters; without it the engine's thread compiles. Raises
        EngineDeadError where nothing can run any more, ValueError for parameters that cannot be served.
        """
        self.check()
        self.llm.verify(params)
        stream = RequestStream(lambda: GenerateRequest(self.model, engine_input, params, grammar), streaming=streaming)
        self._submit(stream)
        return stream

    async def stream(self, stream: RequestStream[RequestOutput]) -> AsyncIterator[Delta]:
        """The deltas of a streaming request, step by step. Leaving early ends the request."""
        try:
            async for delta in stream.deltas():
                yield delta
        finally:
            self.drop(stream)

    def drop(self, stream: RequestStream[object]) -> None:
        """The caller needs no more of a request: if it still runs, it ends now."""
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
        """Wait for the end of a request."""
        try:
            async for _ in stream.deltas():
                pass
        finally:
            self.drop(stream)
        assert stream.output is not None
        return stream.output

    async def _on_worker(self, work: Callable[..., T], *args: Any) -> T:
        """Call something slow on one of the LLM's worker threads."""
        return await asyncio.get_running_loop().run_in_executor(self.llm.workers, work, *args)

    # -- the engine --------------------------------------------------------------------------------------------------

    async def between_steps(self, work: Callable[[], T]) -> T:
        """Call something on the engine's thread, between two steps."""
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
        """(sequences on the device, sequences that wait, share of the KV cache's blocks in use), as they stand."""
        return self.model.load()

    @property
    def open(self) -> int:
        """Requests that are queued or running."""
        return len(self._streams)

    def check(self) -> None:
        """Raises EngineDeadError when no request can be served any more."""
        if self._closed or self.fault is not None or not self._thread.is_alive():
            raise self._dead_error()

    def close(self) -> None:
        """End all requests and the engine's thread. Idempotent."""
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
        """Call what is in the inbox, waiting for something while the engines have no work. False: close."""
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
            busy = True  # what else is there is called without waiting for more

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
        """Send the callers what a step has changed."""
        streams: dict[RequestStream[object], None] = {}
        for state in changed:
            stream = self._stream_of.get(state.seq.seq_id)
            if stream is not None:
                stream.record_times(state)
                streams[stream] = None
        for stream in streams:
            try:
                ended = stream.publish()
            except Exception as error:  # this request's own: the others go on
                stream.closed = ended = True
                stream.fail(error)
                stream.abort()
            if ended:
                self._forget(stream)
