"""Benchmarks an engine on random inputs of realistic shapes: greedy, without stop tokens, every prompt different.

throughput   many prompts at once
latency      one small batch, repeated
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax import LLM, RequestOutput, SamplingParams
from mmjax.cli.bench.random_inputs import AUDIO_RATE, random_audio, random_image, random_text
from mmjax.engine.compile_counter import count_compiles


@dataclasses.dataclass(frozen=True)
class Workload:
    """prompts: how many. text: tokens of text per prompt. images: (width, height) of each image of a prompt. audio_s:
    seconds of audio per prompt, 0 for none. output: tokens to generate per prompt."""

    prompts: int = 16
    text: int = 64
    images: tuple[tuple[int, int], ...] = ()
    audio_s: float = 0.0
    output: int = 64


def make_prompts(work: Workload, encode: Callable[[str], Sequence[int]], seed: int) -> list[dict[str, Any]]:
    """Prompts of random words and noise. Equal seeds give equal prompts; prompts of different seeds all differ."""
    rng = np.random.default_rng(seed)
    return [_prompt(work, encode, rng) for _ in range(work.prompts)]


def _prompt(work: Workload, encode: Callable[[str], Sequence[int]], rng: np.random.Generator) -> dict[str, Any]:
    media: dict[str, Any] = {}
    if work.images:
        media["image"] = [random_image(size, rng) for size in work.images]
    if work.audio_s:
        media["audio"] = (random_audio(work.audio_s, rng), AUDIO_RATE)
    return {"prompt": "<image>" * len(work.images) + random_text(work.text, rng, encode), "multi_modal_data": media}


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Milliseconds over requests."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        if not seconds:
            return None
        ms = np.asarray(seconds) * 1e3
        return cls(float(ms.mean()), float(np.median(ms)), float(np.percentile(ms, 99)))


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """The figures of a run.

    start_s: loading the model, compiling included. start_cache: how many of its programs the compilation cache had; see
    `CompileCounter.cache`. ttft_ms: arrival to first token. itl_ms: mean time between a request's tokens. host_share:
    the share of the wall time that the engine's own Python took. idle_share: the part of it during which the device had
    nothing to do.
    """

    device: str
    start_s: float
    start_cache: str
    start_programs: int
    wall_s: float
    requests: int
    input_tokens: int
    output_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    decode_steps_per_s: float
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    host_share: float
    idle_share: float
    compiles_after_warmup: int

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def as_table(self) -> str:
        rows = []
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                value = "  ".join(f"{part} {number:.2f}" for part, number in value.items())
            elif isinstance(value, float):
                value = f"{value:.1%}" if name.endswith("_share") else f"{value:,.2f}"
            rows.append(f"{name:<24}{'not measured' if value is None else value}")
        return "\n".join(rows)


class Bench:
    """An engine, and runs on it."""

    def __init__(self, model: str, engine_kwargs: Mapping[str, Any]) -> None:
        with count_compiles() as self.compiles:
            begin = time.perf_counter()
            self.llm = LLM(model, **{"disable_log_stats": False, **engine_kwargs})
            self.start_s = time.perf_counter() - begin

    def run(self, work: Workload, seed: int) -> BenchResult:
        """Generate outputs for one set of prompts. Call `warm_up` first: a first run is slower than the others."""
        tokenizer = self.llm.model.tokenizer
        if tokenizer is None:
            raise ValueError("the benchmark writes its prompts as text and needs the model's tokenizer")
        prompts = make_prompts(work, tokenizer.encode, seed)
        params = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
        before = self.llm.counters()
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return self._result(outputs, before, time.perf_counter() - begin)

    def warm_up(self, work: Workload) -> None:
        """Run a small part of the workload, so that one-time work is not measured."""
        self.run(dataclasses.replace(work, prompts=min(work.prompts, 2), output=min(work.output, 4)), seed=0)

    def throughput(self, work: Workload) -> BenchResult:
        """A run of all prompts at once."""
        self.warm_up(work)
        return self.run(work, seed=1)

    def latency(self, work: Workload, repeats: int = 5) -> BenchResult:
        """The run of median wall time among `repeats` runs, each a batch of new prompts."""
        self.warm_up(work)
        runs = [self.run(work, seed=seed) for seed in range(1, repeats + 1)]
        median = statistics.median_low(run.wall_s for run in runs)
        return next(run for run in runs if run.wall_s == median)

    def _result(self, outputs: Sequence[RequestOutput], before: Mapping[str, float], wall_s: float) -> BenchResult:
        now = self.llm.counters()
        spent = {name: now[name] - before[name] for name in ("decode_steps", "host_s", "idle_s")}
        ttft, itl = [], []
        for output in outputs:
            times, count = output.metrics, sum(len(completion.token_ids) for completion in output.outputs)
            if times is None or times.first_token_time is None:
                continue
            ttft.append(times.first_token_time - times.arrival_time)
            if times.last_token_time is not None and count > 1:
                itl.append((times.last_token_time - times.first_token_time) / (count - 1))
        input_tokens = sum(len(output.prompt_token_ids or ()) for output in outputs)
        output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        return BenchResult(
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            start_s=self.start_s,
            start_cache=self.compiles.cache,
            start_programs=self.compiles.count,
            wall_s=wall_s,
            requests=len(outputs),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            requests_per_s=len(outputs) / wall_s,
            input_tokens_per_s=input_tokens / wall_s,
            output_tokens_per_s=output_tokens / wall_s,
            decode_steps_per_s=spent["decode_steps"] / wall_s,
            ttft_ms=Percentiles.of(ttft),
            itl_ms=Percentiles.of(itl),
            host_share=spent["host_s"] / wall_s,
            idle_share=spent["idle_s"] / wall_s,
            compiles_after_warmup=int(now["compiles_after_warmup"]),
        )
