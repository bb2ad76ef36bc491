"""Requests on their way through the engine: one, and a batch of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mmjax.engine.engine import Engine
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits import LogitsProcessor
from mmjax.engine.logits.bias import LogitsBias
from mmjax.engine.logits.structured_output import StructuredOutput
from mmjax.engine.logits.timestamp_rules import TimestampRules
from mmjax.engine.output_processor import OutputProcessor
from mmjax.engine.sequence import EnginePrompt, MediaSpan
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.inputs.input_processor import EngineInput
from mmjax.inputs.prompt_embeds import NO_TOKEN
from mmjax.outputs.completion import CompletionState
from mmjax.outputs.pooling import TASKS, PoolingState
from mmjax.types import (
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

TINY = 1e-12  # a vector shorter than this has no direction


class EngineRequest:
    """A rendered prompt in the engine: what is made of it, on the least busy one, and its times."""

    states: Sequence[OutputProcessor]

    def __init__(self, model: LoadedModel, request_id: str, engine_input: EngineInput) -> None:
        self.request_id = request_id
        self.engine_input = engine_input
        self.engine: Engine = min(model.engines, key=lambda e: e.num_unfinished)
        self.metrics = RequestMetrics(arrival_time=time.monotonic())

    def abort(self) -> None:
        """End the request; its pages are free at once."""
        self.engine.abort(self.states)

    @property
    def finished(self) -> bool:
        return all(state.finish_reason is not None for state in self.states)

    def record_times(self, state: OutputProcessor) -> None:
        """Note the time at which one of the answers changed."""
        now, metrics = time.monotonic(), self.metrics
        if metrics.first_token_time is None and state.seq.output_len:
            metrics.first_token_time = now
        metrics.first_scheduled_time = state.seq.scheduled_time
        metrics.last_token_time = now
        if state.finish_reason is not None:
            metrics.finished_time = now


class GenerateRequest(EngineRequest):
    """One request for text."""

    def __init__(self, model: LoadedModel, request_id: str, engine_input: EngineInput, params: SamplingParams) -> None:
        super().__init__(model, request_id, engine_input)
        stops = () if params.ignore_eos else model.eos_ids
        asked = [token for token in params.stop_token_ids or () if 0 <= token < model.vocab_size]  # others never come
        stops = tuple(dict.fromkeys([*stops, *asked]))
        if len(stops) > model.buckets.max_stop_ids:
            raise RequestError(
                f"stop_token_ids: {len(stops)} stop tokens (the model's own included) were asked for, "
                f"at most {model.buckets.max_stop_ids} are supported.",
                "too_many_stop_tokens",
            )
        if engine_input.is_embeds and params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs are of tokens, and this prompt is embeddings.", "no_prompt_tokens")
        prompt = engine_prompt(engine_input, model.spec.is_encoder_decoder)
        plain = LogitsBias(params, model.vocab_size, model.tokenizer)
        kept: list[LogitsProcessor] = [plain] * params.n
        if params.structured_outputs is not None:  # a grammar follows one answer
            rules = model.grammar_compiler.compile(params.structured_outputs)
            kept = [StructuredOutput(model.grammar_compiler, rules, plain) for _ in range(params.n)]
        elif engine_input.timestamps is not None:
            kept = [TimestampRules(engine_input.timestamps, model.vocab_size, plain)] * params.n
        seed = params.seed if params.seed is not None else model.next_seed()
        eos = model.eos_ids[0] if model.eos_ids else None
        self.states: list[CompletionState] = []
        for index in range(params.n):
            seq = EngineSequence(
                index,
                prompt,
                params,
                seed=seed + index,
                stop_ids=stops,
                max_model_len=model.max_model_len,
                logits_processor=kept[index],
            )
            state = CompletionState(seq, model.tokenizer, eos)
            self.states.append(state)
            self.engine.add(state)

    def output(self) -> RequestOutput:
        """The request's answers so far."""
        r, first = self.engine_input, self.states[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=r.prompt,
            prompt_token_ids=r.token_ids.tolist(),
            prompt_logprobs=first.prompt_logprobs,
            outputs=[state.output() for state in self.states],
            finished=self.finished,
            metrics=self.metrics,
            encoder_prompt=r.encoder_prompt,
            encoder_prompt_token_ids=None if r.encoder_token_ids is None else r.encoder_token_ids.tolist(),
            num_cached_tokens=first.seq.num_cached_tokens,
        )


def engine_prompt(engine_input: EngineInput, cross: bool) -> EnginePrompt:
    """A rendered prompt in the engine's own words."""
    items = engine_input.items
    spans = (
        ()
        if cross
        else tuple(
            MediaSpan(span.start, span.length, entry.item_hash, entry.item, span.embed_offset)
            for span, entry in zip(engine_input.spans, items, strict=True)
        )
    )
    audio = tuple((entry.item_hash, entry.item) for entry in items) if cross else ()
    salt = (engine_input.cache_salt or "").encode() + b"".join(
        b"|" + entry.item_hash.encode() for entry in items if cross
    )
    tokens = np.full_like(engine_input.token_ids, NO_TOKEN) if engine_input.is_embeds else engine_input.token_ids
    return EnginePrompt(tokens, engine_input.rope_positions, engine_input.rope_delta, spans, audio, salt)


class PoolingRequest(EngineRequest):
    """One prompt in an engine that pools."""

    def __init__(self, model: LoadedModel, request_id: str, engine_input: EngineInput, params: PoolingParams) -> None:
        super().__init__(model, request_id, engine_input)
        self.params = params
        none = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        seq = EngineSequence(
            0,
            engine_prompt(engine_input, model.spec.is_encoder_decoder),
            none,
            seed=0,
            stop_ids=(),
            max_model_len=model.max_model_len,
            logits_processor=LogitsBias(none, model.vocab_size, model.tokenizer),
            needs_all_tokens=TASKS[params.task or "embed"],
        )
        self.pooled = PoolingState(seq, all_tokens=seq.needs_all_tokens)
        self.states = [self.pooled]
        self.engine.add(self.pooled)

    def output(self) -> PoolingRequestOutput:
        """The vector [D], or one per token [T, D]: float32, cut to `dimensions`, of length 1 unless told otherwise."""
        hidden = self.pooled.hidden[:, : self.params.dimensions]
        if self.params.use_activation in (None, True):
            hidden = hidden / np.maximum(np.linalg.norm(hidden, axis=-1, keepdims=True), TINY)
        return PoolingRequestOutput(
            request_id=self.request_id,
            outputs=PoolingOutput(hidden if self.pooled.all_tokens else hidden[0]),
            prompt_token_ids=self.engine_input.token_ids.tolist(),
            finished=self.finished,
            num_cached_tokens=self.pooled.seq.num_cached_tokens or 0,
        )
