"""The engine loop: schedule, build, dispatch, read. The host reads the results of one dispatch while
the device runs the next."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np

from mmjax.engine.batch_builder import (
    build_decode,
    build_embed_writes,
    build_encode,
    build_logit_biases,
    build_logprob_targets,
    build_prefill,
)
from mmjax.engine.block_pool import BlockPool
from mmjax.engine.device_queue import DeviceQueue
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.histogram import Histogram
from mmjax.engine.memory import EngineMemory
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.output_processor import OutputProcessor, PromptChunk, StepResult
from mmjax.engine.programs import StepOutput
from mmjax.engine.sampler import PromptLogprobs, token_counts_row
from mmjax.engine.sampling_state import SamplingState
from mmjax.engine.scheduler import NeedsResults, ScheduledChunk, Scheduler, SchedulerConfig, SchedulerOutput
from mmjax.engine.sequence import EngineSequence
from mmjax.processors.base import MediaItem
from mmjax.spec import ModelSpec

# How long a step waits for biases that other threads compute, so that batches stay whole, unless they are known to be
# slow; and how long it waits when nothing else can run.
BIAS_WAIT_S, IDLE_BIAS_WAIT_S = 0.01, 0.02
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0
)  # fmt: skip
MAX_IN_FLIGHT = 2  # dispatches: one running and one queued. Interleaved decode steps do not count.


@dataclasses.dataclass
class EngineStats:
    """Counters since start. wait_s: seconds that the engine's thread waited for results. host_s: seconds that it spent
    in Python on scheduling, building and reading. idle_s: the part of host_s during which nothing was in flight.
    """

    dispatches: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    encoded_items: int = 0
    wait_s: float = 0.0
    host_s: float = 0.0
    idle_s: float = 0.0


@dataclasses.dataclass
class InFlightStep:
    """A dispatch whose results the host has not read. members: (sequence, column of its results, steps to run).

    calls: the device calls queued since the previous step; their errors are raised when the results are read.
    interleaved_decode: a single decode step between two chunks of prompts. It finishes long before the host has built
    the media of the next chunk, so it does not keep the device busy meanwhile.
    """

    output: Future[StepOutput]
    members: list[tuple[EngineSequence, int, int]]
    calls: list[Future[Any]] = dataclasses.field(default_factory=list)
    interleaved_decode: bool = False
    prefill_tokens: int = 0
    prompt_chunks: list[PromptChunk] = dataclasses.field(default_factory=list)
    prompt_logprobs: Future[PromptLogprobs] | None = None


class Engine:
    """Runs sequences to completion on one replica of the model. Not thread-safe: one thread adds, steps and aborts.

    A thread of its own calls the device programs, in order; see `DeviceQueue`.
    """

    def __init__(self, runner: ModelRunner, spec: ModelSpec, memory: EngineMemory, *, prefix_caching: bool) -> None:
        self.runner = runner
        self.spec = spec
        self.memory = memory
        self.buckets = buckets = memory.buckets
        config = SchedulerConfig(
            max_num_seqs=buckets.seq_buckets[-1],
            max_num_batched_tokens=buckets.token_buckets[-1],
            q_block_size=buckets.q_block_size,
            num_decode_steps=buckets.num_decode_steps,
            max_encoder_inputs={name: sizes[-1] for name, sizes in buckets.encoder_buckets.items()},
            encoder_of={modality: name for name, each in spec.encoders.items() for modality in each.modalities},
            cross_len=spec.cross_len,
            max_blocks_per_seq=buckets.max_blocks_per_seq,
        )
        self.block_pool = BlockPool(memory.num_blocks, buckets.block_size)
        self.encoder_cache = EncoderCache(memory.num_mm_rows)
        self.scheduler = Scheduler(config, self.block_pool, self.encoder_cache, prefix_caching=prefix_caching)
        self.sampling_state = SamplingState(buckets.num_rows, buckets.max_stop_ids, buckets.cross_blocks_per_seq)
        self.device = DeviceQueue()
        self.stats = EngineStats()
        self.step_tokens = Histogram(STEP_TOKENS)  # of each dispatch: those of prompts, and the sampled ones
        self.inter_token_latency = Histogram(TOKEN_SECONDS)  # tokens of one dispatch share the time since the last
        self._outputs: dict[int, OutputProcessor] = {}
        self._in_flight: deque[InFlightStep] = deque()
        self._bias_errors: dict[int, Exception] = {}  # by sequence: what its logits processor raised
        self._late_biases: set[Future[np.ndarray]] = set()  # no step waits for these again

    def add(self, output: OutputProcessor) -> None:
        """Queue the sequence of this output."""
        self._outputs[output.seq.seq_id] = output
        self.scheduler.add(output.seq)

    def abort(self, outputs: Sequence[OutputProcessor]) -> None:
        """End sequences now; their blocks are freed at once."""
        for output in outputs:
            if not output.seq.finished:
                try:
                    output.finish("abort", None)
                except Exception as error:
                    self._fail(output, error)
                else:
                    self._end(output)

    @property
    def num_unfinished(self) -> int:
        """Sequences that are queued or running."""
        return len(self._outputs)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return not self.scheduler.idle or bool(self._in_flight)

    def step(self) -> list[OutputProcessor]:
        """Dispatch what is scheduled, then read results while too many dispatches are in flight. Returns the outputs
        that changed. A logits processor or an output processor that raises ends its own sequence only."""
        start, wait_before = time.perf_counter(), self.stats.wait_s
        was_idle = not self._in_flight
        self._wait_for_biases()
        try:
            scheduled = self.scheduler.schedule(in_flight=bool(self._in_flight))
        except NeedsResults:
            scheduled = None
        if scheduled:
            self._dispatch(scheduled)
            if was_idle:
                self.stats.idle_s += time.perf_counter() - start
        changed = [self._fail(self._outputs[seq_id], error) for seq_id, error in self._bias_errors.items()]
        self._bias_errors.clear()
        if scheduled is None and self._in_flight:
            changed += self._collect(self._in_flight.popleft())
        elif scheduled is None and self._late_biases:
            wait(self._late_biases, IDLE_BIAS_WAIT_S, FIRST_COMPLETED)
        while sum(not step.interleaved_decode for step in self._in_flight) >= MAX_IN_FLIGHT:
            changed += self._collect(self._in_flight.popleft())
        self.stats.host_s += time.perf_counter() - start - (self.stats.wait_s - wait_before)
        return changed

    def _wait_for_biases(self) -> None:
        """Wait a moment for biases that have just begun to be computed, once for each. A sequence whose bias comes
        later sits out the steps until then."""
        pending = [each for seq in self.scheduler.running if seq.awaits_bias and (each := seq.pending_bias) is not None]
        deadline = time.perf_counter() + BIAS_WAIT_S
        for row, is_slow in pending:
            if not is_slow and row not in self._late_biases:
                with contextlib.suppress(TimeoutError):
                    row.exception(max(0.0, deadline - time.perf_counter()))
        self._late_biases = {row for row, _ in pending if not row.done()}

    def align(self, modality: str, item: MediaItem, token_ids: np.ndarray) -> Future[Any]:
        """Alignment scores f32[A, T, U] of a transcript of an item, after what is dispatched already."""
        return self.device.run_apart(self.runner.align, self.spec.encoder_of(modality), item.features, token_ids)

    def sleep(self, *, keep_params: bool) -> Any:
        """Free the device's memory. No sequence may be running. Returns the parameters on the host if they are kept."""
        self.device.run(lambda: None).result()  # all earlier calls have returned
        for call in self.device.take_calls():
            call.result()
        self.block_pool.reset_prefix_cache()
        self.encoder_cache.clear()
        self.runner.drop_state()
        return self.runner.take_params(keep=keep_params)

    def counters(self) -> dict[str, float]:
        """`stats`, and the counters of the device queue, the runner and the scheduler, by name."""
        return vars(self.stats) | {
            "call_s": self.device.call_s,
            "compiles": self.runner.compiles,
            "compiles_after_warmup": self.runner.compiles_after_warmup,
            "preemptions": self.scheduler.preemptions,
            "prefix_cache_queries": self.scheduler.prefix_cache_queries,
            "prefix_cache_hits": self.scheduler.prefix_cache_hits,
        }

    # -- dispatching -------------------------------------------------------------------------------------------------

    def _dispatch(self, scheduled: SchedulerOutput) -> None:
        for seq in scheduled.started:
            seq.scheduled_time = seq.scheduled_time or time.monotonic()
            self.sampling_state.set(seq, self.spec.cross_len)
            self._set_sampling_row(seq)
        for name, encoder in self.spec.encoders.items():
            encodes = [encode for encode in scheduled.encode if encode.encoder == name]
            if encodes:
                self.device.run(self.runner.encode, name, *build_encode(self.runner.ready, name, encoder, encodes))
                self.stats.encoded_items += len(encodes)
        given_embeds = [encode for encode in scheduled.encode if encode.item.embeds is not None]
        if given_embeds:
            for embeds, dest in build_embed_writes(self.buckets, given_embeds):
                self.device.run(self.runner.write_embeds, embeds, dest)
        if scheduled.prefill or scheduled.decode:
            step = self._prefill(scheduled.prefill) if scheduled.prefill else self._decode(scheduled.decode)
            step.interleaved_decode = scheduled.interleaved_decode
            step.calls = self.device.take_calls()
            self._in_flight.append(step)
        self.stats.dispatches += 1

    def _prefill(self, chunks: tuple[ScheduledChunk, ...]) -> InFlightStep:
        tokens, vector = build_prefill(
            self.runner.ready, chunks, self.sampling_state, self.scheduler.block_tables, self.encoder_cache
        )
        output = self.device.run(self.runner.prefill, tokens, vector)
        members = [(chunk.seq, column, 1) for column, chunk in enumerate(chunks) if chunk.is_last]
        step = InFlightStep(output, members, prompt_chunks=self._prompt_chunks(chunks))
        if step.prompt_chunks and not self.spec.pooling:
            targets = build_logprob_targets(tokens, step.prompt_chunks)
            step.prompt_logprobs = self.device.run(lambda: self.runner.prompt_logprobs(output.result(), targets))
        step.prefill_tokens = sum(chunk.num_tokens for chunk in chunks)
        self.stats.prefill_tokens += step.prefill_tokens
        return step

    def _prompt_chunks(self, chunks: tuple[ScheduledChunk, ...]) -> list[PromptChunk]:
        """The chunks whose sequences need a result for every prompt token: its hidden state if the engine pools, else
        the log-probability of the token after it."""
        wanted, offset = [], 0
        for chunk in chunks:
            seq, first, count = chunk.seq, chunk.start, chunk.num_tokens
            if not self.spec.pooling:
                first, count = chunk.start + 1, min(chunk.start + chunk.num_tokens, seq.prompt_len - 1) - chunk.start
            if seq.needs_all_tokens and count > 0:
                wanted.append(PromptChunk(seq, offset, first, count))
            offset += -(-chunk.num_tokens // self.buckets.q_block_size) * self.buckets.q_block_size
        return wanted

    def _decode(self, scheduled: tuple[tuple[EngineSequence, int], ...]) -> InFlightStep:
        dynamic = [seq for seq, _ in scheduled if seq.logits_processor.dynamic]
        if dynamic:
            biases = {row: self._bias_row(seq) for seq in dynamic if (row := seq.row) is not None}
            self.device.run(
                self.runner.set_logit_biases, *build_logit_biases(self.runner.ready, biases, self.spec.vocab_size)
            )
        seqs, vector = build_decode(self.runner.ready, scheduled, self.sampling_state, self.scheduler.block_tables)
        max_steps = max(steps for _, steps in scheduled)
        output = self.device.run(self.runner.decode, seqs, vector, max_steps)
        self.stats.decode_steps += max_steps
        return InFlightStep(output, [(seq, column, steps) for column, (seq, steps) in enumerate(scheduled)])

    def _set_sampling_row(self, seq: EngineSequence) -> None:
        """Write the token counts and biases of a sequence that has just been given a row."""
        assert seq.row is not None
        counts = None
        if seq.has_penalties:
            counts = token_counts_row(seq.prompt.token_ids.tolist(), seq.output_ids.tolist(), self.spec.vocab_size)
        bias = self._bias_row(seq)
        if seq.has_penalties or bias is not None:
            self.device.run(self.runner.set_sampling_row, seq.row, counts, bias)

    def _bias_row(self, seq: EngineSequence) -> np.ndarray | None:
        """f32[V] to add to the logits of a sequence's next token; None = no bias, or its logits processor raised."""
        try:
            return seq.logits_processor.bias_row(seq.output_ids.tolist())
        except Exception as error:
            self._bias_errors[seq.seq_id] = error
            return None

    # -- reading results ---------------------------------------------------------------------------------------------

    def _collect(self, step: InFlightStep) -> list[OutputProcessor]:
        """Wait for a dispatch, give its results to the outputs, and return those that changed."""
        start = time.perf_counter()
        self.runner.wait(step.calls)
        logprobs = None if step.prompt_logprobs is None else step.prompt_logprobs.result()
        result = StepResult(step.output.result(), logprobs)
        result.wait()
        self.stats.wait_s += time.perf_counter() - start
        changed, tokens_before, now = [], self.stats.output_tokens, time.monotonic()
        for chunk in step.prompt_chunks:
            if not chunk.seq.finished:
                output = self._outputs[chunk.seq.seq_id]
                try:
                    output.take_prompt(result, chunk)
                except Exception as error:
                    changed.append(self._fail(output, error))
        for seq, column, steps in step.members:
            if seq.finished:
                continue
            output, before = self._outputs[seq.seq_id], seq.num_tokens
            try:
                output.take(result, column, steps)
                if output.finish_reason is None and seq.logits_processor.dynamic:
                    seq.pending_bias = seq.logits_processor.prepare(seq.output_ids)
            except Exception as error:
                changed.append(self._fail(output, error))
                continue
            self.stats.output_tokens += seq.num_tokens - before
            self._note_tokens(seq, seq.num_tokens - before, now)
            self.scheduler.cache_blocks(seq, seq.num_tokens - 1)
            if output.finish_reason is not None:
                self._end(output)
            changed.append(output)
        self.step_tokens.observe(step.prefill_tokens + self.stats.output_tokens - tokens_before)
        return changed

    def _note_tokens(self, seq: EngineSequence, count: int, now: float) -> None:
        """Observe the time since the last token of a sequence, which has `count` new ones."""
        if count and seq.last_token_time is not None:
            self.inter_token_latency.observe((now - seq.last_token_time) / count, count)
        if count:
            seq.last_token_time = now

    def _fail(self, output: OutputProcessor, error: Exception) -> OutputProcessor:
        """End a sequence whose output cannot be made. Its request reports the error."""
        output.error, output.finish_reason = error, "abort"
        self._end(output)
        return output

    def _end(self, output: OutputProcessor) -> None:
        self.scheduler.finish(output.seq)
        del self._outputs[output.seq.seq_id]
