"""`LLM`: prompts in, outputs out. Puts the rooms together; has no logic of its own."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from mmjax import inputs
from mmjax.build import Parts, build
from mmjax.config import EngineArgs
from mmjax.engine.answer import Answer
from mmjax.engine.constraints import Constraints
from mmjax.engine.engine import Engine
from mmjax.engine.sequence import MediaSpan, Prompt
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.render import Rendered
from mmjax.types import RequestError, RequestMetrics, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

Progress = bool | Callable[..., Any]


class LLM:
    """A model ready to answer.

    `model` is a local directory in Hugging Face layout, one that `mmjax convert` wrote, or a hub id; every other
    argument is a keyword of `mmjax.config.EngineArgs`. Raises TypeError for an unknown keyword, ValueError for a bad
    value or a checkpoint that cannot be loaded.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.args = EngineArgs(str(model), **kwargs)
        self.parts: Parts = build(self.args)
        self._requests = 0
        self._workers = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="render")

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; the outputs are in the order of the prompts.

        A prompt is a string, a list of token ids, or a dict with `prompt` or `prompt_token_ids` and optionally
        `multi_modal_data`, `mm_processor_kwargs`, `multi_modal_uuids`, `cache_salt`. sampling_params: None = the
        model's defaults; one for all; or one per prompt. priority: per prompt, lower first. Raises TypeError for
        something that is no prompt, ValueError for one that cannot be served; the engine stays usable.
        """
        batch = inputs.batch(prompts)
        params = self._params(sampling_params, len(batch))
        for name, values in (("lora_request", lora_request), ("priority", priority)):
            if isinstance(values, Sequence) and len(values) != len(batch):
                raise ValueError(f"The lengths of prompts ({len(batch)}) and {name} ({len(values)}) must be the same.")
        if lora_request is not None:
            raise RequestError("LoRA is not supported: pass lora_request=None.", "lora_unsupported")
        requests = [self.parts.renderer.parse(prompt) for prompt in batch]
        order = sorted(range(len(batch)), key=lambda i: priority[i]) if priority is not None else range(len(batch))
        runs = {}
        job = _Job(self, use_tqdm, len(batch))
        try:
            for i in order:
                job.submit(i, requests[i], tokenization_kwargs, params[i])
            runs = job.run()
        except BaseException:
            job.abort()
            raise
        finally:
            job.close()
        return [runs[i] for i in range(len(batch))]

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            params = [given] * count
        else:
            params = list(given)
            if len(params) != count:
                raise ValueError(f"The lengths of prompts ({count}) and params ({len(params)}) must be the same.")
        for p in {id(p): p for p in params}.values():
            if not isinstance(p, SamplingParams):
                raise TypeError(f"sampling_params should be SamplingParams, got {type(p).__name__}")
            p.verify(self.parts.vocab_size, self.args.max_logprobs)
            if p.stop and self.parts.tokenizer is None:
                raise RequestError("stop strings need a tokenizer: do not set skip_tokenizer_init.", "no_tokenizer")
        return params

    def start(self, rendered: Rendered, params: SamplingParams) -> Run:
        """Queue one rendered prompt on the least busy engine."""
        self._requests += 1
        return Run(self, str(self._requests - 1), rendered, params)

    # -- what else users ask for -------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model."""
        if self.parts.tokenizer is None:
            raise ValueError("Unable to get the tokenizer because skip_tokenizer_init is True")
        return self.parts.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without `sampling_params`: the defaults of the model's generation_config.json."""
        return SamplingParams.from_generation_config(self.parts.generation)

    def get_metrics(self) -> dict[str, float]:
        """Counters since start, by name: engine work and times in seconds, compilations, cache queries and hits."""
        cache = self.parts.renderer.cache
        out: dict[str, float] = {
            "startup_s": self.parts.startup_s,
            "compile_s": self.parts.compile_s,
            "mm_cache_queries": cache.queries,
            "mm_cache_hits": cache.hits,
        }
        for engine in self.parts.engines:
            counted = vars(engine.stats) | {
                "compiles": engine.runner.compiles,
                "compiles_after_warmup": engine.runner.compiles_after_warmup,
                "preemptions": engine.scheduler.preemptions,
            }
            for name, value in counted.items():
                out[name] = out.get(name, 0) + value
        return out

    def reset_mm_cache(self) -> None:
        """Forget processed media and their embeddings."""
        self.parts.renderer.cache.clear()
        for engine in self.parts.engines:
            engine.slab.clear()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and nothing done, while requests run."""
        return all([engine.pages.forget() for engine in self.parts.engines])


class Run:
    """One request in the engine: its answers and its times."""

    def __init__(self, llm: LLM, request_id: str, rendered: Rendered, params: SamplingParams) -> None:
        parts = llm.parts
        self.request_id = request_id
        self.rendered = rendered
        self.engine: Engine = min(parts.engines, key=lambda e: e.load)
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        stops = () if params.ignore_eos else parts.eos
        stops = tuple(dict.fromkeys([*stops, *(params.stop_token_ids or ())]))
        if len(stops) > parts.sizes.stops:
            raise RequestError(
                f"stop_token_ids: {len(stops)} stop tokens (the model's own included) were asked for, "
                f"at most {parts.sizes.stops} are supported.",
                "too_many_stop_tokens",
            )
        prompt = _prompt(rendered, parts.shape.cross)
        constraints = Constraints(params, parts.vocab_size, parts.tokenizer)
        seed = params.seed if params.seed is not None else parts.next_seed()
        eos = parts.eos[0] if parts.eos else None
        self.answers = []
        for index in range(params.n):
            seq = EngineSequence(
                request_id,
                index,
                prompt,
                params,
                seed=seed + index,
                stops=stops,
                max_len=parts.max_model_len,
                constraints=constraints,
            )
            answer = Answer(seq, parts.tokenizer, eos)
            self.answers.append(answer)
            self.engine.add(answer)

    def abort(self) -> None:
        """End the request; its pages are free at once."""
        self.engine.abort(self.answers)

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

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


def _prompt(rendered: Rendered, cross: bool) -> Prompt:
    """A rendered prompt in the engine's own words."""
    items = rendered.items
    spans = () if cross else tuple(
        MediaSpan(span.start, span.length, entry.key, entry.item)
        for span, entry in zip(rendered.spans, items, strict=True)
    )
    audio = tuple((entry.key, entry.item) for entry in items) if cross else ()
    salt = (rendered.salt or "").encode() + b"".join(b"|" + entry.key.encode() for entry in items if cross)
    return Prompt(rendered.tokens, rendered.positions, rendered.delta, spans, audio, salt)


class _Job:
    """One call of `generate`: prompts are rendered on threads, in order, while the engine already runs the first."""

    def __init__(self, llm: LLM, use_tqdm: Progress, total: int) -> None:
        self.llm = llm
        self.waiting: deque[tuple[int, concurrent.futures.Future[Rendered], SamplingParams]] = deque()
        self.open: dict[int, tuple[int, Run]] = {}
        self.runs: dict[int, Run] = {}
        self.bars = [_bar(use_tqdm, total, name) for name in ("Rendering prompts", "Processed prompts")]

    def submit(self, i: int, request: Any, tokenization_kwargs: dict[str, Any] | None, params: SamplingParams) -> None:
        future = self.llm._workers.submit(self.llm.parts.renderer.render, request, tokenization_kwargs)
        self.waiting.append((i, future, params))

    def run(self) -> dict[int, RequestOutput]:
        """Run everything to its end: outputs by index."""
        outputs = {}
        engines = self.llm.parts.engines
        while self.waiting or self.open:
            self._admit(block=not self.open)
            for engine in engines:
                for answer in engine.step():
                    i, run = self.open.get(answer.seq.number, (-1, None))
                    if run is None:
                        continue  # of an earlier call that was interrupted
                    _note_times(run, answer)
                    if run.finished and i not in outputs:
                        outputs[i] = run.output()
                        for each in run.answers:
                            self.open.pop(each.seq.number)
                        self.bars[1].update(1)
        return outputs

    def _admit(self, *, block: bool) -> None:
        while self.waiting and (block or self.waiting[0][1].done()):
            i, future, params = self.waiting.popleft()
            run = self.llm.start(future.result(), params)
            self.runs[i] = run
            for answer in run.answers:
                self.open[answer.seq.number] = (i, run)
            self.bars[0].update(1)
            block = False

    def abort(self) -> None:
        for _, future, _ in self.waiting:
            future.cancel()
        for run in self.runs.values():
            run.abort()
        for engine in self.llm.parts.engines:
            while engine.busy:
                engine.step()

    def close(self) -> None:
        for bar in self.bars:
            bar.close()


def _note_times(run: Run, answer: Answer) -> None:
    now = time.monotonic()
    metrics = run.metrics
    if metrics.first_token_time is None and answer.seq.output_len:
        metrics.first_token_time = now
    metrics.first_scheduled_time = answer.seq.scheduled_time
    metrics.last_token_time = now
    if answer.finish_reason is not None:
        metrics.finished_time = now


def _bar(use_tqdm: Progress, total: int, name: str) -> Any:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc=name, disable=not use_tqdm, dynamic_ncols=True)
