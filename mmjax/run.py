"""Requests on their way through the engine: one, and a batch of them."""

from __future__ import annotations

import concurrent.futures
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from mmjax.build import LoadedModel
from mmjax.engine.answer import CompletionState
from mmjax.engine.constraints import LogitsBias
from mmjax.engine.engine import Engine
from mmjax.engine.grammar import StructuredOutput
from mmjax.engine.sequence import EnginePrompt, MediaSpan
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.engine.timestamps import TimestampRules
from mmjax.processors.prompt import NO_TOKEN
from mmjax.render import EngineInput
from mmjax.types import RequestError, RequestMetrics, RequestOutput, SamplingParams

Progress = bool | Callable[..., Any]
MAX_PROCESSED_AHEAD = 32  # prompts rendered before the engine has taken them: bounds the decoded media held at once


class EngineRequest:
    """A rendered prompt in the engine: what is made of it, on the least busy one, and its times."""

    states: Any

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

    def record_times(self, state: Any) -> None:
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
        kept: list[LogitsBias | TimestampRules | StructuredOutput] = [plain] * params.n
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
                request_id,
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


class BatchJob:
    """One call for answers: prompts are rendered on threads, in order, while the engine already runs the first."""

    def __init__(
        self,
        model: LoadedModel,
        start: Callable[[EngineInput, Any], Any],
        workers: concurrent.futures.Executor,
        use_tqdm: Progress,
        total: int,
    ) -> None:
        self.model = model
        self.start = start
        self.workers = workers
        self.unseen: deque[tuple[int, Callable[[], EngineInput], Any]] = deque()
        self.waiting: deque[tuple[int, concurrent.futures.Future[EngineInput], Any]] = deque()
        self.open: dict[int, tuple[int, Any]] = {}
        self.runs: dict[int, Any] = {}
        self.bars = [_bar(use_tqdm, total, name) for name in ("Rendering prompts", "Processed prompts")]

    def submit(self, i: int, render: Callable[[], EngineInput], params: Any) -> None:
        """Queue prompt i, which `render` renders on a thread."""
        self.unseen.append((i, render, params))

    def run(self) -> dict[int, Any]:
        """Run everything to its end: outputs by index."""
        outputs = {}
        engines = self.model.engines
        while self.unseen or self.waiting or self.open:
            self._admit(block=not self.open)
            for engine in engines:
                for state in engine.step():
                    i, request = self.open.get(state.seq.seq_id, (-1, None))
                    if request is None:
                        continue  # of an earlier call that was interrupted
                    request.record_times(state)
                    if request.finished and i not in outputs:
                        outputs[i] = request.output()
                        for each in request.states:
                            self.open.pop(each.seq.seq_id)
                        self.bars[1].update(1)
        return outputs

    def _admit(self, *, block: bool) -> None:
        """Hand rendered prompts to the engine and have the next ones rendered; `block` waits for one."""
        while self.unseen and len(self.waiting) < MAX_PROCESSED_AHEAD:
            i, render, params = self.unseen.popleft()
            self.waiting.append((i, self.workers.submit(render), params))
        while self.waiting and (block or self.waiting[0][1].done()):
            i, future, params = self.waiting.popleft()
            request = self.start(future.result(), params)
            self.runs[i] = request
            for state in request.states:
                self.open[state.seq.seq_id] = (i, request)
            self.bars[0].update(1)
            block = False

    def abort(self) -> None:
        """Drop whatever is queued or running, and let the device come to rest."""
        for _, future, _ in self.waiting:
            future.cancel()
        for request in self.runs.values():
            request.abort()
        for engine in self.model.engines:
            while engine.has_work:
                engine.step()

    def close(self) -> None:
        """Take the progress bars down."""
        for bar in self.bars:
            bar.close()


def _bar(use_tqdm: Progress, total: int, name: str) -> Any:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc=name, disable=not use_tqdm, dynamic_ncols=True)
