"""POST /v1/completions: prompts of plain text or token ids."""

from __future__ import annotations

import dataclasses
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
from mmjax.serve.schema import CompletionRequest, sampling_params, tokenization_kwargs
from mmjax.serve.text_offsets import TextOffsets, prompt_offsets

from mmjax import RequestError, RequestOutput, SamplingParams

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The completions route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses=STREAM)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts. The indices of the choices of prompt i begin at i * n."""
        context.check_model(body.model)
        work = CompletionHandler(context, body, request.state.request_id)
        if body.stream:
            await cancel_on_disconnect(request, work.prepare())
            return sse_response(work.events(), request.state.request_id)
        return await json_response(await cancel_on_disconnect(request, work.answer()))

    return routes


# What a delta has if only the prompt is wanted.
NO_OUTPUT: Json = {"text": "", "token_ids": [], "logprobs": None, "stop_reason": None}


class CompletionHandler:
    """One request, which has one or several prompts."""

    def __init__(self, context: ServerContext, body: CompletionRequest, request_id: str) -> None:
        self.context = context
        self.body = body
        self.id = f"cmpl-{body.request_id or request_id}"
        self.created = int(time.time())
        self.prepared: tuple[list[Any], SamplingParams] | None = None
        self.grammar: Any = None  # the compiled structured outputs

    async def prepare(self) -> tuple[list[Any], SamplingParams]:
        """(engine inputs, sampling parameters). All errors of the request are raised here."""
        engine, body, prompts = self.context.engine, self.body, self.body.prompts()
        if not prompts:
            raise RequestError("prompt: the list is empty")
        self.context.check_prompts(len(prompts))
        self.context.check_stops(body.stop)
        options = tokenization_kwargs(body)
        options |= {} if body.add_special_tokens else {"add_special_tokens": False}
        salt = {"cache_salt": body.cache_salt} if body.cache_salt else {}

        async def prepare(prompt: str | list[int]) -> Any:
            name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            return await engine.prepare({name: prompt, **salt}, options)

        async with self.context.admitted():
            params = sampling_params(self.context.close_objects(body), engine.llm.get_default_sampling_params())
            self.grammar = await engine.compile_grammar(params)
            engine_inputs = await gather_or_cancel(*map(prepare, prompts))
        for engine_input in engine_inputs:
            engine.check_length(engine_input, params)
        self.prepared = engine_inputs, params
        return self.prepared

    async def answer(self) -> Json:
        """The response, once it is complete."""
        engine_inputs, params = await self.prepare()
        async with self.context.admitted(again=True):
            outputs = await self.context.engine.complete_all([(each, params) for each in engine_inputs], self.grammar)
        for output in outputs:
            self.context.metrics.record(output)
        if self.body.only_echoes:
            outputs = [_without_output(output) for output in outputs]
        choices = [self._choice(output, i * params.n) for i, output in enumerate(outputs)]
        return {**self._head(), "choices": flatten(choices), "usage": self._usage(outputs)}

    async def events(self) -> AsyncGenerator[Json, None]:
        """The chunks of the response, prompt after prompt. All prompts are generated at the same time."""
        assert self.prepared is not None
        engine_inputs, params = self.prepared
        engine, options = self.context.engine, self.body.stream_options
        always = options is not None and options.continuous_usage_stats
        prompt_tokens, output_tokens = sum(len(each.token_ids) for each in engine_inputs), 0
        async with self.context.admitted(again=True):
            streams: list[Any] = []
            try:
                for engine_input in engine_inputs:
                    streams.append(engine.submit(engine_input, params, self.grammar, streaming=True))
                for i, stream in enumerate(streams):
                    prompt_text = self._prompt_text(engine_inputs[i]) if self.body.echo else ""
                    skip = params.skip_special_tokens
                    offsets = [TextOffsets(engine, len(prompt_text), skip_special=skip) for _ in range(params.n)]
                    if self.body.echo:
                        for index in range(params.n):
                            yield self._chunk(i * params.n + index, prompt_text)
                    async for delta in engine.stream(stream):
                        if self.body.only_echoes:
                            delta = dataclasses.replace(
                                delta, **NO_OUTPUT, finish_reason=delta.finish_reason and "length"
                            )
                        chunk = self._chunk(i * params.n + delta.index, delta.text)
                        choice = chunk["choices"][0]
                        choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason
                        if delta.logprobs is not None:
                            starts = offsets[delta.index].take(delta.token_ids)
                            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs, starts)
                        if self.body.return_token_ids:
                            choice["token_ids"] = delta.token_ids
                        output_tokens += len(delta.token_ids)
                        yield chunk | ({"usage": usage(prompt_tokens, output_tokens)} if always else {})
            finally:
                for stream in streams:
                    engine.drop(stream)
        outputs = [stream.output for stream in streams if stream.output is not None]
        for output in outputs:
            self.context.metrics.record(output)
        if self.body.only_echoes:
            outputs = [_without_output(output) for output in outputs]
        if self.context.settings.always_usage or (options is not None and options.include_usage):
            yield {**self._head(), "choices": [], "usage": self._usage(outputs)}

    def _prompt_text(self, engine_input: Any) -> str:
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
        prompt_text = ""
        if self.body.echo:
            ids = output.prompt_token_ids or ()
            prompt_text = output.prompt if output.prompt is not None else self.context.engine.decode(ids)
        choices = []
        for completion in output.outputs:
            logprobs = None
            if completion.logprobs is not None:
                tokens, reports = list(completion.token_ids), list(completion.logprobs)
                engine, skip = self.context.engine, self.body.skip_special_tokens is not False
                offsets = TextOffsets(engine, len(prompt_text), skip_special=skip).take(tokens)
                if self.body.echo and output.prompt_logprobs is not None:
                    prompt_tokens = list(output.prompt_token_ids or ())
                    offsets = prompt_offsets(engine, prompt_tokens, prompt_text) + offsets
                    tokens = prompt_tokens + tokens
                    reports = [*(report or {} for report in output.prompt_logprobs), *reports]
                logprobs = self._logprobs(tokens, reports, offsets)
            choices.append(
                {
                    "index": first + completion.index,
                    "text": prompt_text + completion.text,
                    "logprobs": logprobs,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                    "token_ids": list(completion.token_ids) if self.body.return_token_ids else None,
                }
            )
        return choices

    def _usage(self, outputs: Sequence[RequestOutput]) -> Json:
        prompt = sum(len(output.prompt_token_ids or ()) for output in outputs)
        output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return usage(prompt, output_tokens, cached if self.context.settings.prompt_details else None)

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[dict[int, Any]], offsets: list[int]) -> Json:
        """The log-probabilities as OpenAI's completions API has them. The first token of the prompt has none."""
        tokens_as_ids, count = self.body.return_tokens_as_token_ids, self.body.logprobs or 0
        texts, values, tops = [], [], []
        for token, candidates in zip(tokens, logprobs, strict=True):
            text = (
                token_text(token, candidates[token], tokens_as_ids)
                if candidates
                else self.context.engine.decode([token])
            )
            best = sorted(candidates.items(), key=lambda item: -item[1].logprob)
            best = best if count == -1 else best[: max(count, 1)]
            texts.append(text)
            values.append(finite_logprob(candidates[token].logprob) if candidates else None)
            tops.append(
                {token_text(t, e, tokens_as_ids): finite_logprob(e.logprob) for t, e in best} if candidates else None
            )
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _without_output(output: RequestOutput) -> RequestOutput:
    """A request without the token that was sampled for it."""
    completions = [
        dataclasses.replace(
            completion, text="", token_ids=[], logprobs=None if completion.logprobs is None else [],
            finish_reason="length", stop_reason=None,
        )
        for completion in output.outputs
    ]  # fmt: skip
    return dataclasses.replace(output, outputs=completions)
