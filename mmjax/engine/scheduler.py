"""Decides which sequences run in the next dispatch, and how many tokens of each. Uses no device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Mapping

import numpy as np

from mmjax.engine.block_pool import BlockPool
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.sequence import EngineSequence
from mmjax.processors.base import MediaItem


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The limits of one dispatch.

    q_block_size: a prefill rounds each chunk up to a multiple of it. max_encoder_inputs: by encoder name. encoder_of:
    modality -> encoder name. cross_len: keys per item that cross attention reads, 0 for decoder-only models.
    """

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
    """Tokens [start, start + num_tokens) of a sequence. is_last: the sequence needs no more prefill after these."""

    seq: EngineSequence
    start: int
    num_tokens: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class ScheduledEncode:
    """One item for the named encoder, whose output goes to rows i32[n] of the mm_embeds buffer, or into blocks for
    cross attention. The name is empty for an item given as embeddings."""

    encoder: str
    item: MediaItem
    rows: np.ndarray
    block_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """One dispatch: chunks of prompts (and the media they need), or decode steps.

    decode: (sequence, steps it takes). interleaved_decode: it is a single decode step, and more chunks of prompts
    follow. started: sequences that have just been given a row.
    """

    encode: tuple[ScheduledEncode, ...] = ()
    prefill: tuple[ScheduledChunk, ...] = ()
    decode: tuple[tuple[EngineSequence, int], ...] = ()
    interleaved_decode: bool = False
    started: tuple[EngineSequence, ...] = ()


class NeedsResults(Exception):
    """Nothing can be scheduled before the results of a dispatch in flight have been read."""


class Scheduler:
    """First come, first served. Long prompts run in chunks, with a decode step between two chunks. If blocks run out,
    the youngest sequence is preempted."""

    def __init__(
        self, config: SchedulerConfig, block_pool: BlockPool, encoder_cache: EncoderCache, *, prefix_caching: bool
    ) -> None:
        self.config = config
        self.block_pool = block_pool
        self.encoder_cache = encoder_cache
        self.prefix_caching = prefix_caching
        self.waiting: deque[EngineSequence] = deque()
        self.running: list[EngineSequence] = []
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.block_tables = np.zeros((config.max_num_seqs, config.max_blocks_per_seq), np.int32)
        self.preemptions = 0
        self.prefix_cache_queries = self.prefix_cache_hits = 0  # tokens
        self._prefilled_last = False

    def add(self, seq: EngineSequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self.waiting and not self.running

    def schedule(self, *, in_flight: bool) -> SchedulerOutput | None:
        """The next dispatch, or None if there is nothing to do.

        Raises NeedsResults if that depends on results still in flight.
        """
        decode_turn = self._prefilled_last and bool(self._decodable())
        output = None if decode_turn else self._schedule_prefill()
        if output is None:
            more_prefill = bool(self.waiting and self.free_rows) or any(s.is_prefilling for s in self.running)
            self._prefilled_last = False
            output = self._schedule_decode(in_flight, interleaved=decode_turn and more_prefill)
        if output is None and decode_turn:
            output = self._schedule_prefill()
        if output is None and in_flight and not self.idle:
            raise NeedsResults
        self._prefilled_last = output is not None and bool(output.prefill)
        return output

    def finish(self, seq: EngineSequence) -> None:
        """Remove a sequence, and free its row and blocks."""
        seq.finished = True
        if seq.row is not None:
            self.running.remove(seq)
            self._free(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def cache_blocks(self, seq: EngineSequence, num_computed: int) -> None:
        """Put the full blocks within the first `num_computed` tokens into the prefix cache."""
        if not self.prefix_caching:
            return
        hashes = seq.block_hashes(self.block_pool.block_size, num_computed)
        for i in range(seq.num_hashed_blocks, len(hashes)):
            self.block_pool.cache_block(seq.block_ids[i], hashes[i])
        seq.num_hashed_blocks = max(seq.num_hashed_blocks, len(hashes))

    def _decodable(self) -> list[EngineSequence]:
        return [s for s in self.running if not (s.is_prefilling or s.awaits_bias) and s.num_sampled < s.max_tokens]

    def _schedule_decode(self, in_flight: bool, *, interleaved: bool) -> SchedulerOutput | None:
        ready = self._decodable()
        steps = 1 if interleaved else self.config.num_decode_steps
        if any(s.logits_processor.dynamic for s in ready):  # the host must know a token before it biases the next
            if in_flight:
                raise NeedsResults
            steps = 1
        scheduled = []
        for seq in ready:
            if seq.row is None:  # preempted by this loop
                continue
            n = min(steps, seq.max_tokens - seq.num_sampled)
            if self._allocate(seq, seq.num_scheduled + n) or (n > 1 and self._allocate(seq, seq.num_scheduled + 1)):
                n = min(n, len(seq.block_ids) * self.block_pool.block_size - seq.num_scheduled)
            elif in_flight:
                raise NeedsResults
            else:
                n = self._preempt_for(seq)
            if n:
                scheduled.append((seq, n))
        scheduled = [(seq, n) for seq, n in scheduled if seq.row is not None]
        for seq, n in scheduled:
            seq.num_scheduled += n
        return SchedulerOutput(decode=tuple(scheduled), interleaved_decode=interleaved) if scheduled else None

    def _allocate(self, seq: EngineSequence, num_tokens: int) -> bool:
        """Give the sequence enough blocks for this many tokens. Returns False if too few are free."""
        more = self.block_pool.blocks_for(num_tokens) - len(seq.block_ids)
        if more > self.block_pool.num_free:
            return False
        if more > 0:
            block_ids = self.block_pool.allocate(more)
            self.block_tables[seq.row, len(seq.block_ids) : len(seq.block_ids) + more] = block_ids
            seq.block_ids.extend(block_ids)
        return True

    def _preempt_for(self, seq: EngineSequence) -> int:
        """Preempt the youngest sequences until `seq` can run one step. Returns its steps: 0 if it was itself
        preempted, else 1."""
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

    def _free(self, seq: EngineSequence) -> None:
        assert seq.row is not None
        self.block_pool.free(seq.block_ids)
        self.block_pool.free(seq.cross_block_ids)
        for span in seq.prompt.spans:
            self.encoder_cache.release(span.item_hash, seq.seq_id)
        self.block_tables[seq.row] = 0
        self.free_rows.append(seq.row)
        seq.row = None

    def _schedule_prefill(self) -> SchedulerOutput | None:
        budget, q_block_size = self.config.max_num_batched_tokens, self.config.q_block_size
        chunks: list[ScheduledChunk] = []
        encode: list[ScheduledEncode] = []
        started: list[EngineSequence] = []
        for seq in [s for s in self.running if s.is_prefilling] + list(self.waiting):
            if budget < q_block_size or len(chunks) == self.config.max_num_seqs:
                break
            is_new = seq.row is None
            if is_new and not self._start(seq, encode):
                break
            count = self._schedule_media(seq, min(seq.prefill_target - seq.num_scheduled, budget), encode)
            if is_new:
                started.append(seq)
            if count == 0:
                continue
            is_last = seq.num_scheduled + count == seq.prefill_target
            chunks.append(ScheduledChunk(seq, seq.num_scheduled, count, is_last))
            seq.num_scheduled += count
            budget -= -(-count // q_block_size) * q_block_size
            # Not computed yet, but the device runs dispatches in order: whoever finds these blocks reads them later.
            self.cache_blocks(seq, seq.num_scheduled)
        for chunk in chunks:  # after the loop: this dispatch reads these rows, so no item of it may overwrite them
            self._release_media(chunk.seq)
        if not chunks and not encode:
            return None
        return SchedulerOutput(encode=tuple(encode), prefill=tuple(chunks), started=tuple(started))

    def _start(self, seq: EngineSequence, encode: list[ScheduledEncode]) -> bool:
        """Give a waiting sequence a row and blocks for all its tokens. Returns False if too few are free."""
        if not self.free_rows:
            return False
        pool = self.block_pool
        cached: list[int] = []
        if self.prefix_caching and not seq.needs_all_tokens:
            cached = pool.find_cached(seq.block_hashes(pool.block_size, seq.num_tokens - 1))
        cross_hashes = [
            self._cross_hash(item_hash, i)
            for item_hash, _ in seq.prompt.encoder_items
            for i in range(self._cross_blocks_per_item)
        ]
        cross = pool.find_cached(cross_hashes)
        cross = cross if len(cross) == len(cross_hashes) else []
        num_new = pool.blocks_for(seq.num_tokens) - len(cached) + len(cross_hashes) - len(cross)
        if num_new > pool.num_free - pool.num_unreferenced(cached) - pool.num_unreferenced(cross):
            return False
        if cross_hashes and not cross and not self._encodable([item for _, item in seq.prompt.encoder_items], encode):
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.row = self.free_rows.pop()
        pool.add_reference(cached)
        pool.add_reference(cross)
        seq.block_ids = list(cached)
        self.block_tables[seq.row, : len(cached)] = cached
        seq.num_scheduled = seq.num_hashed_blocks = len(cached) * pool.block_size
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_scheduled
            if self.prefix_caching and not seq.needs_all_tokens:
                self.prefix_cache_queries += seq.num_tokens
                self.prefix_cache_hits += seq.num_cached_tokens
        seq.cross_block_ids = list(cross) or self._encode_cross(seq, cross_hashes, encode)
        allocated = self._allocate(seq, seq.num_tokens)
        assert allocated, "enough blocks were free"
        return True

    @property
    def _cross_blocks_per_item(self) -> int:
        return self.block_pool.blocks_for(self.config.cross_len)

    def _cross_hash(self, item_hash: str, index: int) -> bytes:
        """The hash of an item's block number `index` for cross attention."""
        return hashlib.blake2b(f"cross {index} {item_hash}".encode(), digest_size=16).digest()

    def _encode_cross(self, seq: EngineSequence, hashes: list[bytes], encode: list[ScheduledEncode]) -> list[int]:
        """Schedule the encoding of the sequence's items into new blocks."""
        block_ids, per_item = self.block_pool.allocate(len(hashes)), self._cross_blocks_per_item
        for block_id, block_hash in zip(block_ids, hashes, strict=True):
            self.block_pool.cache_block(block_id, block_hash)
        for i, (_, item) in enumerate(seq.prompt.encoder_items):
            item_block_ids = tuple(block_ids[i * per_item : (i + 1) * per_item])
            no_rows = np.empty(0, np.int32)
            encode.append(ScheduledEncode(self.config.encoder_of[item.modality], item, no_rows, item_block_ids))
        return block_ids

    def _release_media(self, seq: EngineSequence) -> None:
        """Release the items whose spans have all been scheduled."""
        done = {span.item_hash for span in seq.prompt.spans if span.start + span.length <= seq.num_scheduled}
        needed = {span.item_hash for span in seq.prompt.spans if span.start + span.length > seq.num_scheduled}
        for item_hash in done - needed:
            self.encoder_cache.release(item_hash, seq.seq_id)

    def _encodable(self, items: list[MediaItem], encode: list[ScheduledEncode]) -> bool:
        """Whether items of one encoder still fit into the dispatch; an encoder's first item always does."""
        name = self._encoder(items[0])
        if not name:
            return True
        scheduled = sum(e.item.num_inputs for e in encode if e.encoder == name)
        num_inputs = sum(item.num_inputs for item in items)
        return not scheduled or scheduled + num_inputs <= self.config.max_encoder_inputs[name]

    def _encoder(self, item: MediaItem) -> str:
        """The name of an item's encoder; empty for an item given as embeddings."""
        return "" if item.embeds is not None else self.config.encoder_of[item.modality]

    def _schedule_media(self, seq: EngineSequence, count: int, encode: list[ScheduledEncode]) -> int:
        """Schedule the encoding of the items that the next `count` tokens need. Returns how many of these tokens can
        run: those before the first item that cannot be encoded in this dispatch."""
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
