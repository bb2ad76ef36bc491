"""Who runs next, and how many tokens of each. Touches no tensor."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Mapping

import numpy as np

from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.pages import Pages
from mmjax.engine.sequence import Sequence
from mmjax.processors.base import Item


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one step can hold. block: query tokens per block of a prefill; units: of each encoder per dispatch;
    encoders: the name of each modality's encoder."""

    seqs: int
    tokens: int
    block: int
    steps: int
    units: Mapping[str, int]
    encoders: Mapping[str, str]
    cross_keys: int
    table: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Tokens [start, start + count) of a sequence; `last` when they complete what is known of it."""

    seq: Sequence
    start: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Encode:
    """One item for the named encoder, into slab rows i32[n] or into pages for cross attention. No name: its rows are
    ready."""

    name: str
    item: Item
    rows: np.ndarray
    pages: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dispatch: chunks of prompts (and the media they need first), or decode steps.

    decode: sequences, each with how many steps it takes. between: it is one step, and more chunks come next.
    """

    encode: tuple[Encode, ...] = ()
    prefill: tuple[Slice, ...] = ()
    decode: tuple[tuple[Sequence, int], ...] = ()
    between: bool = False
    started: tuple[Sequence, ...] = ()


class NeedsResults(Exception):
    """Nothing can be planned until what is in flight has come back."""


class Scheduler:
    """First come, first served; prompts in chunks; decoding continues between chunks; the youngest is preempted."""

    def __init__(self, limits: Limits, pages: Pages, slab: EncoderCache, *, prefix_caching: bool) -> None:
        self.limits = limits
        self.pages = pages
        self.slab = slab
        self.prefix_caching = prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.rows = list(range(limits.seqs - 1, -1, -1))
        self.tables = np.zeros((limits.seqs, limits.table), np.int32)
        self.preemptions = 0
        self._prefilled_last = False

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self.waiting and not self.running

    def plan(self, *, in_flight: bool) -> Plan | None:
        """The next dispatch, or None when there is nothing to do.

        Raises NeedsResults when only results that are still in flight can tell.
        """
        taking_turns = self._prefilled_last and bool(self._ready())
        plan = None if taking_turns else self._plan_prefill()
        if plan is None:
            unfinished = bool(self.waiting and self.rows) or any(s.prefilling for s in self.running)
            self._prefilled_last = False
            between = taking_turns and unfinished
            plan = self._plan_decode(in_flight, between=between)
        if plan is None and taking_turns:
            plan = self._plan_prefill()
        if plan is None and in_flight and not self.idle:
            raise NeedsResults
        self._prefilled_last = plan is not None and bool(plan.prefill)
        return plan

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence and give back what it holds."""
        seq.finished = True
        if seq.row is not None:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def register(self, seq: Sequence, computed: int) -> None:
        """Make the full pages within the first `computed` tokens findable."""
        if not self.prefix_caching:
            return
        keys = seq.page_keys(self.pages.size, computed)
        for i in range(seq.registered, len(keys)):
            self.pages.register(seq.pages[i], keys[i])
        seq.registered = max(seq.registered, len(keys))

    def _ready(self) -> list[Sequence]:
        return [s for s in self.running if not s.prefilling and s.sampled < s.max_tokens]

    def _plan_decode(self, in_flight: bool, *, between: bool) -> Plan | None:
        ready = self._ready()
        steps = 1 if between else self.limits.steps
        if any(s.constraints.dynamic for s in ready):  # what such a row may say depends on what it has said
            if in_flight:
                raise NeedsResults
            steps = 1
        chosen = []
        for seq in ready:
            if seq.row is None:  # preempted for an elder in this very loop
                continue
            n = min(steps, seq.max_tokens - seq.sampled)
            if self._grow(seq, seq.planned + n) or (n > 1 and self._grow(seq, seq.planned + 1)):
                n = min(n, len(seq.pages) * self.pages.size - seq.planned)
            elif in_flight:
                raise NeedsResults
            else:
                n = self._preempt_for(seq)
            if n:
                chosen.append((seq, n))
        chosen = [(seq, n) for seq, n in chosen if seq.row is not None]
        for seq, n in chosen:
            seq.planned += n
        return Plan(decode=tuple(chosen), between=between) if chosen else None

    def _grow(self, seq: Sequence, tokens: int) -> bool:
        """Pages for so many tokens of the sequence, if there are any."""
        more = self.pages.need(tokens) - len(seq.pages)
        if more > self.pages.free:
            return False
        if more > 0:
            pages = self.pages.take(more)
            self.tables[seq.row, len(seq.pages) : len(seq.pages) + more] = pages
            seq.pages.extend(pages)
        return True

    def _preempt_for(self, seq: Sequence) -> int:
        """Preempt the youngest until `seq` can take one step: 1, or 0 when it was itself the youngest."""
        while not self._grow(seq, seq.planned + 1):
            victim = self.running[-1]
            self.preemptions += 1
            self.running.pop()
            self._give_back(victim)
            victim.reset()
            self.waiting.appendleft(victim)
            if victim is seq:
                return 0
        return 1

    def _give_back(self, seq: Sequence) -> None:
        assert seq.row is not None
        self.pages.release(seq.pages)
        self.pages.release(seq.cross_pages)
        for span in seq.prompt.spans:
            self.slab.release(span.key, seq.number)
        self.tables[seq.row] = 0
        self.rows.append(seq.row)
        seq.row = None

    def _plan_prefill(self) -> Plan | None:
        left = self.limits.tokens
        slices: list[Slice] = []
        encode: list[Encode] = []
        started: list[Sequence] = []
        for seq in [s for s in self.running if s.prefilling] + list(self.waiting):
            if left < self.limits.block or len(slices) == self.limits.seqs:
                break
            fresh = seq.row is None
            if fresh and not self._start(seq, encode):
                break
            count = self._with_media(seq, min(seq.goal - seq.planned, left), encode)
            if fresh:
                started.append(seq)
            if count == 0:
                continue
            slices.append(Slice(seq, seq.planned, count, seq.planned + count == seq.goal))
            seq.planned += count
            left -= -(-count // self.limits.block) * self.limits.block
            self.register(seq, seq.planned)  # the device runs in order: whoever finds these pages reads them later
        for piece in slices:  # only now: within one plan, rows that are about to be read must not be given away
            self._let_go(piece.seq)
        if not slices and not encode:
            return None
        return Plan(encode=tuple(encode), prefill=tuple(slices), started=tuple(started))

    def _start(self, seq: Sequence, encode: list[Encode]) -> bool:
        """Give a waiting sequence a row and the pages of all it has, if there are enough."""
        if not self.rows:
            return False
        found: list[int] = []
        if self.prefix_caching and not seq.whole:
            found = self.pages.match(seq.page_keys(self.pages.size, seq.known - 1))
        cross_keys = [self._cross_key(key, i) for key, _ in seq.prompt.audio for i in range(self._cross_need)]
        cross = self.pages.match(cross_keys)
        cross = cross if len(cross) == len(cross_keys) else []
        missing = self.pages.need(seq.known) - len(found) + (len(cross_keys) - len(cross))
        if missing > self.pages.free - self.pages.unreferenced(found) - self.pages.unreferenced(cross):
            return False
        if cross_keys and not cross and not self._encodable([item for _, item in seq.prompt.audio], encode):
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.row = self.rows.pop()
        self.pages.share(found)
        self.pages.share(cross)
        seq.pages = list(found)
        self.tables[seq.row, : len(found)] = found
        seq.planned = seq.registered = len(found) * self.pages.size
        if seq.cached is None:
            seq.cached = seq.planned
        seq.cross_pages = list(cross) or self._encode_cross(seq, cross_keys, encode)
        grown = self._grow(seq, seq.known)
        assert grown, "pages were counted above"
        return True

    @property
    def _cross_need(self) -> int:
        return self.pages.need(self.limits.cross_keys)

    def _cross_key(self, key: str, page: int) -> bytes:
        return hashlib.blake2b(f"cross {page} {key}".encode(), digest_size=16).digest()

    def _encode_cross(self, seq: Sequence, keys: list[bytes], encode: list[Encode]) -> list[int]:
        pages = self.pages.take(len(keys))
        for page, key in zip(pages, keys, strict=True):
            self.pages.register(page, key)
        for i, (_, item) in enumerate(seq.prompt.audio):
            mine = tuple(pages[i * self._cross_need : (i + 1) * self._cross_need])
            encode.append(Encode(self.limits.encoders[item.kind], item, np.empty(0, np.int32), mine))
        return pages

    def _let_go(self, seq: Sequence) -> None:
        """Release the media whose spans are behind the sequence."""
        behind = {span.key for span in seq.prompt.spans if span.start + span.length <= seq.planned}
        ahead = {span.key for span in seq.prompt.spans if span.start + span.length > seq.planned}
        for key in behind - ahead:
            self.slab.release(key, seq.number)

    def _encodable(self, items: list[Item], encode: list[Encode]) -> bool:
        """Whether items of one encoder still fit the dispatch; an encoder's first item always does."""
        name = self._encoder(items[0])
        if not name:
            return True
        taken = sum(e.item.units for e in encode if e.name == name)
        return not taken or taken + sum(item.units for item in items) <= self.limits.units[name]

    def _encoder(self, item: Item) -> str:
        """The name of an item's encoder; none for one whose rows are ready."""
        return "" if item.ready is not None else self.limits.encoders[item.kind]

    def _with_media(self, seq: Sequence, count: int, encode: list[Encode]) -> int:
        """How many of the next `count` tokens can run: up to the first medium that cannot be encoded now."""
        start, end = seq.planned, seq.planned + count
        for span in seq.prompt.spans:
            if span.start < end and span.start + span.length > start:
                if self.slab.get(span.key) is None:
                    if not self._encodable([span.item], encode) or not self.slab.fits(span.item.rows):
                        return max(0, span.start - start)
                    rows = self.slab.put(span.key, span.item.rows, seq.number)
                    encode.append(Encode(self._encoder(span.item), span.item, rows))
                else:
                    self.slab.use(span.key, seq.number)
        return count
