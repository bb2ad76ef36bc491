"""POST /v1/chat/completions, and its form for several conversations, POST /v1/chat/completions/batch."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve.context import (
    ServerContext,
    cancel_on_disconnect,
    finite_logprob,
    flatten,
    gather_or_cancel,
    json_response,
    sse_response,
    token_text,
    usage,
)
from mmjax.serve.openapi import STREAM
from mmjax.serve.schema import ChatRequest, ConversationsRequest, sampling_params
from mmjax.serve.tools import MAX_CALLS, Arguments, ForcedToolCallParser, schema_of

from mmjax import CompletionOutput, Delta, RequestError, RequestOutput, SamplingParams
from mmjax.parsers import OutputParser, Piece, Reasoning, ReasoningParser, ToolCall, ToolParser

Json = dict[str, Any]
PER_PROMPT = ("prompt_logprobs", "prompt_token_ids")


def router(context: ServerContext) -> APIRouter:
    """The chat route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None, responses=STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation of text, images, videos and audio."""
        context.check_model(body.model)
        handler = ChatHandler(context, body, request.state.request_id)
        if body.stream:
            await cancel_on_disconnect(request, handler.prepare())
            return sse_response(handler.events(), request.state.request_id)
        return await json_response(await cancel_on_disconnect(request, handler.answer()))

    @routes.post("/v1/chat/completions/batch", response_model=None)
    async def batch(body: ConversationsRequest, request: Request) -> Response:
        """Answer several conversations. The indices of the choices of conversation i begin at i * n."""
        context.check_model(body.model)
        if not body.messages:
            raise RequestError("messages: the list of conversations is empty")
        context.check_prompts(len(body.messages))
        handlers = [ChatHandler(context, each, request.state.request_id) for each in body.chat_requests()]
        answers = await cancel_on_disconnect(request, gather_or_cancel(*(handler.answer() for handler in handlers)))
        return await json_response(_combine(answers))

    return routes


def _combine(answers: Sequence[Json]) -> Json:
    """One response from several: all choices, the total usage, and the PER_PROMPT fields as lists."""
    choices = flatten([answer["choices"] for answer in answers])
    counts = [answer["usage"] for answer in answers]
    details = [count["prompt_tokens_details"]["cached_tokens"] for count in counts if "prompt_tokens_details" in count]
    prompt_tokens, output_tokens = (
        sum(count[name] for count in counts) for name in ("prompt_tokens", "completion_tokens")
    )
    return {
        **answers[0],
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": usage(prompt_tokens, output_tokens, sum(details) if details else None),
        **{name: [answer[name] for answer in answers] for name in PER_PROMPT if answers[0].get(name) is not None},
    }


class ChatHandler:
    """One request. details: usage reports cached tokens even if the operator has not enabled that."""

    def __init__(self, context: ServerContext, body: ChatRequest, request_id: str, *, details: bool = False) -> None:
        self.context = context
        self.body = body
        self.details = details or context.settings.prompt_details
        self.id = f"chatcmpl-{body.request_id or request_id}"
        self.created = int(time.time())
        self.prepared: tuple[Any, SamplingParams] | None = None
        self.grammar: Any = None  # the compiled structured outputs
        self.echo = body.echoed(context.settings.role)
        self.schema, self.function = None, None
        if body.tool_choice not in (None, "none", "auto"):
            most = MAX_CALLS if body.parallel_tool_calls else 1
            closed = context.settings.closed_objects is not False
            self.schema, self.function = schema_of(body.tools or [], body.tool_choice, most, closed=closed)

    async def prepare(self) -> tuple[Any, SamplingParams]:
        """(engine input, sampling parameters). All errors of the request are raised here."""
        engine, body = self.context.engine, self.body
        options = self.context.chat_kwargs(body.chat_kwargs())
        self.context.check_stops(body.stop)
        fields = self.context.close_objects(body)
        if self.schema is not None:
            if "structured_outputs" in fields:
                raise RequestError("tool_choice and a response format cannot both say what the answer looks like")
            fields["structured_outputs"] = {"json": self.schema, "disable_any_whitespace": True}
        elif self._call_end() is not None:
            fields["stop"] = [*([body.stop] if isinstance(body.stop, str) else body.stop or ()), self._call_end()]
        if any(parser is not None and parser.special for parser in (self._tool_parser(), self._reasoning_parser())):
            fields["skip_special_tokens"] = False
        async with self.context.admitted():
            params = sampling_params(fields, engine.llm.get_default_sampling_params())
            self.grammar = await engine.compile_grammar(params)
            engine_input = await engine.prepare_chat(body.messages, body.tokenization_kwargs(), **options)
        engine.check_length(engine_input, params)
        self.prepared = engine_input, params
        return self.prepared

    async def answer(self) -> Json:
        """Prepare, and return the response once it is complete."""
        await self.prepare()
        return await self.complete()

    async def complete(self) -> Json:
        """The response to a prepared request, once it is complete."""
        assert self.prepared is not None
        engine_input, params = self.prepared
        async with self.context.admitted(again=True):
            output = await self.context.engine.complete(engine_input, params, self.grammar)
        self.context.metrics.record(output)
        body = {
            **self._head("chat.completion"),
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": self._usage(output),
            "prompt_logprobs": _prompt_logprobs(output),
        }
        if self.body.return_token_ids:
            body["prompt_token_ids"] = list(output.prompt_token_ids or ())
        return body

    async def events(self) -> AsyncGenerator[Json, None]:
        """The chunks of the response."""
        assert self.prepared is not None
        engine_input, params = self.prepared
        options = self.body.stream_options
        always = options is not None and options.continuous_usage_stats
        include_usage = self.context.settings.always_usage or (options is not None and options.include_usage)
        parsers = {index: self._parser() for index in range(params.n)}
        output_tokens = dict.fromkeys(parsers, 0)
        async with self.context.admitted(again=True):
            stream = self.context.engine.submit(engine_input, params, self.grammar, streaming=True)
            try:
                for index in parsers:
                    first = self._chunk(index, {"role": self.context.settings.role, "content": ""})
                    for chunk in (first, *([self._chunk(index, {"content": self.echo})] if self.echo else [])):
                        yield chunk | ({"usage": usage(len(engine_input.token_ids), 0)} if always else {})
                async for delta in self.context.engine.stream(stream):
                    output_tokens[delta.index] += len(delta.token_ids)
                    for chunk in self._chunks(delta, parsers[delta.index]):
                        if always:
                            chunk["usage"] = usage(len(engine_input.token_ids), sum(output_tokens.values()))
                        yield chunk
            finally:
                self.context.engine.drop(stream)
        assert stream.output is not None
        self.context.metrics.record(stream.output)
        if include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(stream.output)}

    def _chunks(self, delta: Delta, parser: OutputParser | ForcedToolCallParser | None) -> list[Json]:
        """The chunks for newly generated tokens."""
        finished = delta.finish_reason is not None
        pieces: list[Piece | Arguments] = [delta.text]
        if parser is not None:
            pieces = list(parser.feed(delta.text, last=finished))
        chunks = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                assert parser is not None
                call = {"index": parser.calls, **piece.as_json()}
                parser.calls += 1
                chunks.append(self._chunk(delta.index, {"tool_calls": [call]}))
            elif isinstance(piece, Arguments):
                assert parser is not None
                call = {"index": parser.calls - 1, "function": {"arguments": str(piece)}}
                chunks.append(self._chunk(delta.index, {"tool_calls": [call]}))
            elif piece:
                field = "reasoning" if isinstance(piece, Reasoning) else "content"
                chunks.append(self._chunk(delta.index, {field: piece}))
        if not chunks and (finished or delta.logprobs):
            chunks.append(self._chunk(delta.index, {"content": ""}))
        if chunks:
            last = chunks[-1]["choices"][0]
            if self.body.logprobs and delta.logprobs is not None:
                last["logprobs"] = {"content": self._logprobs(delta.token_ids, delta.logprobs)}
            if finished:
                called = parser is not None and parser.calls > 0
                last["finish_reason"] = self._finish_reason(delta.finish_reason, called=called)
                last["stop_reason"] = self._stop_reason(delta.stop_reason)
            if self.body.return_token_ids:
                last["token_ids"] = delta.token_ids
        return chunks

    def _parser(self) -> OutputParser | ForcedToolCallParser | None:
        """The parser of the output, if there is something to find in it."""
        assert self.prepared is not None
        if self.schema is not None:
            return ForcedToolCallParser(self.function)
        engine_input, params = self.prepared
        tools, reasoning = self._tool_parser(), self._reasoning_parser()
        if params.structured_outputs is not None:  # they hold from the first token on
            reasoning = None
        if tools is None and reasoning is None:
            return None
        return OutputParser(
            None if reasoning is None else reasoning(engine_input.prompt),
            None if tools is None else tools(self.body.tools or ()),
            max_calls=1 if self.body.parallel_tool_calls is False else None,
        )

    def _tool_parser(self) -> type[ToolParser] | None:
        """The parser of calls that the model may make."""
        may_call = self.schema is None and self.body.tools and self.body.tool_choice != "none"
        return self.context.tool_parser if may_call else None

    def _reasoning_parser(self) -> type[ReasoningParser] | None:
        return self.context.reasoning_parser if self.schema is None else None

    def _call_end(self) -> str | None:
        """The stop string that ends the output after one call, if the request wants no more and the format has one."""
        parser = self._tool_parser()
        return parser.close if parser is not None and self.body.parallel_tool_calls is False else None

    def _finish_reason(self, reason: str | None, *, called: bool) -> str | None:
        """OpenAI's: an output with calls ends with "tool_calls", except for that of a function that was named."""
        return "tool_calls" if called and reason == "stop" and self.function is None else reason

    def _stop_reason(self, stop: int | str | None) -> int | str | None:
        """The stop reason, unless it is the stop string that this class has added."""
        return None if stop is not None and stop == self._call_end() else stop

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.context.name}

    def _chunk(self, index: int, delta: Json) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _choice(self, completion: CompletionOutput) -> Json:
        reasoning, content = "", completion.text
        calls: list[ToolCall] = []
        parser = self._parser()
        if isinstance(parser, OutputParser):
            reasoning, content, calls = parser.read(completion.text)
        elif parser is not None:
            content, calls = parser.read(completion.text)
        content = self.echo + content
        logprobs = None
        if self.body.logprobs and completion.logprobs is not None:
            logprobs = {"content": self._logprobs(completion.token_ids, completion.logprobs)}
        message = {
            "role": self.context.settings.role,
            "content": content if content or not calls else None,
            "refusal": None,
            "tool_calls": [call.as_json() for call in calls],
            **({"reasoning": reasoning} if reasoning else {}),
        }
        return {
            "index": completion.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(completion.finish_reason, called=bool(calls)),
            "stop_reason": self._stop_reason(completion.stop_reason),
            "token_ids": list(completion.token_ids) if self.body.return_token_ids else None,
        }

    def _usage(self, output: RequestOutput) -> Json:
        cached = (output.num_cached_tokens or 0) if self.details else None
        output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        return usage(len(output.prompt_token_ids or ()), output_tokens, cached)

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[dict[int, Any]]) -> list[Json]:
        """OpenAI's log-probabilities of each token and of the most likely ones in its place."""
        tokens_as_ids, count = self.body.return_tokens_as_token_ids, self.body.top_logprobs or 0
        bytes_of = self.context.engine.bytes_of

        def entry(token: int, logprob: Any) -> Json:
            text = token_text(token, logprob, tokens_as_ids)
            return {"token": text, "logprob": finite_logprob(logprob.logprob), "bytes": list(bytes_of(token))}

        out = []
        for token, candidates in zip(tokens, logprobs, strict=True):
            best = sorted(candidates.items(), key=lambda item: -item[1].logprob)
            best = best if count == -1 else best[:count]
            out.append(entry(token, candidates[token]) | {"top_logprobs": [entry(*candidate) for candidate in best]})
        return out


def _prompt_logprobs(output: RequestOutput) -> list[Json | None] | None:
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if candidates is None
        else {
            str(token): {"logprob": finite_logprob(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for token, e in candidates.items()
        }
        for candidates in output.prompt_logprobs
    ]
