"""`AsyncLLM`: runs the engines on a thread of their own, for callers on an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mmjax.chat import ChatOptions
from mmjax.config import EngineArgs
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits.structured_output import CompiledGrammar
from mmjax.engine.output_processor import OutputProcessor
from mmjax.entrypoints.llm import LLM, check_adapters
from mmjax.entrypoints.request_stream import RequestStream
from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.completion import Delta
from mmjax.outputs.detokenizer import bytes_of
from mmjax.outputs.pooling import check_pairs, score_pairs
from mmjax.outputs.request import GenerateRequest, PoolingRequest
from mmjax.outputs.streamed import StreamedOutputs
from mmjax.types import (
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    ScoringRequestOutput,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
Output = TypeVar("Output", covariant=True)


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, because of an error or because it was closed. No request can be served."""


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
        if self.model.lost is not None:  # the engine's thread may be waiting for a call
            self.model.lost.add_done_callback(lambda lost: self._inbox.put(lost.result))

    @property
    def model(self) -> LoadedModel:
        return self.llm.model

    @property
    def chat_template(self) -> str:
        """The text of the model's chat template for requests with tools; empty if it has none."""
        return self.model.chat.template_text(tools=True) or ""

    # -- prompts -----------------------------------------------------------------------------------------------------

    async def prepare(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Process one prompt as `LLM.generate` takes it. RequestError for a prompt that cannot be processed."""
        return await self._on_worker(self.model.process, prompt, tokenization_kwargs)

    async def prepare_chat(
        self, messages: Any, tokenization_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EngineInput:
        """Process one conversation as `LLM.chat` takes it. No thread waits while its media are fetched. options: the
        fields of `ChatOptions`."""
        chat = self.model.chat
        rendered = await self._on_worker(lambda: chat.render(messages, ChatOptions(**options)))
        prompt = await chat.fetch_async(rendered)
        return await self._on_worker(self.model.process_chat, prompt, tokenization_kwargs)

    async def prepare_from_urls(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Process a prompt whose media are URLs (http, https, data, file), and whose embeddings are base64 tensors."""
        return await self.prepare(await self.model.fetch(prompt), tokenization_kwargs)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text. add_special_tokens: whether the tokenizer adds its special tokens around it."""
        return await self._on_worker(functools.partial(self.model.encode, text, add_special_tokens=add_special_tokens))

    async def texts(self, token_lists: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several lists, on a worker thread: they may be long."""
        return await self._on_worker(lambda: [self.decode(tokens) for tokens in token_lists])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        return self.model.decode(tokens)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text. No bytes without a tokenizer."""
        return b"" if self.model.tokenizer is None else bytes_of(self.model.tokenizer, token)

    def is_special(self, token: int) -> bool:
        """Whether a token is special, so that texts leave it out unless `skip_special_tokens` is False."""
        return self.model.tokenizer is not None and token in self.model.tokenizer.special_ids

    # -- parameters --------------------------------------------------------------------------------------------------

    async def compile_grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        """Check parameters, and compile their grammar, if any, on a thread where it delays no other request.
        RequestError for parameters that this model cannot serve."""
        self.model.params_checker.check_sampling(params)
        if params.structured_outputs is None:
            return None
        threads = self.model.grammar_compiler.threads
        return await asyncio.get_running_loop().run_in_executor(threads, self.model.compile_grammar, params)

    def check_length(self, engine_input: EngineInput, params: SamplingParams) -> None:
        """ValidationError when the prompt leaves too little room for max_tokens."""
        self.model.params_checker.check_max_tokens(len(engine_input.token_ids), params)

    # -- requests, as vLLM's AsyncLLM takes them ---------------------------------------------------------------------

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> AsyncLLM:
        """Load a model and serve it. The other arguments of vLLM's method have no effect."""
        return cls(LLM.from_engine_args(engine_args))

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one prompt, step by step, in the form that `output_kind` of the parameters says; the last one
        is finished. Closing this early aborts the request. The other arguments of vLLM's method have no effect.

        prompt: as `LLM.generate` takes it, or from `prepare`. Raises as `LLM.generate` does, and RequestError if
        a request with this id runs.
        """
        check_adapters(1, lora_request)
        params = self.llm.get_default_sampling_params() if sampling_params is None else sampling_params
        engine_input = prompt if isinstance(prompt, EngineInput) else await self.prepare(prompt, tokenization_kwargs)
        grammar = await self.compile_grammar(params)
        streaming = params.output_kind is not RequestOutputKind.FINAL_ONLY
        stream = self.submit(engine_input, params, grammar, streaming=streaming, request_id=request_id)
        outputs = StreamedOutputs(request_id, engine_input, params)
        try:
            async for delta in stream.deltas():
                if (output := outputs.add(delta)) is not None:
                    yield output
        finally:
            self.drop(stream)
        assert stream.output is not None
        self.llm.metrics.record(stream.output)
        yield outputs.last(stream.output)

    async def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams | None,
        request_id: str,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """The vector of one prompt, as the only item. The other arguments of vLLM's method have no effect."""
        check_adapters(1, lora_request)
        engine_input = prompt if isinstance(prompt, EngineInput) else await self.prepare(prompt, tokenization_kwargs)
        params = PoolingParams() if pooling_params is None else pooling_params
        output = await self.embed(engine_input, params, task=params.task, request_id=request_id)
        output.request_id = request_id
        self.llm.metrics.record(output)
        yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by their ids: their last output has the finish reason "abort". Unknown ids are ignored."""
        ids = {request_id} if isinstance(request_id, str) else set(request_id)
        await self.between_steps(lambda: self._finish_now([s for s in list(self._streams) if s.request_id in ids]))

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """`LLM.sleep`. mode: "abort" ends running requests, "wait" waits for their end."""
        if mode not in ("abort", "wait"):
            raise RequestError(f"sleep: mode must be 'abort' or 'wait', got {mode!r}.", "bad_mode")
        while mode == "wait" and self.open:
            await asyncio.sleep(0.01)

        def sleep() -> None:
            self._finish_now(list(self._streams))
            for engine in self.model.engines:
                while engine.has_work:  # the dispatches in flight
                    engine.step()
            self.model.sleep(level)

        await self.between_steps(sleep)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """`LLM.wake_up`."""
        await self.between_steps(lambda: self.model.wake_up(tags))

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps, at least in part."""
        return bool(self.model.asleep)

    async def reset_mm_cache(self) -> None:
        """`LLM.reset_mm_cache`."""
        await self.between_steps(self.model.reset_mm_cache)

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """`LLM.reset_prefix_cache`."""
        return await self.between_steps(self.model.reset_prefix_cache)

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """`LLM.start_profile`."""
        self.llm.start_profile(profile_prefix)

    async def stop_profile(self) -> None:
        """`LLM.stop_profile`."""
        self.llm.stop_profile()

    async def check_health(self) -> None:
        """EngineDeadError if the engine's thread has ended."""
        self.check()

    def get_tokenizer(self) -> Any:
        """`LLM.get_tokenizer`."""
        return self.llm.get_tokenizer()

    def shutdown(self, timeout: float | None = None) -> None:
        """`close`. timeout has no effect."""
        self.close()

    # -- requests ----------------------------------------------------------------------------------------------------

    async def complete(
        self, engine_input: EngineInput, params: SamplingParams, grammar: CompiledGrammar | None = None
    ) -> RequestOutput:
        """Generate the output of one processed prompt. If this is cancelled or fails, the request's blocks are freed at
        once."""
        return await self._finish(self.submit(engine_input, params, grammar, streaming=False))

    async def complete_all(
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

    async def embed(
        self, engine_input: EngineInput, params: PoolingParams, *, task: str | None = "embed", request_id: str = ""
    ) -> PoolingRequestOutput:
        """The embedding of one prompt. RequestError unless the model was loaded to pool."""
        self.check()
        self.model.params_checker.check_pooling("embed")
        [checked] = self.model.params_checker.pooling_params(params, 1, task)
        stream = RequestStream(
            lambda: PoolingRequest(self.model, engine_input, checked), streaming=False, request_id=request_id
        )
        self._submit(stream)
        return await self._finish(stream)

    async def score(self, first: Sequence[EngineInput], second: Sequence[EngineInput]) -> list[ScoringRequestOutput]:
        """`LLM.score` of processed prompts."""
        check_pairs(len(first), len(second))
        vectors = await asyncio.gather(*(self.embed(each, PoolingParams()) for each in (*first, *second)))
        return score_pairs(vectors[: len(first)], vectors[len(first) :], self.model.tokenizer)

    def submit(
        self,
        engine_input: EngineInput,
        params: SamplingParams,
        grammar: CompiledGrammar | None = None,
        *,
        streaming: bool,
        request_id: str = "",
    ) -> RequestStream[RequestOutput]:
        """Queue a request. The caller must `drop` the stream in the end.

        request_id: for `abort`. grammar: from `compile_grammar`; without it, it is compiled before the request starts.
        EngineDeadError if that thread has ended, RequestError for parameters that this model cannot serve.
        """
        self.check()
        self.model.params_checker.check_sampling(params)
        if request_id and any(stream.request_id == request_id for stream in list(self._streams)):
            raise RequestError(f"A request with the id {request_id!r} is already running.", "id_in_use")
        compiled: concurrent.futures.Future[CompiledGrammar | None] = concurrent.futures.Future()
        if grammar is None and params.structured_outputs is not None:
            compiled = self.model.grammar_compiler.threads.submit(self.model.compile_grammar, params)
        else:
            compiled.set_result(grammar)
        stream = RequestStream(
            lambda: GenerateRequest(self.model, engine_input, params, compiled.result()),
            streaming=streaming,
            request_id=request_id,
        )
        self._streams.add(stream)
        compiled.add_done_callback(lambda _: self._submit(stream))
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
        found = self.llm.workers.submit(lambda: np.asarray(scores.result())[:, : len(tokens)])
        return await asyncio.wrap_future(found if self.model.lost is None else _unless_lost(found, self.model.lost))

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
            for engine in self.model.engines:
                engine.runner.stop_compiling()
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

    def _finish_now(self, streams: Sequence[RequestStream[object]]) -> None:
        """Abort requests, and give their callers what there is of their outputs."""
        for stream in streams:
            if stream.output is None and not stream.closed:
                stream.abort()
                self._publish_one(stream)

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
            self._publish_one(stream)

    def _publish_one(self, stream: RequestStream[object]) -> None:
        try:
            ended = stream.publish()
        except Exception as error:  # of this request only; the others continue
            stream.closed = ended = True
            stream.fail(error)
            stream.abort()
        if ended:
            self._forget(stream)


def _unless_lost(
    call: concurrent.futures.Future[T], lost: concurrent.futures.Future[Any]
) -> concurrent.futures.Future[T]:
    """The result of a call that never returns once a host is lost. EngineDeadError in that case."""
    first: concurrent.futures.Future[T] = concurrent.futures.Future()

    def settle(done: concurrent.futures.Future[Any]) -> None:
        error = done.exception()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # the other was first, or the caller has left
            if error is None:
                first.set_result(done.result())
            else:
                first.set_exception(EngineDeadError(f"The engine has stopped: {error}") if done is lost else error)

    call.add_done_callback(settle)
    lost.add_done_callback(settle)
    return first
