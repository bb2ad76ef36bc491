"""Requests on their way through the engine: one, and a batch of them."""

from __future__ import annotations

import concurrent.futures
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from mmjax.build import Parts
from mmjax.engine.answer import Answer
from mmjax.engine.constraints import Constraints
from mmjax.engine.engine import Engine
from mmjax.engine.grammar import Grammar
from mmjax.engine.sequence import MediaSpan, Prompt
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.engine.timestamps import Timed
from mmjax.processors.prompt import NO_TOKEN
from mmjax.render import Rendered
from mmjax.types import RequestError, RequestMetrics, RequestOutput, SamplingParams

Progress = bool | Callable[..., Any]
AHEAD = 32  # prompts rendered before the engine has taken them: bounds the decoded media held at once


class Request:
    """A rendered prompt in the engine: what is made of it, on the least busy one, and its times."""

    answers: Any

    def __init__(self, parts: Parts, request_id: str, rendered: Rendered) -> None:
        self.request_id = request_id
        self.rendered = rendered
        self.engine: Engine = min(parts.engines, key=lambda e: e.load)
        self.metrics = RequestMetrics(arrival_time=time.monotonic())

    def abort(self) -> None:
        """End the request; its pages are free at once."""
        self.engine.abort(self.answers)

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def note(self, answer: Any) -> None:
        """Note the time at which one of the answers changed."""
        now, metrics = time.monotonic(), self.metrics
        if metrics.first_token_time is None and answer.seq.output_len:
            metrics.first_token_time = now
        metrics.first_scheduled_time = answer.seq.scheduled_time
        metrics.last_token_time = now
        if answer.finish_reason is not None:
            metrics.finished_time = now


class Run(Request):
    """One request for text."""

    def __init__(self, parts: Parts, request_id: str, rendered: Rendered, params: SamplingParams) -> None:
        super().__init__(parts, request_id, rendered)
        stops = () if params.ignore_eos else parts.eos
        asked = [token for token in params.stop_token_ids or () if 0 <= token < parts.vocab_size]  # others never come
        stops = tuple(dict.fromkeys([*stops, *asked]))
        if len(stops) > parts.sizes.stops:
            raise RequestError(
                f"stop_token_ids: {len(stops)} stop tokens (the model's own included) were asked for, "
                f"at most {parts.sizes.stops} are supported.",
                "too_many_stop_tokens",
            )
        if rendered.embedded and params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs are of tokens, and this prompt is embeddings.", "no_prompt_tokens")
        prompt = engine_prompt(rendered, parts.shape.cross)
        plain = Constraints(params, parts.vocab_size, parts.tokenizer)
        kept: list[Constraints | Timed | Grammar] = [plain] * params.n
        if params.structured_outputs is not None:  # a grammar follows one answer
            rules = parts.vocabulary.compile(params.structured_outputs)
            kept = [Grammar(parts.vocabulary, rules, plain) for _ in range(params.n)]
        elif rendered.timestamps is not None:
            kept = [Timed(rendered.timestamps, parts.vocab_size, plain)] * params.n
        seed = params.seed if params.seed is not None else parts.next_seed()
        eos = parts.eos[0] if parts.eos else None
        self.answers: list[Answer] = []
        for index in range(params.n):
            seq = EngineSequence(
                request_id,
                index,
                prompt,
                params,
                seed=seed + index,
                stops=stops,
                max_len=parts.max_model_len,
                constraints=kept[index],
            )
            answer = Answer(seq, parts.tokenizer, eos)
            self.answers.append(answer)
            self.engine.add(answer)

    def output(self) -> RequestOutput:
        """The request's answers so far."""
        r, first = self.rendered, self.answers[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=r.prompt,
            prompt_token_ids=r.tokens.tolist(),
            prompt_logprobs=first.prompt_logprobs,
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            metrics=self.metrics,
            encoder_prompt=r.encoder_prompt,
            encoder_prompt_token_ids=None if r.encoder_tokens is None else r.encoder_tokens.tolist(),
            num_cached_tokens=first.seq.cached,
        )


def engine_prompt(rendered: Rendered, cross: bool) -> Prompt:
    """A rendered prompt in the engine's own words."""
    items = rendered.items
    spans = (
        ()
        if cross
        else tuple(
            MediaSpan(span.start, span.length, entry.key, entry.item, span.first)
            for span, entry in zip(rendered.spans, items, strict=True)
        )
    )
    audio = tuple((entry.key, entry.item) for entry in items) if cross else ()
    salt = (rendered.salt or "").encode() + b"".join(b"|" + entry.key.encode() for entry in items if cross)
    tokens = np.full_like(rendered.tokens, NO_TOKEN) if rendered.embedded else rendered.tokens
    return Prompt(tokens, rendered.positions, rendered.delta, spans, audio, salt)


class Job:
    """One call for answers: prompts are rendered on threads, in order, while the engine already runs the first."""

    def __init__(
        self,
        parts: Parts,
        start: Callable[[Rendered, Any], Any],
        workers: concurrent.futures.Executor,
        use_tqdm: Progress,
        total: int,
    ) -> None:
        self.parts = parts
        self.start = start
        self.workers = workers
        self.unseen: deque[tuple[int, Callable[[], Rendered], Any]] = deque()
        self.waiting: deque[tuple[int, concurrent.futures.Future[Rendered], Any]] = deque()
        self.open: dict[int, tuple[int, Any]] = {}
        self.runs: dict[int, Any] = {}
        self.bars = [_bar(use_tqdm, total, name) for name in ("Rendering prompts", "Processed prompts")]

    def submit(self, i: int, render: Callable[[], Rendered], params: Any) -> None:
        """Queue prompt i, which `render` renders on a thread."""
        self.unseen.append((i, render, params))

    def run(self) -> dict[int, Any]:
        """Run everything to its end: outputs by index."""
        outputs = {}
        engines = self.parts.engines
        while self.unseen or self.waiting or self.open:
            self._admit(block=not self.open)
            for engine in engines:
                for answer in engine.step():
                    i, run = self.open.get(answer.seq.number, (-1, None))
                    if run is None:
                        continue  # of an earlier call that was interrupted
                    run.note(answer)
                    if run.finished and i not in outputs:
                        outputs[i] = run.output()
                        for each in run.answers:
                            self.open.pop(each.seq.number)
                        self.bars[1].update(1)
        return outputs

    def _admit(self, *, block: bool) -> None:
        """Hand rendered prompts to the engine and have the next ones rendered; `block` waits for one."""
        while self.unseen and len(self.waiting) < AHEAD:
            i, render, params = self.unseen.popleft()
            self.waiting.append((i, self.workers.submit(render), params))
        while self.waiting and (block or self.waiting[0][1].done()):
            i, future, params = self.waiting.popleft()
            run = self.start(future.result(), params)
            self.runs[i] = run
            for answer in run.answers:
                self.open[answer.seq.number] = (i, run)
            self.bars[0].update(1)
            block = False

    def abort(self) -> None:
        """Drop whatever is queued or running, and let the device come to rest."""
        for _, future, _ in self.waiting:
            future.cancel()
        for run in self.runs.values():
            run.abort()
        for engine in self.parts.engines:
            while engine.busy:
                engine.step()

    def close(self) -> None:
        """Take the progress bars down."""
        for bar in self.bars:
            bar.close()


def _bar(use_tqdm: Progress, total: int, name: str) -> Any:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc=name, disable=not use_tqdm, dynamic_ncols=True)
