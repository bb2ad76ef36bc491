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
from mmjax.llm import LLM
from mmjax.render import Rendered
from mmjax.run import Run
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


class Ticket:
    """One request on its way: what the engine's thread hands over arrives here, on the caller's loop.

    `output` is set once the request has ended. With `streaming` each step's gains come as they are made.
    """

    def __init__(self, *, streaming: bool) -> None:
        self.streaming = streaming
        self.run: Run | None = None
        self.output: RequestOutput | None = None
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._told: dict[int, tuple[int, int]] = {}

    def tell(self, news: Delta | BaseException | None) -> None:
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

    def gains(self) -> list[Delta]:
        """What is new since the last call. On the engine's thread only."""
        assert self.run is not None
        found = []
        for answer in self.run.answers:
            text, seq = answer.text, answer.seq
            told_text, told_tokens = self._told.get(seq.index, (0, 0))
            if len(text) == told_text and seq.output_len == told_tokens and answer.finish_reason is None:
                continue
            if (told_text, told_tokens) == (-1, -1):
                continue
            delta = Delta(
                seq.index,
                text[told_text:],
                seq.outputs[told_tokens:].tolist(),
                None if answer.logprobs is None else answer.logprobs[told_tokens : seq.output_len],
                answer.finish_reason,
                answer.stop_reason,
            )
            ended = answer.finish_reason is not None
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
        self._open: dict[int, Ticket] = {}
        self._tickets: set[Ticket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- the callers' side -------------------------------------------------------------------------------------------

    async def prepare(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> Rendered:
        """Render one prompt as `LLM.generate` takes it. Raises TypeError or ValueError for what is wrong with it."""
        renderer = self.llm.parts.renderer
        return await self._on_thread(lambda: renderer.render(renderer.parse(prompt), tokenization_kwargs))

    async def prepare_chat(
        self, messages: Any, tokenization_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Rendered:
        """Render one conversation as `LLM.chat` takes it; its media are fetched without holding a thread.

        options: fields of `mmjax.chat.ChatOptions`.
        """
        chat, renderer = self.llm.parts.chat, self.llm.parts.renderer
        draft = await self._on_thread(lambda: chat.draft(messages, ChatOptions(**options)))
        prompt = await chat.fetch_async(draft)
        tokenization = {"add_special_tokens": False, **(tokenization_kwargs or {})}  # the template has printed them
        return await self._on_thread(lambda: renderer.render(renderer.parse(prompt), tokenization))

    async def prepare_by_url(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> Rendered:
        """Render a prompt whose media are URLs (http, https, data, file), and embeddings tensors in base64."""
        if isinstance(prompt, Mapping) and isinstance(prompt.get("multi_modal_data"), Mapping):
            connector = self.llm.parts.chat.connect({})
            fetched = {
                kind: await _fetch(connector, str(kind), value) for kind, value in prompt["multi_modal_data"].items()
            }
            prompt = {**prompt, "multi_modal_data": fetched}
        renderer = self.llm.parts.renderer
        if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt_embeds"), str) and renderer.prompt_width:
            decode = self.llm.parts.chat.connect({}).fetch_image_embedding
            prompt = {**prompt, "prompt_embeds": await self._on_thread(lambda: decode(prompt["prompt_embeds"]))}
        return await self.prepare(prompt, tokenization_kwargs)

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; `special`: with what the tokenizer puts around it."""
        tokenizer = self.llm.parts.tokenizer
        if tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init).", "no_tokenizer")
        return await self._on_thread(lambda: tokenizer.encode(text, special))

    async def ready(self, params: SamplingParams) -> SamplingParams:
        """Parameters that are checked, and whose constraint is compiled where it holds up nobody else's answer.

        TypeError or ValueError for what cannot be.
        """
        self.llm.verify(params)
        if params.structured_outputs is None:
            return params
        vocabulary = self.llm.parts.vocabulary
        rules = await self._on_thread(lambda: vocabulary.compile(params.structured_outputs))
        return dataclasses.replace(params, structured_outputs=rules)

    async def between_steps(self, work: Callable[[], Out]) -> Out:
        """Run something on the engine's thread, between two of its steps."""
        self.check()
        done: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                found = work()
            except Exception as error:
                loop.call_soon_threadsafe(_settle, done, None, error)
            else:
                loop.call_soon_threadsafe(_settle, done, found, None)

        self._inbox.put(run)
        return await done

    async def _on_thread(self, work: Callable[[], Out]) -> Out:
        """Run host work on the LLM's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.llm.workers, work)

    async def generate(self, rendered: Rendered, params: SamplingParams) -> RequestOutput:
        """Answer one rendered prompt. Cancelled, or left with an error, its pages are free at once."""
        output: RequestOutput = await self._finish(self.submit(rendered, params, streaming=False))
        return output

    async def generate_all(self, asked: Sequence[tuple[Rendered, SamplingParams]]) -> list[RequestOutput]:
        """Answer several prompts together, in their order. When one fails, the others are dropped."""
        tickets: list[Ticket] = []
        try:
            for rendered, params in asked:
                tickets.append(self.submit(rendered, params, streaming=False))
            return [await self._finish(ticket) for ticket in tickets]
        finally:
            for ticket in tickets:
                self.drop(ticket)

    async def stream(self, ticket: Ticket) -> AsyncIterator[Delta]:
        """What a streaming ticket's answers gain, step by step; leaving early ends the request."""
        try:
            async for delta in ticket.deltas():
                yield delta
        finally:
            self.drop(ticket)

    def check_length(self, rendered: Rendered, params: SamplingParams) -> None:
        """ValidationError when the prompt leaves no room for the tokens asked for."""
        longest, length = self.llm.parts.max_model_len, len(rendered.tokens)
        if params.max_tokens is not None and length + params.max_tokens > longest:
            raise ValidationError(
                f"This model's maximum context length is {longest} tokens, but {length + params.max_tokens} were asked "
                f"for: {length} of the prompt and {params.max_tokens} of the answer. Shorten either.",
                parameter="max_tokens",
                value=params.max_tokens,
            )

    async def texts(self, parts: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several lists, on a thread: for lists of any length."""
        return await self._on_thread(lambda: [self.decode(tokens) for tokens in parts])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        tokenizer = self.llm.parts.tokenizer
        if tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init).", "no_tokenizer")
        return tokenizer.decode([int(token) for token in tokens], False)

    def load(self) -> tuple[int, int, float]:
        """(answers on the device, answers that wait, share of the cache's pages in use), as they stand."""
        engines = self.llm.parts.engines
        running = sum(len(engine.scheduler.running) for engine in engines)
        waiting = sum(len(engine.scheduler.waiting) for engine in engines)
        used = [1 - engine.pages.free / max(engine.pages.count - 1, 1) for engine in engines]
        return running, waiting, max(used)

    def submit(self, rendered: Rendered, params: SamplingParams, *, streaming: bool) -> Ticket:
        """Queue a rendered prompt. The caller must `drop` the ticket when it wants no more of it.

        Raises EngineDeadError where nothing can run any more, ValueError for parameters that cannot be.
        """
        self.check()
        self.llm.verify(params)
        return self._submit(lambda: self.llm.start(rendered, params), streaming)

    async def embed(self, rendered: Rendered, params: PoolingParams) -> PoolingRequestOutput:
        """The vector of one rendered prompt. ValueError unless the model was loaded to pool."""
        self.check()
        self.llm.check_pooling("embed")
        [checked] = self.llm.pooling_params(params, 1, "embed")
        return await self._finish(self._submit(lambda: self.llm.start_pooling(rendered, checked), False))

    def _submit(self, start: Callable[[], Any], streaming: bool) -> Ticket:
        ticket = Ticket(streaming=streaming)
        self._tickets.add(ticket)
        self._inbox.put(lambda: self._start(ticket, start))
        if self._closed or self.fault is not None:  # the engine may have told its tickets before this one was there
            ticket.tell(self._gone())
        return ticket

    async def _finish(self, ticket: Ticket) -> Any:
        try:
            async for _ in ticket.deltas():
                pass
        finally:
            self.drop(ticket)
        assert ticket.output is not None
        return ticket.output

    def drop(self, ticket: Ticket) -> None:
        """The caller is done with a request; if it still runs, it ends now."""
        self._tickets.discard(ticket)
        if ticket.output is None and not ticket.closed:
            ticket.closed = True
            self._inbox.put(lambda: self._end(ticket))

    def check(self) -> None:
        """Raises EngineDeadError when no request can be served any more."""
        if self._closed or self.fault is not None or not self._thread.is_alive():
            raise self._gone()

    def _gone(self) -> EngineDeadError:
        return EngineDeadError("The engine has stopped" + (f": {self.fault}" if self.fault else "."))

    @property
    def open(self) -> int:
        """Requests that are queued or running."""
        return len(self._tickets)

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
                for engine in self.llm.parts.engines:
                    if engine.busy:
                        self._hand_out(engine.step())
        except BaseException as error:
            logger.exception("the engine has stopped")
            self.fault = error
        finally:
            for ticket in list(self._tickets):
                ticket.tell(self._gone())

    def _take_in(self) -> bool:
        """Do what callers asked for, waiting while there is nothing to run. False: to be closed."""
        busy = any(engine.busy for engine in self.llm.parts.engines)
        while True:
            try:
                ask = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if ask is None:
                for ticket in list(self._tickets):
                    self._end(ticket)
                return False
            ask()
            busy = True  # one more look without waiting

    def _start(self, ticket: Ticket, start: Callable[[], Any]) -> None:
        if ticket.closed:
            return
        try:
            ticket.run = start()
        except Exception as error:  # whatever a request holds, it is not the others' end
            ticket.closed = True
            ticket.tell(error)
            return
        for answer in ticket.run.answers:
            self._open[answer.seq.number] = ticket

    def _end(self, ticket: Ticket) -> None:
        if ticket.run is not None:
            ticket.run.abort()
            self._forget(ticket.run)

    def _forget(self, run: Run) -> None:
        for answer in run.answers:
            self._open.pop(answer.seq.number, None)

    def _hand_out(self, changed: Sequence[Any]) -> None:
        tickets: dict[int, Ticket] = {}
        for answer in changed:
            ticket = self._open.get(answer.seq.number)
            if ticket is not None and ticket.run is not None:
                ticket.run.note(answer)
                tickets[id(ticket)] = ticket
        for ticket in tickets.values():
            run = ticket.run
            assert run is not None
            if ticket.streaming:
                for delta in ticket.gains():
                    ticket.tell(delta)
            if run.finished:
                self._forget(run)
                ticket.output = run.output()
                ticket.tell(None)


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
