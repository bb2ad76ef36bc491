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

from mmjax.engine.answer import Answer, Report
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.pack import RowTable, Sizes, pack_biases, pack_decode, pack_encode, pack_prefill, pack_ready
from mmjax.engine.pages import Pages
from mmjax.engine.pooled import Pooled
from mmjax.engine.sample import history_row
from mmjax.engine.scheduler import Limits, NeedsResults, Plan, Scheduler, Slice
from mmjax.engine.sequence import Sequence
from mmjax.models.family import Shape

DEPTH = 2  # dispatches in flight: one running, one queued behind it. A step between chunks of prompts is not counted.


@dataclasses.dataclass
class Stats:
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
class Ticket:
    """A dispatch whose results the host has not read. members: (sequence, column of its results, steps it takes).

    calls: what the device thread was asked to do since the ticket before, whose errors come up with the results.
    between: one decode step between chunks of prompts. It is done in a fraction of the time that packing the next
    chunk's media takes, and so does not keep the device busy meanwhile.
    """

    sampled: Future[Any]
    members: list[tuple[Sequence, int, int]]
    calls: list[Future[Any]] = dataclasses.field(default_factory=list)
    between: bool = False
    scores: Future[Any] | None = None
    scored: list[tuple[Sequence, int, int, int]] = dataclasses.field(default_factory=list)


class Engine:
    """Runs sequences to their end. Not thread-safe: one thread adds, steps and aborts.

    Programs are handed to the device by a thread of their own, in order. Launching the kernels of a decode dispatch
    keeps the calling thread of a GPU busy for as long as the GPU runs them (92 % of the wall time at batch 1), and a
    CPU computes within the call: in both cases this thread commits the dispatch before meanwhile.
    """

    def __init__(
        self, runner: Any, sizes: Sizes, shape: Shape, *, pages: int, slab_rows: int, prefix_caching: bool
    ) -> None:
        self.runner = runner
        self.sizes = sizes
        self.shape = shape
        limits = Limits(
            seqs=sizes.seqs[-1],
            tokens=sizes.tokens[-1],
            block=sizes.block,
            steps=sizes.steps,
            units={name: ladder[-1] for name, ladder in sizes.units.items()},
            encoders={kind: name for name, encoder in shape.encoders.items() for kind in encoder.kinds},
            cross_keys=shape.cross_keys,
            table=sizes.table,
        )
        self.pages = Pages(pages, sizes.page)
        self.slab = EncoderCache(slab_rows)
        self.scheduler = Scheduler(limits, self.pages, self.slab, prefix_caching=prefix_caching)
        self.rows = RowTable(sizes)
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._calls: list[Future[Any]] = []
        self.stats = Stats()
        self._answers: dict[int, Any] = {}  # `Answer`s, or `Pooled` in an engine that pools
        self._flying: deque[Ticket] = deque()

    def add(self, answer: Answer | Pooled) -> None:
        """Queue an answer."""
        self._answers[answer.seq.number] = answer
        self.scheduler.add(answer.seq)

    def abort(self, answers: Seq[Answer | Pooled]) -> None:
        """End answers now; their pages are free at once."""
        for answer in answers:
            if not answer.seq.finished:
                answer.finish("abort", None)
                self._end(answer)

    @property
    def load(self) -> int:
        """Answers that are queued or running."""
        return len(self._answers)

    @property
    def busy(self) -> bool:
        """Whether stepping would do anything."""
        return not self.scheduler.idle or bool(self._flying)

    def step(self) -> list[Any]:
        """Dispatch what can be, then read what has come back: the answers that changed."""
        begin, waited = time.perf_counter(), self.stats.wait_s
        unfed = not self._flying
        try:
            plan = self.scheduler.plan(in_flight=bool(self._flying))
        except NeedsResults:
            plan = None
        if plan:
            self._dispatch(plan)
            if unfed:
                self.stats.idle_s += time.perf_counter() - begin
        changed = []
        if plan is None and self._flying:
            changed = self._collect(self._flying.popleft())
        while sum(not ticket.between for ticket in self._flying) >= DEPTH:
            changed += self._collect(self._flying.popleft())
        self.stats.host_s += time.perf_counter() - begin - (self.stats.wait_s - waited)
        return changed

    def _dispatch(self, plan: Plan) -> None:
        for seq in plan.started:
            seq.scheduled_time = seq.scheduled_time or time.monotonic()
            self.rows.set(seq, self.shape.cross_keys)
            self._set_tables(seq)
        for name, encoder in self.shape.encoders.items():
            work = [e for e in plan.encode if e.name == name]
            if work:
                self._run(self.runner.encode, name, *pack_encode(self.sizes, name, encoder, work))
                self.stats.encoded_items += len(work)
        ready = [e for e in plan.encode if e.item.ready is not None]
        if ready:
            for rows, dest in pack_ready(self.sizes, ready):
                self._run(self.runner.put, rows, dest)
        if plan.prefill or plan.decode:
            ticket = self._prefill(plan.prefill) if plan.prefill else self._decode(plan.decode)
            ticket.between = plan.between
            ticket.calls, self._calls = self._calls, []
            self._flying.append(ticket)
        self.stats.dispatches += 1

    def _prefill(self, slices: tuple[Slice, ...]) -> Ticket:
        total, vector = pack_prefill(self.sizes, slices, self.rows, self.scheduler.tables, self.slab)
        done = self._run(self.runner.prefill, total, vector)
        members = [(piece.seq, s, 1) for s, piece in enumerate(slices) if piece.last]
        self.stats.prefill_tokens += sum(piece.count for piece in slices)
        if self.shape.pooling:
            return Ticket(done, members, scored=self._wholes(slices))
        ticket = Ticket(self._run(lambda: done.result()[0]), members)
        targets, at = np.zeros(total, np.int32), 0
        for piece in slices:
            seq = piece.seq
            count = min(piece.start + piece.count, seq.prompt_len - 1) - piece.start
            if seq.params.prompt_logprobs is not None and count > 0:
                targets[at : at + count] = seq.tokens[piece.start + 1 : piece.start + 1 + count]
                ticket.scored.append((seq, at, piece.start + 1, count))
            at += -(-piece.count // self.sizes.block) * self.sizes.block
        if ticket.scored:
            ticket.scores = self._run(lambda: self.runner.score(done.result()[1], targets))
        return ticket

    def _wholes(self, slices: tuple[Slice, ...]) -> list[tuple[Sequence, int, int, int]]:
        """(sequence, where its tokens lie in the dispatch, first token, tokens) of those that want every token."""
        found, at = [], 0
        for piece in slices:
            if piece.seq.whole:
                found.append((piece.seq, at, piece.start, piece.count))
            at += -(-piece.count // self.sizes.block) * self.sizes.block
        return found

    def _decode(self, chosen: tuple[tuple[Sequence, int], ...]) -> Ticket:
        changing = [seq for seq, _ in chosen if seq.constraints.dynamic]
        if changing:
            self._run(self.runner.set_biases, *pack_biases(self.sizes, changing, self.shape.vocab))
        total, vector = pack_decode(self.sizes, chosen, self.rows, self.scheduler.tables)
        most = max(steps for _, steps in chosen)
        sampled = self._run(self.runner.decode, total, vector, most)
        self.stats.decode_steps += most
        return Ticket(sampled, [(seq, s, steps) for s, (seq, steps) in enumerate(chosen)])

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
        if seq.penalised:
            seen = history_row(seq.prompt.tokens.tolist(), seq.outputs.tolist(), self.shape.vocab)
        bias = seq.constraints.row(seq.outputs.tolist())
        if seq.penalised or bias is not None:
            self._run(self.runner.set_row, seq.row, seen, bias)

    def _collect(self, ticket: Ticket) -> list[Any]:
        """Read one dispatch's results and let the answers take them."""
        begin = time.perf_counter()
        for call in ticket.calls:
            call.result()
        sampled = ticket.sampled.result()
        if self.shape.pooling:
            return self._collect_hidden(ticket, *sampled)
        tokens = np.asarray(sampled.token)
        self.stats.wait_s += time.perf_counter() - begin
        tokens = tokens.reshape(-1, tokens.shape[-1])
        scores: Any = ticket.scores.result() if ticket.scores else None
        for seq, at, first, count in ticket.scored:
            if not seq.finished:
                logprob, rank, ids, top = (np.asarray(x)[at : at + count] for x in scores)
                self._answers[seq.number].take_prompt(
                    first, Report(seq.tokens[first : first + count], logprob, rank, ids, top)
                )
        changed = []
        for seq, column, steps in ticket.members:
            if seq.finished:
                continue
            answer = self._answers[seq.number]
            mine = tokens[:steps, column]
            mine = mine[mine >= 0]
            before = seq.known
            answer.take(mine, self._report(sampled, column, mine) if seq.params.logprobs is not None else None)
            self.stats.output_tokens += seq.known - before
            self.scheduler.register(seq, seq.known - 1)
            if answer.finish_reason is not None:
                self._end(answer)
            changed.append(answer)
        return changed

    def _collect_hidden(self, ticket: Ticket, ends: Any, hidden: Any) -> list[Any]:
        """Hand out the hidden states f32[S, D] of last tokens and [T, D] of all."""
        begin = time.perf_counter()
        ends = np.asarray(ends)
        rows = np.asarray(hidden).astype(np.float32) if ticket.scored else ends
        self.stats.wait_s += time.perf_counter() - begin
        for seq, at, _, count in ticket.scored:
            if not seq.finished:
                self._answers[seq.number].take(rows[at : at + count])
        changed = []
        for seq, column, _ in ticket.members:
            if seq.finished:
                continue
            pooled = self._answers[seq.number]
            if not seq.whole:
                pooled.take(ends[column : column + 1])
            pooled.finish("stop", None)
            self._end(pooled)
            changed.append(pooled)
        return changed

    def _report(self, sampled: Any, column: int, tokens: np.ndarray) -> Report:
        n, s = len(tokens), sampled

        def column_of(x: Any) -> np.ndarray:
            array = np.asarray(x)
            return array[column][None] if np.ndim(sampled.token) == 1 else array[:n, column]

        return Report(tokens, *map(column_of, (s.logprob, s.rank, s.top_ids, s.top_logprobs)))

    def _end(self, answer: Answer | Pooled) -> None:
        self.scheduler.finish(answer.seq)
        del self._answers[answer.seq.number]
