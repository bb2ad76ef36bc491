"""Who runs next, and how many tokens of each. Touches no tensor."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Mapping

import numpy as np

from mmjax.engine.block_pool import BlockPool
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.sequence import Sequence
from mmjax.processors.base import MediaItem


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What one step can hold. block: query tokens per block of a prefill; units: of each encoder per dispatch;
    encoders: the name of each modality's encoder."""

    max_num_seqs: int
    max_num_batched_tokens: int
    q_block_size: int
    num_decode_steps: int
    max_encoder_inputs: Mapping[str, int]
    encoder_of: Mapping[str, str]
    cross_len: int
    max_blocks_per_seq: int


@dataclasses.dataclass(frozen=True)
class ScheduledChunk:
    """Tokens [start, start + count) of a sequence; `last` when they complete what is known of it."""

    seq: Sequence
    start: int
    num_tokens: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class ScheduledEncode:
    """One item for the named encoder, into slab rows i32[n] or into pages for cross attention. No name: its rows are
    ready."""

    encoder: str
    item: MediaItem
    rows: np.ndarray
    block_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """One dispatch: chunks of prompts (and the media they need first), or decode steps.

    decode: sequences, each with how many steps it takes. between: it is one step, and more chunks come next.
    """

    encode: tuple[ScheduledEncode, ...] = ()
    prefill: tuple[ScheduledChunk, ...] = ()
    decode: tuple[tuple[Sequence, int], ...] = ()
    interleaved_decode: bool = False
    started: tuple[Sequence, ...] = ()


class NeedsResults(Exception):
    """Nothing can be planned until what is in flight has come back."""


class Scheduler:
    """First come, first served; prompts in chunks; decoding continues between chunks; the youngest is preempted."""

    def __init__(
        self, config: SchedulerConfig, block_pool: BlockPool, encoder_cache: EncoderCache, *, prefix_caching: bool
    ) -> None:
        self.config = config
        self.block_pool = block_pool
        self.encoder_cache = encoder_cache
        self.prefix_caching = prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.block_tables = np.zeros((config.max_num_seqs, config.max_blocks_per_seq), np.int32)
        self.preemptions = 0
        self._prefilled_last = False

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self.waiting and not self.running

    def schedule(self, *, in_flight: bool) -> SchedulerOutput | None:
        """The next dispatch, or None when there is nothing to do.

        Raises NeedsResults when only results that are still in flight can tell.
        """
        taking_turns = self._prefilled_last and bool(self._decodable())
        output = None if taking_turns else self._schedule_prefill()
        if output is None:
            unfinished = bool(self.waiting and self.free_rows) or any(s.is_prefilling for s in self.running)
            self._prefilled_last = False
            between = taking_turns and unfinished
            output = self._schedule_decode(in_flight, interleaved=between)
        if output is None and taking_turns:
            output = self._schedule_prefill()
        if output is None and in_flight and not self.idle:
            raise NeedsResults
        self._prefilled_last = output is not None and bool(output.prefill)
        return output

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence and give back what it holds."""
        seq.finished = True
        if seq.row is not None:
            self.running.remove(seq)
            self._free(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def cache_blocks(self, seq: Sequence, computed: int) -> None:
        """Make the full pages within the first `computed` tokens findable."""
        if not self.prefix_caching:
            return
        hashes = seq.block_hashes(self.block_pool.block_size, computed)
        for i in range(seq.num_hashed_blocks, len(hashes)):
            self.block_pool.cache_block(seq.block_ids[i], hashes[i])
        seq.num_hashed_blocks = max(seq.num_hashed_blocks, len(hashes))

    def _decodable(self) -> list[Sequence]:
        return [s for s in self.running if not s.is_prefilling and s.num_sampled < s.max_tokens]

    def _schedule_decode(self, in_flight: bool, *, interleaved: bool) -> SchedulerOutput | None:
        ready = self._decodable()
        steps = 1 if interleaved else self.config.num_decode_steps
        if any(s.logits_processor.dynamic for s in ready):  # what such a row may say depends on what it has said
            if in_flight:
                raise NeedsResults
            steps = 1
        chosen = []
        for seq in ready:
            if seq.row is None:  # preempted for an elder in this very loop
                continue
            n = min(steps, seq.max_tokens - seq.num_sampled)
            if self._allocate(seq, seq.num_scheduled + n) or (n > 1 and self._allocate(seq, seq.num_scheduled + 1)):
                n = min(n, len(seq.block_ids) * self.block_pool.block_size - seq.num_scheduled)
            elif in_flight:
                raise NeedsResults
            else:
                n = self._preempt_for(seq)
            if n:
                chosen.append((seq, n))
        chosen = [(seq, n) for seq, n in chosen if seq.row is not None]
        for seq, n in chosen:
            seq.num_scheduled += n
        return SchedulerOutput(decode=tuple(chosen), interleaved_decode=interleaved) if chosen else None

    def _allocate(self, seq: Sequence, tokens: int) -> bool:
        """Pages for so many tokens of the sequence, if there are any."""
        more = self.block_pool.blocks_for(tokens) - len(seq.block_ids)
        if more > self.block_pool.num_free:
            return False
        if more > 0:
            block_ids = self.block_pool.allocate(more)
            self.block_tables[seq.row, len(seq.block_ids) : len(seq.block_ids) + more] = block_ids
            seq.block_ids.extend(block_ids)
        return True

    def _preempt_for(self, seq: Sequence) -> int:
        """Preempt the youngest until `seq` can take one step: 1, or 0 when it was itself the youngest."""
        while not self._allocate(seq, seq.num_scheduled + 1):
            victim = self.running[-1]
            self.preemptions += 1
            self.running.pop()
            self._free(victim)
            victim.reset()
            self.waiting.appendleft(victim)
            if victim is seq:
                return 0
        return 1

    def _free(self, seq: Sequence) -> None:
        assert seq.row is not None
        self.block_pool.free(seq.block_ids)
        self.block_pool.free(seq.cross_block_ids)
        for span in seq.prompt.spans:
            self.encoder_cache.release(span.item_hash, seq.seq_id)
        self.block_tables[seq.row] = 0
        self.free_rows.append(seq.row)
        seq.row = None

    def _schedule_prefill(self) -> SchedulerOutput | None:
        left = self.config.max_num_batched_tokens
        chunks: list[ScheduledChunk] = []
        encode: list[ScheduledEncode] = []
        started: list[Sequence] = []
        for seq in [s for s in self.running if s.is_prefilling] + list(self.waiting):
            if left < self.config.q_block_size or len(chunks) == self.config.max_num_seqs:
                break
            fresh = seq.row is None
            if fresh and not self._start(seq, encode):
                break
            count = self._with_media(seq, min(seq.prefill_target - seq.num_scheduled, left), encode)
            if fresh:
                started.append(seq)
            if count == 0:
                continue
            chunks.append(
                ScheduledChunk(seq, seq.num_scheduled, count, seq.num_scheduled + count == seq.prefill_target)
            )
            seq.num_scheduled += count
            left -= -(-count // self.config.q_block_size) * self.config.q_block_size
            self.cache_blocks(
                seq, seq.num_scheduled
            )  # the device runs in order: whoever finds these pages reads them later
        for chunk in chunks:  # only now: within one plan, rows that are about to be read must not be given away
            self._release_media(chunk.seq)
        if not chunks and not encode:
            return None
        return SchedulerOutput(encode=tuple(encode), prefill=tuple(chunks), started=tuple(started))

    def _start(self, seq: Sequence, encode: list[ScheduledEncode]) -> bool:
        """Give a waiting sequence a row and the pages of all it has, if there are enough."""
        if not self.free_rows:
            return False
        found: list[int] = []
        if self.prefix_caching and not seq.needs_all_tokens:
            found = self.block_pool.find_cached(seq.block_hashes(self.block_pool.block_size, seq.num_tokens - 1))
        cross_keys = [
            self._cross_hash(key, i) for key, _ in seq.prompt.encoder_items for i in range(self._cross_blocks)
        ]
        cross = self.block_pool.find_cached(cross_keys)
        cross = cross if len(cross) == len(cross_keys) else []
        missing = self.block_pool.blocks_for(seq.num_tokens) - len(found) + (len(cross_keys) - len(cross))
        if missing > self.block_pool.num_free - self.block_pool.num_unreferenced(
            found
        ) - self.block_pool.num_unreferenced(cross):
            return False
        if cross_keys and not cross and not self._encodable([item for _, item in seq.prompt.encoder_items], encode):
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.row = self.free_rows.pop()
        self.block_pool.add_reference(found)
        self.block_pool.add_reference(cross)
        seq.block_ids = list(found)
        self.block_tables[seq.row, : len(found)] = found
        seq.num_scheduled = seq.num_hashed_blocks = len(found) * self.block_pool.block_size
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_scheduled
        seq.cross_block_ids = list(cross) or self._encode_cross(seq, cross_keys, encode)
        grown = self._allocate(seq, seq.num_tokens)
        assert grown, "pages were counted above"
        return True

    @property
    def _cross_blocks(self) -> int:
        return self.block_pool.blocks_for(self.config.cross_len)

    def _cross_hash(self, key: str, index: int) -> bytes:
        return hashlib.blake2b(f"cross {index} {key}".encode(), digest_size=16).digest()

    def _encode_cross(self, seq: Sequence, hashes: list[bytes], encode: list[ScheduledEncode]) -> list[int]:
        block_ids = self.block_pool.allocate(len(hashes))
        for index, key in zip(block_ids, hashes, strict=True):
            self.block_pool.cache_block(index, key)
        for i, (_, item) in enumerate(seq.prompt.encoder_items):
            mine = tuple(block_ids[i * self._cross_blocks : (i + 1) * self._cross_blocks])
            encode.append(ScheduledEncode(self.config.encoder_of[item.modality], item, np.empty(0, np.int32), mine))
        return block_ids

    def _release_media(self, seq: Sequence) -> None:
        """Release the media whose spans are behind the sequence."""
        behind = {span.item_hash for span in seq.prompt.spans if span.start + span.length <= seq.num_scheduled}
        ahead = {span.item_hash for span in seq.prompt.spans if span.start + span.length > seq.num_scheduled}
        for key in behind - ahead:
            self.encoder_cache.release(key, seq.seq_id)

    def _encodable(self, items: list[MediaItem], encode: list[ScheduledEncode]) -> bool:
        """Whether items of one encoder still fit the dispatch; an encoder's first item always does."""
        name = self._encoder(items[0])
        if not name:
            return True
        taken = sum(e.item.num_inputs for e in encode if e.encoder == name)
        return not taken or taken + sum(item.num_inputs for item in items) <= self.config.max_encoder_inputs[name]

    def _encoder(self, item: MediaItem) -> str:
        """The name of an item's encoder; none for one whose rows are ready."""
        return "" if item.embeds is not None else self.config.encoder_of[item.modality]

    def _with_media(self, seq: Sequence, count: int, encode: list[ScheduledEncode]) -> int:
        """How many of the next `count` tokens can run: up to the first medium that cannot be encoded now."""
        start, end = seq.num_scheduled, seq.num_scheduled + count
        for span in seq.prompt.spans:
            if span.start < end and span.start + span.length > start:
                if self.encoder_cache.get(span.item_hash) is None:
                    if not self._encodable([span.item], encode) or not self.encoder_cache.fits(span.item.num_embeds):
                        return max(0, span.start - start)
                    rows = self.encoder_cache.allocate(span.item_hash, span.item.num_embeds, seq.seq_id)
                    encode.append(ScheduledEncode(self._encoder(span.item), span.item, rows))
                else:
                    self.encoder_cache.use(span.item_hash, seq.seq_id)
        return count
