"""POST /v1/completions: prompts of plain text or token ids."""

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
from mmjax.serve.schema import CompletionRequest, sampling_params, tokenization_kwargs

from mmjax import RequestError, RequestOutput, SamplingParams

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The completions route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses=STREAM)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several; the choices of prompt i are numbered from i * n."""
        context.check_model(body.model)
        work = CompletionHandler(context, body, request.state.request_id)
        if body.stream:
            await unless_gone(request, work.prepare())
            return event_stream(work.events(), request.state.request_id)
        return await as_json(await unless_gone(request, work.answer()))

    return routes


class CompletionHandler:
    """One request, of one prompt or several."""

    def __init__(self, context: ServerContext, body: CompletionRequest, request_id: str) -> None:
        self.context = context
        self.body = body
        self.id = f"cmpl-{body.request_id or request_id}"
        self.created = int(time.time())
        self.prepared: tuple[list[Any], SamplingParams] | None = None
        self.grammar: Any = None  # compiled, of structured outputs

    async def prepare(self) -> tuple[list[Any], SamplingParams]:
        """(rendered prompts, sampling parameters). Whatever is wrong with the request is raised here."""
        engine, body, prompts = self.context.engine, self.body, self.body.prompts()
        if not prompts:
            raise RequestError("prompt: the list is empty")
        self.context.check_prompts(len(prompts))
        self.context.check_stops(body.stop)
        options = tokenization_kwargs(body.truncate_prompt_tokens)
        options |= {} if body.add_special_tokens else {"add_special_tokens": False}
        salt = {"cache_salt": body.cache_salt} if body.cache_salt else {}

        async def one(prompt: str | list[int]) -> Any:
            name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            return await engine.prepare({name: prompt, **salt}, options)

        async with self.context.admitted():
            params = sampling_params(body.sampling_fields(), engine.llm.get_default_sampling_params())
            self.grammar = await engine.compile_grammar(params)
            engine_input = await together(*map(one, prompts))
        for each in engine_input:
            engine.check_length(each, params)
        self.prepared = engine_input, params
        return self.prepared

    async def answer(self) -> Json:
        """The whole answer."""
        engine_input, params = await self.prepare()

        async with self.context.admitted(again=True):
            outputs = await self.context.engine.generate_all([(each, params) for each in engine_input], self.grammar)
        for output in outputs:
            self.context.metrics.note(output)
        choices = [self._choice(output, i * params.n) for i, output in enumerate(outputs)]
        return {**self._head(), "choices": merged(choices), "usage": self._usage(outputs)}

    async def events(self) -> AsyncGenerator[Json, None]:
        """The answers in chunks, prompt after prompt; while one is sent the others are already being made."""
        assert self.prepared is not None
        engine_input, params = self.prepared
        engine, options = self.context.engine, self.body.stream_options
        always = options is not None and options.continuous_usage_stats
        length, made = sum(len(prompt.token_ids) for prompt in engine_input), 0
        async with self.context.admitted(again=True):
            streams: list[Any] = []
            try:
                for prompt in engine_input:
                    streams.append(engine.submit(prompt, params, self.grammar, streaming=True))
                for i, stream in enumerate(streams):
                    if self.body.echo:
                        for index in range(params.n):
                            yield self._chunk(i * params.n + index, self._prompt_text(stream, engine_input[i]))
                    async for delta in engine.stream(stream):
                        chunk = self._chunk(i * params.n + delta.index, delta.text)
                        choice = chunk["choices"][0]
                        choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason
                        if delta.logprobs is not None:
                            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs, 0)
                        if self.body.return_token_ids:
                            choice["token_ids"] = delta.token_ids
                        made += len(delta.token_ids)
                        yield chunk | ({"usage": usage(length, made)} if always else {})
            finally:
                for stream in streams:
                    engine.drop(stream)
        outputs = [stream.output for stream in streams if stream.output is not None]
        for output in outputs:
            self.context.metrics.note(output)
        if self.context.settings.always_usage or (options is not None and options.include_usage):
            yield {**self._head(), "choices": [], "usage": self._usage(outputs)}

    def _prompt_text(self, stream: Any, engine_input: Any) -> str:
        return (
            str(engine_input.prompt)
            if engine_input.prompt is not None
            else self.context.engine.decode(engine_input.token_ids)
        )

    def _head(self) -> Json:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.context.name}

    def _chunk(self, index: int, text: str) -> Json:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
        return {**self._head(), "choices": [choice]}

    def _choice(self, output: RequestOutput, first: int) -> list[Json]:
        echoed = ""
        if self.body.echo:
            ids = output.prompt_token_ids or ()
            echoed = output.prompt if output.prompt is not None else self.context.engine.decode(ids)
        choices = []
        for answer in output.outputs:
            logprobs = None
            if answer.logprobs is not None:
                tokens, reports = list(answer.token_ids), list(answer.logprobs)
                if self.body.echo and output.prompt_logprobs is not None:
                    tokens = [*(output.prompt_token_ids or ()), *tokens]
                    reports = [*(report or {} for report in output.prompt_logprobs), *reports]
                logprobs = self._logprobs(tokens, reports, 0)
            choices.append(
                {
                    "index": first + answer.index,
                    "text": echoed + answer.text,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                    "token_ids": list(answer.token_ids) if self.body.return_token_ids else None,
                }
            )
        return choices

    def _usage(self, outputs: Sequence[RequestOutput]) -> Json:
        prompt = sum(len(output.prompt_token_ids or ()) for output in outputs)
        made = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return usage(prompt, made, cached if self.context.settings.prompt_details else None)

    def _logprobs(self, tokens: Sequence[int], reported: Sequence[dict[int, Any]], offset: int) -> Json:
        """The report as the old completions API writes it; the prompt's first token has none."""
        as_ids, count = self.body.return_tokens_as_token_ids, self.body.logprobs or 0
        texts, values, tops, offsets = [], [], [], []
        for token, rivals in zip(tokens, reported, strict=True):
            text = token_text(token, rivals[token], as_ids) if rivals else self.context.engine.decode([token])
            best = sorted(rivals.items(), key=lambda item: -item[1].logprob)
            best = best if count == -1 else best[: max(count, 1)]
            texts.append(text)
            values.append(finite(rivals[token].logprob) if rivals else None)
            tops.append({token_text(t, e, as_ids): finite(e.logprob) for t, e in best} if rivals else None)
            offsets.append(offset)
            offset += len(text)
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
