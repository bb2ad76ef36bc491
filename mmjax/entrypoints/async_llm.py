"""`AsyncLLM`: the engine on a thread of its own, for callers that live on an event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from mmjax.chat import ChatOptions
from mmjax.entrypoints.llm import LLM
from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.request import GenerateRequest
from mmjax.types import (
    Logprob,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestOutput,
    SamplingParams,
    ValidationError,
)

logger = logging.getLogger(__name__)
Out = TypeVar("Out")


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by a fault of its own or because it was closed; no request can be served."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one answer of a request has gained since the last."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


class RequestStream:
    """One request on its way: what the engine's thread hands over arrives here, on the caller's loop.

    `output` is set once the request has ended. With `streaming` each step's gains come as they are made.
    """

    def __init__(self, *, streaming: bool) -> None:
        self.streaming = streaming
        self.request: GenerateRequest | None = None
        self.output: RequestOutput | None = None
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._told: dict[int, tuple[int, int]] = {}

    def put(self, news: Delta | BaseException | None) -> None:
        """Hand something to the waiting side, from any thread. None ends the request."""
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:  # the loop is gone, and with it whoever waited
            self.closed = True

    async def deltas(self) -> AsyncIterator[Delta]:
        """Gains until the request ends. Raises what went wrong with it."""
        while (news := await self._news.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            yield news

    def new_deltas(self) -> list[Delta]:
        """What is new since the last call. On the engine's thread only."""
        assert self.request is not None
        found = []
        for state in self.request.states:
            text, seq = state.text, state.seq
            told_text, told_tokens = self._told.get(seq.index, (0, 0))
            if len(text) == told_text and seq.output_len == told_tokens and state.finish_reason is None:
                continue
            if (told_text, told_tokens) == (-1, -1):
                continue
            delta = Delta(
                seq.index,
                text[told_text:],
                seq.output_ids[told_tokens:].tolist(),
                None if state.logprobs is None else state.logprobs[told_tokens : seq.output_len],
                state.finish_reason,
                state.stop_reason,
            )
            ended = state.finish_reason is not None
            self._told[seq.index] = (-1, -1) if ended else (len(text), seq.output_len)
            found.append(delta)
        return found


class AsyncLLM:
    """An LLM that answers many callers at once; `llm` must not be used for generation beside it.

    Requests are rendered on the LLM's threads and run by one thread that alone touches the engines. The event loop
    never waits for either.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.fault: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[int, RequestStream] = {}
        self._streams: set[RequestStream] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- the callers' side -------------------------------------------------------------------------------------------

    async def prepare(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Render one prompt as `LLM.generate` takes it. Raises TypeError or ValueError for what is wrong with it."""
        input_processor = self.llm.model.input_processor
        return await self._on_thread(
            lambda: input_processor.process(input_processor.parse(prompt), tokenization_kwargs)
        )

    async def prepare_chat(
        self, messages: Any, tokenization_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EngineInput:
        """Render one conversation as `LLM.chat` takes it; its media are fetched without holding a thread.

        options: fields of `mmjax.chat.ChatOptions`.
        """
        chat, input_processor = self.llm.model.chat, self.llm.model.input_processor
        rendered = await self._on_thread(lambda: chat.render(messages, ChatOptions(**options)))
        prompt = await chat.fetch_async(rendered)
        tokenization = {"add_special_tokens": False, **(tokenization_kwargs or {})}  # the template has printed them
        return await self._on_thread(lambda: input_processor.process(input_processor.parse(prompt), tokenization))

    async def prepare_from_urls(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Render a prompt whose media are URLs (http, https, data, file), and embeddings tensors in base64."""
        if isinstance(prompt, Mapping) and isinstance(prompt.get("multi_modal_data"), Mapping):
            connector = self.llm.model.chat.connect({})
            fetched = {
                kind: await _fetch(connector, str(kind), value) for kind, value in prompt["multi_modal_data"].items()
            }
            prompt = {**prompt, "multi_modal_data": fetched}
        input_processor = self.llm.model.input_processor
        if (
            isinstance(prompt, Mapping)
            and isinstance(prompt.get("prompt_embeds"), str)
            and input_processor.config.prompt_embeds_dim
        ):
            decode = self.llm.model.chat.connect({}).fetch_image_embedding
            prompt = {**prompt, "prompt_embeds": await self._on_thread(lambda: decode(prompt["prompt_embeds"]))}
        return await self.prepare(prompt, tokenization_kwargs)

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; `special`: with what the tokenizer puts around it."""
        tokenizer = self.llm.model.tokenizer
        if tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init).", "no_tokenizer")
        return await self._on_thread(lambda: tokenizer.encode(text, special))

    async def compile_grammar(self, params: SamplingParams) -> SamplingParams:
        """Parameters that are checked, and whose constraint is compiled where it holds up nobody else's answer.

        TypeError or ValueError for what cannot be.
        """
        self.llm.verify(params)
        if params.structured_outputs is None:
            return params
        vocabulary = self.llm.model.grammar_compiler
        rules = await self._on_thread(lambda: vocabulary.compile(params.structured_outputs))
        return dataclasses.replace(params, structured_outputs=rules)

    async def between_steps(self, work: Callable[[], Out]) -> Out:
        """Run something on the engine's thread, between two of its steps."""
        self.check()
        done: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def request() -> None:
            try:
                found = work()
            except Exception as error:
                loop.call_soon_threadsafe(_settle, done, None, error)
            else:
                loop.call_soon_threadsafe(_settle, done, found, None)

        self._inbox.put(request)
        return await done

    async def _on_thread(self, work: Callable[[], Out]) -> Out:
        """Run host work on the LLM's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.llm.workers, work)

    async def generate(self, engine_input: EngineInput, params: SamplingParams) -> RequestOutput:
        """Answer one rendered prompt. Cancelled, or left with an error, its pages are free at once."""
        output: RequestOutput = await self._finish(self.submit(engine_input, params, streaming=False))
        return output

    async def generate_all(self, asked: Sequence[tuple[EngineInput, SamplingParams]]) -> list[RequestOutput]:
        """Answer several prompts together, in their order. When one fails, the others are dropped."""
        streams: list[RequestStream] = []
        try:
            for engine_input, params in asked:
                streams.append(self.submit(engine_input, params, streaming=False))
            return [await self._finish(stream) for stream in streams]
        finally:
            for stream in streams:
                self.drop(stream)

    async def stream(self, stream: RequestStream) -> AsyncIterator[Delta]:
        """What a streaming ticket's answers gain, step by step; leaving early ends the request."""
        try:
            async for delta in stream.deltas():
                yield delta
        finally:
            self.drop(stream)

    def check_length(self, engine_input: EngineInput, params: SamplingParams) -> None:
        """ValidationError when the prompt leaves no room for the tokens asked for."""
        longest, length = self.llm.model.max_model_len, len(engine_input.token_ids)
        if params.max_tokens is not None and length + params.max_tokens > longest:
            raise ValidationError(
                f"This model's maximum context length is {longest} tokens, but {length + params.max_tokens} were asked "
                f"for: {length} of the prompt and {params.max_tokens} of the answer. Shorten either.",
                parameter="max_tokens",
                value=params.max_tokens,
            )

    async def texts(self, model: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several lists, on a thread: for lists of any length."""
        return await self._on_thread(lambda: [self.decode(tokens) for tokens in model])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        tokenizer = self.llm.model.tokenizer
        if tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init).", "no_tokenizer")
        return tokenizer.decode([int(token) for token in tokens], False)

    def load(self) -> tuple[int, int, float]:
        """(answers on the device, answers that wait, share of the cache's pages in use), as they stand."""
        engines = self.llm.model.engines
        running = sum(len(engine.scheduler.running) for engine in engines)
        waiting = sum(len(engine.scheduler.waiting) for engine in engines)
        used = [1 - engine.block_pool.num_free / max(engine.block_pool.num_blocks - 1, 1) for engine in engines]
        return running, waiting, max(used)

    def submit(self, engine_input: EngineInput, params: SamplingParams, *, streaming: bool) -> RequestStream:
        """Queue a rendered prompt. The caller must `drop` the ticket when it wants no more of it.

        Raises EngineDeadError where nothing can run any more, ValueError for parameters that cannot be.
        """
        self.check()
        self.llm.verify(params)
        return self._submit(lambda: self.llm.start(engine_input, params), streaming)

    async def embed(self, engine_input: EngineInput, params: PoolingParams) -> PoolingRequestOutput:
        """The vector of one rendered prompt. ValueError unless the model was loaded to pool."""
        self.check()
        self.llm.check_pooling("embed")
        [checked] = self.llm.pooling_params(params, 1, "embed")
        return await self._finish(self._submit(lambda: self.llm.start_pooling(engine_input, checked), False))

    def _submit(self, start: Callable[[], Any], streaming: bool) -> RequestStream:
        stream = RequestStream(streaming=streaming)
        self._streams.add(stream)
        self._inbox.put(lambda: self._start(stream, start))
        if self._closed or self.fault is not None:  # the engine may have told its tickets before this one was there
            stream.put(self._gone())
        return stream

    async def _finish(self, stream: RequestStream) -> Any:
        try:
            async for _ in stream.deltas():
                pass
        finally:
            self.drop(stream)
        assert stream.output is not None
        return stream.output

    def drop(self, stream: RequestStream) -> None:
        """The caller is done with a request; if it still runs, it ends now."""
        self._streams.discard(stream)
        if stream.output is None and not stream.closed:
            stream.closed = True
            self._inbox.put(lambda: self._end(stream))

    def check(self) -> None:
        """Raises EngineDeadError when no request can be served any more."""
        if self._closed or self.fault is not None or not self._thread.is_alive():
            raise self._gone()

    def _gone(self) -> EngineDeadError:
        return EngineDeadError("The engine has stopped" + (f": {self.fault}" if self.fault else "."))

    @property
    def open(self) -> int:
        """Requests that are queued or running."""
        return len(self._streams)

    def close(self) -> None:
        """End everything and wait for the engine's thread. Idempotent."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._take_in():
                for engine in self.llm.model.engines:
                    if engine.has_work:
                        self._hand_out(engine.step())
        except BaseException as error:
            logger.exception("the engine has stopped")
            self.fault = error
        finally:
            for stream in list(self._streams):
                stream.put(self._gone())

    def _take_in(self) -> bool:
        """Do what callers asked for, waiting while there is nothing to run. False: to be closed."""
        busy = any(engine.has_work for engine in self.llm.model.engines)
        while True:
            try:
                ask = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if ask is None:
                for stream in list(self._streams):
                    self._end(stream)
                return False
            ask()
            busy = True  # one more look without waiting

    def _start(self, stream: RequestStream, start: Callable[[], Any]) -> None:
        if stream.closed:
            return
        try:
            stream.request = start()
        except Exception as error:  # whatever a request holds, it is not the others' end
            stream.closed = True
            stream.put(error)
            return
        for state in stream.request.states:
            self._running[state.seq.seq_id] = stream

    def _end(self, stream: RequestStream) -> None:
        if stream.request is not None:
            stream.request.abort()
            self._forget(stream.request)

    def _forget(self, request: GenerateRequest) -> None:
        for state in request.states:
            self._running.pop(state.seq.seq_id, None)

    def _hand_out(self, changed: Sequence[Any]) -> None:
        streams: dict[int, RequestStream] = {}
        for state in changed:
            stream = self._running.get(state.seq.seq_id)
            if stream is not None and stream.request is not None:
                stream.request.record_times(state)
                streams[id(stream)] = stream
        for stream in streams.values():
            request = stream.request
            assert request is not None
            if stream.streaming:
                for delta in stream.new_deltas():
                    stream.put(delta)
            if request.finished:
                self._forget(request)
                stream.output = request.output()
                stream.put(None)


def _settle(done: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    if done.done():  # whoever asked has gone
        return
    if error is None:
        done.set_result(found)
    else:
        done.set_exception(error)


async def _fetch(connector: Any, kind: str, value: Any) -> Any:
    """One entry of multi_modal_data with its URLs followed."""
    if isinstance(value, (list, tuple)):
        return [await _fetch(connector, kind, entry) for entry in value]
    if isinstance(value, str):
        fetch = getattr(connector, f"fetch_{kind}_async", None)
        if fetch is None:
            raise RequestError(f"Unsupported modality: {kind}.", "bad_modality")
        return await fetch(value)
    if isinstance(value, Mapping):  # embeddings and what belongs to them
        return {
            name: await asyncio.to_thread(connector.fetch_image_embedding, entry) if isinstance(entry, str) else entry
            for name, entry in value.items()
        }
    if value is None:
        return None
    raise RequestError(f"multi_modal_data[{kind!r}]: write media as URLs, got {type(value).__name__}.", "bad_media")
