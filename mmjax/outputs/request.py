"""A request in an engine: its sequences, their output processors, and its timestamps."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits import LogitsProcessor
from mmjax.engine.logits.bias import LogitsBias
from mmjax.engine.logits.structured_output import CompiledGrammar, StructuredOutput
from mmjax.engine.logits.timestamp_rules import TimestampRules
from mmjax.engine.output_processor import OutputProcessor
from mmjax.engine.sequence import EnginePrompt, EngineSequence, MediaSpan
from mmjax.inputs.input_processor import EngineInput
from mmjax.inputs.params import POOLING_TASKS
from mmjax.inputs.prompt_embeds import NO_TOKEN
from mmjax.outputs.completion import CompletionState, Delta
from mmjax.outputs.pooling import PoolingState
from mmjax.types import (
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

Output = TypeVar("Output")

MIN_NORM = 1e-12  # vectors shorter than this are not normalized
NO_SAMPLING = SamplingParams(temperature=0, max_tokens=1, detokenize=False)  # a pooled sequence ends after its prompt


class EngineRequest(abc.ABC, Generic[Output]):
    """A request that runs on the least busy engine. Created and used on the thread that steps the engines."""

    states: Sequence[OutputProcessor]

    def __init__(self, model: LoadedModel, engine_input: EngineInput, states: Sequence[OutputProcessor]) -> None:
        model.check_awake()
        self.request_id = next(model.request_ids)
        self.engine_input = engine_input
        self.states = states
        self.engine = model.least_busy_engine()
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        for state in states:
            self.engine.add(state)

    @abc.abstractmethod
    def output(self) -> Output:
        """The request's output so far, in the form that users receive."""

    def new_deltas(self) -> list[Delta]:
        """What the outputs have gained since the last deltas."""
        return []

    def check(self) -> None:
        """Raise the error of an output that could not be made, if there is one."""
        for state in self.states:
            if state.error is not None:
                raise state.error

    def abort(self) -> None:
        """End the request; its blocks are freed at once."""
        self.engine.abort(self.states)

    @property
    def finished(self) -> bool:
        return all(state.finish_reason is not None for state in self.states)

    def record_times(self, state: OutputProcessor) -> None:
        """Record that one of the outputs has changed now."""
        now, metrics = time.monotonic(), self.metrics
        if metrics.first_token_time is None and state.seq.output_len:
            metrics.first_token_time = now
        metrics.first_scheduled_time = state.seq.scheduled_time
        metrics.last_token_time = now
        if state.finish_reason is not None:
            metrics.finished_time = now


class GenerateRequest(EngineRequest[RequestOutput]):
    """A request for text. grammar: from `LoadedModel.compile_grammar`; compiled here, on the engine's thread, if it is
    missing. RequestError for parameters that do not fit the prompt or the model."""

    states: Sequence[CompletionState]

    def __init__(
        self,
        model: LoadedModel,
        engine_input: EngineInput,
        params: SamplingParams,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        super().__init__(model, engine_input, _completion_states(model, engine_input, params, grammar))
        self.metrics.max_tokens = params.max_tokens

    def output(self) -> RequestOutput:
        """The request's outputs so far."""
        prompt, first = self.engine_input, self.states[0]
        encoder_ids = prompt.encoder_token_ids
        return RequestOutput(
            request_id=self.request_id,
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids.tolist(),
            prompt_logprobs=first.prompt_logprobs,
            outputs=[state.output() for state in self.states],
            finished=self.finished,
            metrics=self.metrics,
            encoder_prompt=prompt.encoder_prompt,
            encoder_prompt_token_ids=None if encoder_ids is None else encoder_ids.tolist(),
            num_cached_tokens=first.seq.num_cached_tokens,
        )

    def new_deltas(self) -> list[Delta]:
        """What the outputs have gained since the last deltas."""
        return [delta for state in self.states if (delta := state.new_delta()) is not None]


class PoolingRequest(EngineRequest[PoolingRequestOutput]):
    """A request for an embedding. The engine must pool."""

    def __init__(self, model: LoadedModel, engine_input: EngineInput, params: PoolingParams) -> None:
        self.params = params
        self.state = PoolingState(
            EngineSequence(
                0,
                engine_prompt(engine_input, encoder_decoder=model.spec.is_encoder_decoder),
                NO_SAMPLING,
                max_model_len=model.max_model_len,
                needs_all_tokens=POOLING_TASKS[params.task or "embed"],
            )
        )
        super().__init__(model, engine_input, [self.state])

    def output(self) -> PoolingRequestOutput:
        """The vector [D], or one per token [T, D]: float32, cut to `dimensions`, of length 1 unless use_activation is
        False."""
        hidden = self.state.hidden[:, : self.params.dimensions]
        if self.params.use_activation in (None, True):
            hidden = hidden / np.maximum(np.linalg.norm(hidden, axis=-1, keepdims=True), MIN_NORM)
        return PoolingRequestOutput(
            request_id=self.request_id,
            outputs=PoolingOutput(hidden if self.state.seq.needs_all_tokens else hidden[0]),
            prompt_token_ids=self.engine_input.token_ids.tolist(),
            finished=self.finished,
            num_cached_tokens=self.state.seq.num_cached_tokens or 0,
        )


def engine_prompt(engine_input: EngineInput, *, encoder_decoder: bool) -> EnginePrompt:
    """The prompt that the sequences of a request share. Media fill spans of the prompt; an encoder-decoder reads them
    through cross attention instead."""
    token_ids = np.full_like(engine_input.token_ids, NO_TOKEN) if engine_input.is_embeds else engine_input.token_ids
    positions, delta = engine_input.rope_positions, engine_input.rope_delta
    salt = (engine_input.cache_salt or "").encode()
    if encoder_decoder:
        items = tuple((entry.item_hash, entry.item) for entry in engine_input.items)
        salt += b"".join(b"|" + item_hash.encode() for item_hash, _ in items)
        return EnginePrompt(token_ids, positions, delta, encoder_items=items, cache_salt=salt)
    spans = tuple(
        MediaSpan(span.start, span.length, entry.item_hash, entry.item, span.embed_offset)
        for span, entry in zip(engine_input.spans, engine_input.items, strict=True)
    )
    return EnginePrompt(token_ids, positions, delta, spans=spans, cache_salt=salt)


def _completion_states(
    model: LoadedModel, engine_input: EngineInput, params: SamplingParams, grammar: CompiledGrammar | None
) -> list[CompletionState]:
    """The states of the request's `n` outputs."""
    stop_ids = _stop_ids(model, params)
    if engine_input.is_embeds and params.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs needs a prompt of tokens, but this prompt is embeddings.", "no_prompt_tokens"
        )
    prompt = engine_prompt(engine_input, encoder_decoder=model.spec.is_encoder_decoder)
    logits_processors = _logits_processors(model, engine_input, params, grammar)
    seed = params.seed if params.seed is not None else next(model.seeds)
    eos_id = model.eos_ids[0] if model.eos_ids else None
    states = []
    for index, logits_processor in enumerate(logits_processors):
        seq = EngineSequence(
            index,
            prompt,
            params,
            max_model_len=model.max_model_len,
            seed=seed + index,
            stop_ids=stop_ids,
            logits_processor=logits_processor,
            needs_all_tokens=params.prompt_logprobs is not None,
        )
        states.append(CompletionState(seq, model.tokenizer, eos_id))
    return states


def _stop_ids(model: LoadedModel, params: SamplingParams) -> tuple[int, ...]:
    """The tokens that end a sequence: the model's own, and those of the request that are in the vocabulary."""
    own = () if params.ignore_eos else model.eos_ids
    requested = [token for token in params.stop_token_ids or () if 0 <= token < model.vocab_size]
    stop_ids = tuple(dict.fromkeys([*own, *requested]))
    if len(stop_ids) > model.buckets.max_stop_ids:
        raise RequestError(
            f"stop_token_ids: {len(stop_ids)} stop tokens (the model's own included) were requested, "
            f"at most {model.buckets.max_stop_ids} are supported.",
            "too_many_stop_tokens",
        )
    return stop_ids


def _logits_processors(
    model: LoadedModel, engine_input: EngineInput, params: SamplingParams, grammar: CompiledGrammar | None
) -> list[LogitsProcessor]:
    """The logits processor of each output. One with a grammar or with suppressed tokens has state; the others can be
    shared."""
    bias = LogitsBias(params, model.vocab_size, model.tokenizer, engine_input.suppressed)
    if params.structured_outputs is not None:
        grammar = grammar or model.grammar_compiler.compile(params.structured_outputs)
        return [StructuredOutput(model.grammar_compiler, grammar, bias) for _ in range(params.n)]
    if engine_input.timestamps is not None:
        return [TimestampRules(engine_input.timestamps, model.vocab_size, bias)] * params.n
    if bias.has_state:
        return [LogitsBias(params, model.vocab_size, model.tokenizer, engine_input.suppressed) for _ in range(params.n)]
    return [bias] * params.n
