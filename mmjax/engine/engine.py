"""The loop: plan, pack, run, commit. While the device runs one dispatch, the host commits the one before."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mmjax.engine.answer import CompletionState, LogprobsChunk
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.pack import (
    BucketConfig,
    SamplingState,
    build_decode,
    build_embed_writes,
    build_encode,
    build_logit_biases,
    build_prefill,
)
from mmjax.engine.pages import BlockPool
from mmjax.engine.pooled import PoolingState
from mmjax.engine.sample import token_counts_row
from mmjax.engine.scheduler import NeedsResults, ScheduledChunk, Scheduler, SchedulerConfig, SchedulerOutput
from mmjax.engine.sequence import Sequence
from mmjax.models.family import ModelSpec

MAX_IN_FLIGHT = (
    2  # dispatches in flight: one running, one queued behind it. A step between chunks of prompts is not counted.
)


@dataclasses.dataclass
class EngineStats:
    """What the engine did. Seconds: `call_s` in which the device thread was calling programs, `wait_s` in which the
    engine waited for results, `host_s` in which it planned, packed and committed in Python. idle_s: the part of host_s
    during which nothing was in flight.
    """

    dispatches: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    encoded_items: int = 0
    call_s: float = 0.0
    wait_s: float = 0.0
    host_s: float = 0.0
    idle_s: float = 0.0


@dataclasses.dataclass
class InFlightStep:
    """A dispatch whose results the host has not read. members: (sequence, column of its results, steps it takes).

    calls: what the device thread was asked to do since the ticket before, whose errors come up with the results.
    between: one decode step between chunks of prompts. It is done in a fraction of the time that packing the next
    chunk's media takes, and so does not keep the device busy meanwhile.
    """

    output: Future[Any]
    members: list[tuple[Sequence, int, int]]
    calls: list[Future[Any]] = dataclasses.field(default_factory=list)
    interleaved_decode: bool = False
    prompt_logprobs: Future[Any] | None = None
    prompt_chunks: list[tuple[Sequence, int, int, int]] = dataclasses.field(default_factory=list)


class Engine:
    """Runs sequences to their end. Not thread-safe: one thread adds, steps and aborts.

    Programs are handed to the device by a thread of their own, in order. Launching the kernels of a decode dispatch
    keeps the calling thread of a GPU busy for as long as the GPU runs them (92 % of the wall time at batch 1), and a
    CPU computes within the call: in both cases this thread commits the dispatch before meanwhile.
    """

    def __init__(
        self,
        runner: Any,
        buckets: BucketConfig,
        spec: ModelSpec,
        *,
        num_blocks: int,
        num_mm_rows: int,
        prefix_caching: bool,
    ) -> None:
        self.runner = runner
        self.buckets = buckets
        self.spec = spec
        limits = SchedulerConfig(
            max_num_seqs=buckets.seq_buckets[-1],
            max_num_batched_tokens=buckets.token_buckets[-1],
            q_block_size=buckets.q_block_size,
            num_decode_steps=buckets.num_decode_steps,
            max_encoder_inputs={name: sizes[-1] for name, sizes in buckets.encoder_buckets.items()},
            encoder_of={kind: name for name, encoder in spec.encoders.items() for kind in encoder.modalities},
            cross_len=spec.cross_len,
            max_blocks_per_seq=buckets.max_blocks_per_seq,
        )
        self.block_pool = BlockPool(num_blocks, buckets.block_size)
        self.encoder_cache = EncoderCache(num_mm_rows)
        self.scheduler = Scheduler(limits, self.block_pool, self.encoder_cache, prefix_caching=prefix_caching)
        self.sampling_state = SamplingState(buckets)
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._calls: list[Future[Any]] = []
        self.stats = EngineStats()
        self._states: dict[int, Any] = {}  # `Answer`s, or `Pooled` in an engine that pools
        self._in_flight: deque[InFlightStep] = deque()

    def add(self, state: CompletionState | PoolingState) -> None:
        """Queue an answer."""
        self._states[state.seq.seq_id] = state
        self.scheduler.add(state.seq)

    def abort(self, states: Seq[CompletionState | PoolingState]) -> None:
        """End answers now; their pages are free at once."""
        for state in states:
            if not state.seq.finished:
                state.finish("abort", None)
                self._end(state)

    @property
    def num_unfinished(self) -> int:
        """Answers that are queued or running."""
        return len(self._states)

    @property
    def has_work(self) -> bool:
        """Whether stepping would do anything."""
        return not self.scheduler.idle or bool(self._in_flight)

    def step(self) -> list[Any]:
        """Dispatch what can be, then read what has come back: the answers that changed."""
        begin, waited = time.perf_counter(), self.stats.wait_s
        unfed = not self._in_flight
        try:
            scheduled = self.scheduler.schedule(in_flight=bool(self._in_flight))
        except NeedsResults:
            scheduled = None
        if scheduled:
            self._dispatch(scheduled)
            if unfed:
                self.stats.idle_s += time.perf_counter() - begin
        changed = []
        if scheduled is None and self._in_flight:
            changed = self._collect(self._in_flight.popleft())
        while sum(not pending.interleaved_decode for pending in self._in_flight) >= MAX_IN_FLIGHT:
            changed += self._collect(self._in_flight.popleft())
        self.stats.host_s += time.perf_counter() - begin - (self.stats.wait_s - waited)
        return changed

    def _dispatch(self, scheduled: SchedulerOutput) -> None:
        for seq in scheduled.started:
            seq.scheduled_time = seq.scheduled_time or time.monotonic()
            self.sampling_state.set(seq, self.spec.cross_len)
            self._set_tables(seq)
        for name, encoder in self.spec.encoders.items():
            work = [e for e in scheduled.encode if e.encoder == name]
            if work:
                self._run(self.runner.encode, name, *build_encode(self.buckets, name, encoder, work))
                self.stats.encoded_items += len(work)
        ready = [e for e in scheduled.encode if e.item.embeds is not None]
        if ready:
            for rows, dest in build_embed_writes(self.buckets, ready):
                self._run(self.runner.write_embeds, rows, dest)
        if scheduled.prefill or scheduled.decode:
            pending = self._prefill(scheduled.prefill) if scheduled.prefill else self._decode(scheduled.decode)
            pending.interleaved_decode = scheduled.interleaved_decode
            pending.calls, self._calls = self._calls, []
            self._in_flight.append(pending)
        self.stats.dispatches += 1

    def _prefill(self, chunks: tuple[ScheduledChunk, ...]) -> InFlightStep:
        total, vector = build_prefill(
            self.buckets, chunks, self.sampling_state, self.scheduler.block_tables, self.encoder_cache
        )
        done = self._run(self.runner.prefill, total, vector)
        members = [(chunk.seq, s, 1) for s, chunk in enumerate(chunks) if chunk.is_last]
        self.stats.prefill_tokens += sum(chunk.num_tokens for chunk in chunks)
        if self.spec.pooling:
            return InFlightStep(done, members, prompt_chunks=self._all_token_chunks(chunks))
        pending = InFlightStep(self._run(lambda: done.result()[0]), members)
        targets, at = np.zeros(total, np.int32), 0
        for chunk in chunks:
            seq = chunk.seq
            count = min(chunk.start + chunk.num_tokens, seq.prompt_len - 1) - chunk.start
            if seq.params.prompt_logprobs is not None and count > 0:
                targets[at : at + count] = seq.token_ids[chunk.start + 1 : chunk.start + 1 + count]
                pending.prompt_chunks.append((seq, at, chunk.start + 1, count))
            at += -(-chunk.num_tokens // self.buckets.q_block_size) * self.buckets.q_block_size
        if pending.prompt_chunks:
            pending.prompt_logprobs = self._run(lambda: self.runner.prompt_logprobs(done.result()[1], targets))
        return pending

    def _all_token_chunks(self, chunks: tuple[ScheduledChunk, ...]) -> list[tuple[Sequence, int, int, int]]:
        """(sequence, where its tokens lie in the dispatch, first token, tokens) of those that want every token."""
        found, at = [], 0
        for chunk in chunks:
            if chunk.seq.needs_all_tokens:
                found.append((chunk.seq, at, chunk.start, chunk.num_tokens))
            at += -(-chunk.num_tokens // self.buckets.q_block_size) * self.buckets.q_block_size
        return found

    def _decode(self, chosen: tuple[tuple[Sequence, int], ...]) -> InFlightStep:
        changing = [seq for seq, _ in chosen if seq.logits_processor.dynamic]
        if changing:
            self._run(self.runner.set_logit_biases, *build_logit_biases(self.buckets, changing, self.spec.vocab_size))
        total, vector = build_decode(self.buckets, chosen, self.sampling_state, self.scheduler.block_tables)
        most = max(steps for _, steps in chosen)
        sampled = self._run(self.runner.decode, total, vector, most)
        self.stats.decode_steps += most
        return InFlightStep(sampled, [(seq, s, steps) for s, (seq, steps) in enumerate(chosen)])

    def _run(self, program: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have the device thread call a program, after all it was asked before."""

        def call() -> Any:
            begin = time.perf_counter()
            try:
                return program(*args)
            finally:
                self.stats.call_s += time.perf_counter() - begin

        self._calls.append(self._device.submit(call))
        return self._calls[-1]

    def _set_tables(self, seq: Sequence) -> None:
        """Bring a row's sampling tables up to what its sequence needs."""
        assert seq.row is not None
        seen = None
        if seq.has_penalties:
            seen = token_counts_row(seq.prompt.token_ids.tolist(), seq.output_ids.tolist(), self.spec.vocab_size)
        bias = seq.logits_processor.bias_row(seq.output_ids.tolist())
        if seq.has_penalties or bias is not None:
            self._run(self.runner.set_sampling_row, seq.row, seen, bias)

    def _collect(self, pending: InFlightStep) -> list[Any]:
        """Read one dispatch's results and let the answers take them."""
        begin = time.perf_counter()
        for call in pending.calls:
            call.result()
        sampled = pending.output.result()
        if self.spec.pooling:
            return self._collect_hidden(pending, *sampled)
        tokens = np.asarray(sampled.token_ids)
        self.stats.wait_s += time.perf_counter() - begin
        tokens = tokens.reshape(-1, tokens.shape[-1])
        scores: Any = pending.prompt_logprobs.result() if pending.prompt_logprobs else None
        for seq, at, first, count in pending.prompt_chunks:
            if not seq.finished:
                logprob, rank, ids, top = (np.asarray(x)[at : at + count] for x in scores)
                self._states[seq.seq_id].append_prompt_logprobs(
                    first, LogprobsChunk(seq.token_ids[first : first + count], logprob, rank, ids, top)
                )
        changed = []
        for seq, column, steps in pending.members:
            if seq.finished:
                continue
            state = self._states[seq.seq_id]
            mine = tokens[:steps, column]
            mine = mine[mine >= 0]
            before = seq.num_tokens
            state.append(mine, self._logprobs_chunk(sampled, column, mine) if seq.params.logprobs is not None else None)
            self.stats.output_tokens += seq.num_tokens - before
            self.scheduler.cache_blocks(seq, seq.num_tokens - 1)
            if state.finish_reason is not None:
                self._end(state)
            changed.append(state)
        return changed

    def _collect_hidden(self, pending: InFlightStep, ends: Any, hidden: Any) -> list[Any]:
        """Hand out the hidden states f32[S, D] of last tokens and [T, D] of all."""
        begin = time.perf_counter()
        ends = np.asarray(ends)
        rows = np.asarray(hidden).astype(np.float32) if pending.prompt_chunks else ends
        self.stats.wait_s += time.perf_counter() - begin
        for seq, at, _, count in pending.prompt_chunks:
            if not seq.finished:
                self._states[seq.seq_id].append(rows[at : at + count])
        changed = []
        for seq, column, _ in pending.members:
            if seq.finished:
                continue
            pooled = self._states[seq.seq_id]
            if not seq.needs_all_tokens:
                pooled.append(ends[column : column + 1])
            pooled.finish("stop", None)
            self._end(pooled)
            changed.append(pooled)
        return changed

    def _logprobs_chunk(self, sampled: Any, column: int, tokens: np.ndarray) -> LogprobsChunk:
        n, s = len(tokens), sampled

        def column_of(x: Any) -> np.ndarray:
            array = np.asarray(x)
            return array[column][None] if np.ndim(sampled.token_ids) == 1 else array[:n, column]

        return LogprobsChunk(tokens, *map(column_of, (s.logprobs, s.ranks, s.top_ids, s.top_logprobs)))

    def _end(self, state: CompletionState | PoolingState) -> None:
        self.scheduler.finish(state.seq)
        del self._states[state.seq.seq_id]
