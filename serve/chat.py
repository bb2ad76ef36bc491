"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve.context import (
    ServerContext,
    as_json,
    event_stream,
    finite,
    merged,
    together,
    token_text,
    unless_gone,
    usage,
)
from mmjax.serve.openapi import STREAM
from mmjax.serve.schema import ChatRequest, ConversationsRequest, sampling_params
from mmjax.serve.tools import CLOSE, MAX_CALLS, ForcedToolCallParser, ToolCall, ToolCallParser, schema_of

from mmjax import CompletionOutput, Delta, RequestError, RequestOutput, SamplingParams

Json = dict[str, Any]
PER_PROMPT = ("prompt_logprobs", "prompt_token_ids")


def router(context: ServerContext) -> APIRouter:
    """The chat route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None, responses=STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation: text, image, video and audio parts; streamed on request."""
        context.check_model(body.model)
        conversation = ChatHandler(context, body, request.state.request_id)
        if body.stream:
            await unless_gone(request, conversation.prepare())
            return event_stream(conversation.events(), request.state.request_id)
        return await as_json(await unless_gone(request, conversation.answer()))

    @routes.post("/v1/chat/completions/batch", response_model=None)
    async def batch(body: ConversationsRequest, request: Request) -> Response:
        """Answer several conversations; the choices of conversation i are numbered from i * n."""
        context.check_model(body.model)
        if not body.messages:
            raise RequestError("messages: the list of conversations is empty")
        context.check_prompts(len(body.messages))
        all_of_them = [ChatHandler(context, each, request.state.request_id) for each in body.chat_requests()]
        answers = await unless_gone(request, together(*(each.answer() for each in all_of_them)))
        return await as_json(_as_one(answers))

    return routes


def _as_one(answers: Sequence[Json]) -> Json:
    """The answers to several conversations as one body: choices in their order, usage in all, what is told of prompts
    as a list."""
    choices = merged([answer["choices"] for answer in answers])
    counts = [answer["usage"] for answer in answers]
    details = [count["prompt_tokens_details"]["cached_tokens"] for count in counts if "prompt_tokens_details" in count]
    prompt, made = (sum(count[name] for count in counts) for name in ("prompt_tokens", "completion_tokens"))
    return {
        **answers[0],
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": usage(prompt, made, sum(details) if details else None),
        **{name: [answer[name] for answer in answers] for name in PER_PROMPT if answers[0].get(name) is not None},
    }


class ChatHandler:
    """One request on its way to an answer. `details`: usage tells cached tokens, whatever the operator chose."""

    def __init__(self, context: ServerContext, body: ChatRequest, request_id: str, *, details: bool = False) -> None:
        self.context = context
        self.body = body
        self.details = details or context.settings.prompt_details
        self.id = f"chatcmpl-{body.request_id or request_id}"
        self.created = int(time.time())
        self.prepared: tuple[Any, SamplingParams] | None = None
        self.grammar: Any = None  # compiled, of structured outputs
        self.schema, self.function = None, None
        if body.tool_choice not in (None, "none", "auto"):
            most = 1 if body.parallel_tool_calls is False else MAX_CALLS
            self.schema, self.function = schema_of(body.tools or [], body.tool_choice, most)

    async def prepare(self) -> tuple[Any, SamplingParams]:
        """(rendered prompt, sampling parameters). Whatever is wrong with the request is raised here."""
        engine, body = self.context.engine, self.body
        options = self.context.chat_options(body.chat_kwargs())
        self.context.check_stops(body.stop)
        fields = body.sampling_fields()
        if self.schema is not None:
            if "structured_outputs" in fields:
                raise RequestError("tool_choice and a response format cannot both say what the answer looks like")
            fields["structured_outputs"] = {"json": self.schema, "disable_any_whitespace": True}
        elif self._one_call():
            fields["stop"] = [*([body.stop] if isinstance(body.stop, str) else body.stop or ()), CLOSE]
        async with self.context.admitted():
            params = sampling_params(fields, engine.llm.get_default_sampling_params())
            self.grammar = await engine.compile_grammar(params)
            engine_input = await engine.prepare_chat(body.messages, body.tokenization_kwargs(), **options)
        engine.check_length(engine_input, params)
        self.prepared = engine_input, params
        return self.prepared

    async def answer(self) -> Json:
        """The whole answer."""
        engine_input, params = await self.prepare()
        async with self.context.admitted(again=True):
            output = await self.context.engine.generate(engine_input, params, self.grammar)
        self.context.metrics.note(output)
        body = {
            **self._head("chat.completion"),
            "choices": [self._choice(answer) for answer in output.outputs],
            "usage": self._usage(output),
            "prompt_logprobs": _prompt_logprobs(output),
        }
        if self.body.return_token_ids:
            body["prompt_token_ids"] = list(output.prompt_token_ids or ())
        return body

    async def events(self) -> AsyncGenerator[Json, None]:
        """The answer in chunks."""
        assert self.prepared is not None
        engine_input, params = self.prepared
        options = self.body.stream_options
        always = options is not None and options.continuous_usage_stats
        want = self.context.settings.always_usage or (options is not None and options.include_usage)
        readers = {index: self._reader() for index in range(params.n)}
        made = dict.fromkeys(readers, 0)
        async with self.context.admitted(again=True):
            stream = self.context.engine.submit(engine_input, params, self.grammar, streaming=True)
            try:
                for index in readers:
                    chunk = self._chunk(index, {"role": self.context.settings.role, "content": ""})
                    yield chunk | ({"usage": usage(len(engine_input.token_ids), 0)} if always else {})
                async for delta in self.context.engine.stream(stream):
                    made[delta.index] += len(delta.token_ids)
                    for chunk in self._chunks(delta, readers[delta.index]):
                        if always:
                            chunk["usage"] = usage(len(engine_input.token_ids), sum(made.values()))
                        yield chunk
            finally:
                self.context.engine.drop(stream)
        assert stream.output is not None
        self.context.metrics.note(stream.output)
        if want:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(stream.output)}

    def _chunks(self, delta: Delta, reader: ToolCallParser | ForcedToolCallParser | None) -> list[Json]:
        """The chunks of one gain."""
        ended = delta.finish_reason is not None
        pieces: list[str | ToolCall] = [delta.text]
        if reader is not None:
            pieces = list(reader.feed(delta.text, last=ended))
        chunks = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                assert reader is not None
                call = {"index": reader.calls, **piece.as_json()}
                reader.calls += 1
                chunks.append(self._chunk(delta.index, {"tool_calls": [call]}))
            elif piece:
                chunks.append(self._chunk(delta.index, {"content": piece}))
        if not chunks and (ended or delta.logprobs):
            chunks.append(self._chunk(delta.index, {"content": ""}))
        if chunks:
            last = chunks[-1]["choices"][0]
            if self.body.logprobs and delta.logprobs is not None:
                last["logprobs"] = {"content": self._logprobs(delta.token_ids, delta.logprobs)}
            if ended:
                called = reader is not None and reader.calls > 0 and delta.finish_reason == "stop"
                last["finish_reason"] = "tool_calls" if called else delta.finish_reason
                last["stop_reason"] = self._stop_reason(delta.stop_reason)
            if self.body.return_token_ids:
                last["token_ids"] = delta.token_ids
        return chunks

    def _reader(self) -> ToolCallParser | ForcedToolCallParser | None:
        """What looks for tool calls, when there may be any."""
        if self.schema is not None:
            return ForcedToolCallParser(self.function)
        asked = self.body.tools and self.body.tool_choice != "none"
        return ToolCallParser() if asked and self.context.settings.tool_parser else None

    def _one_call(self) -> bool:
        """Whether the answer ends with the first call."""
        return self.body.parallel_tool_calls is False and isinstance(self._reader(), ToolCallParser)

    def _stop_reason(self, found: int | str | None) -> int | str | None:
        """The stop that the client asked for, if it was one."""
        return None if found == CLOSE and self._one_call() else found

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.context.name}

    def _chunk(self, index: int, delta: Json) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _choice(self, answer: CompletionOutput) -> Json:
        said = answer.text
        calls: list[ToolCall] = []
        reader = self._reader()
        if reader is not None:
            said, calls = reader.read(answer.text)
        called = bool(calls) and answer.finish_reason == "stop"
        logprobs = None
        if self.body.logprobs and answer.logprobs is not None:
            logprobs = {"content": self._logprobs(answer.token_ids, answer.logprobs)}
        message = {
            "role": self.context.settings.role,
            "content": said if said or not calls else None,
            "refusal": None,
            "tool_calls": [call.as_json() for call in calls],
        }
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called else answer.finish_reason,
            "stop_reason": self._stop_reason(answer.stop_reason),
            "token_ids": list(answer.token_ids) if self.body.return_token_ids else None,
        }

    def _usage(self, output: RequestOutput) -> Json:
        cached = (output.num_cached_tokens or 0) if self.details else None
        made = sum(len(answer.token_ids) for answer in output.outputs)
        return usage(len(output.prompt_token_ids or ()), made, cached)

    def _logprobs(self, tokens: Sequence[int], reported: Sequence[dict[int, Any]]) -> list[Json]:
        """OpenAI's report on each token and its best rivals."""
        as_ids, count = self.body.return_tokens_as_token_ids, self.body.top_logprobs or 0

        def entry(token: int, report: Any) -> Json:
            text = token_text(token, report, as_ids)
            return {"token": text, "logprob": finite(report.logprob), "bytes": list(text.encode())}

        out = []
        for token, rivals in zip(tokens, reported, strict=True):
            best = sorted(rivals.items(), key=lambda item: -item[1].logprob)
            best = best if count == -1 else best[:count]
            out.append(entry(token, rivals[token]) | {"top_logprobs": [entry(*rival) for rival in best]})
        return out


def _prompt_logprobs(output: RequestOutput) -> list[Json | None] | None:
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if rivals is None
        else {
            str(token): {"logprob": finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for token, e in rivals.items()
        }
        for rivals in output.prompt_logprobs
    ]
