"""The state of one sequence: its tokens, its blocks, and how much of it has been scheduled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmjax.engine.block_pool import block_hash
from mmjax.engine.logits import LogitsProcessor, NoBias, PendingRow
from mmjax.processors.base import MediaItem
from mmjax.types import SamplingParams

_seq_ids = itertools.count()


class MediaSpan(NamedTuple):
    """Tokens [start, start + length) take the embeddings of an item, starting with number embed_offset."""

    start: int
    length: int
    item_hash: str
    item: MediaItem
    embed_offset: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class EnginePrompt:
    """The prompt that all sequences of a request share.

    token_ids: i32[T]. rope_positions: i32[R, T]; token i >= T has position i + rope_delta on every axis. encoder_items:
    (hash, item) of the media that an encoder-decoder reads through cross attention. cache_salt: mixed into the hashes
    of blocks.
    """

    token_ids: np.ndarray
    rope_positions: np.ndarray
    rope_delta: int
    spans: tuple[MediaSpan, ...] = ()
    encoder_items: tuple[tuple[str, MediaItem], ...] = ()
    cache_salt: bytes = b""


class EngineSequence:
    """A prompt and the tokens sampled after it.

    num_scheduled: tokens whose keys are in the cache once everything dispatched so far has run. num_tokens: tokens that
    the host knows. The tokens between the two are in flight. needs_all_tokens: every token of the prompt must run, even
    those whose keys are in the prefix cache.
    """

    def __init__(
        self,
        index: int,
        prompt: EnginePrompt,
        params: SamplingParams,
        *,
        max_model_len: int,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        logits_processor: LogitsProcessor | None = None,
        needs_all_tokens: bool = False,
    ) -> None:
        self.seq_id = next(_seq_ids)
        self.index = index
        self.prompt = prompt
        self.params = params
        self.seed_words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
        self.stop_ids = tuple(stop_ids)
        self.logits_processor = logits_processor or NoBias()
        self.pending_bias: PendingRow | None = None  # the next row of the logits processor
        self.needs_all_tokens = needs_all_tokens
        self.prompt_len = len(prompt.token_ids)
        longest = max_model_len - self.prompt_len
        self.max_tokens = longest if params.max_tokens is None else min(params.max_tokens, longest)
        self.token_ids = np.empty(self.prompt_len + self.max_tokens, np.int32)
        self.token_ids[: self.prompt_len] = prompt.token_ids
        self.num_tokens = self.prompt_len
        self.num_scheduled = 0
        self.prefill_target = self.prompt_len  # tokens to prefill before decoding (again)
        self.row: int | None = None
        self.block_ids: list[int] = []
        self.cross_block_ids: list[int] = []
        self.hashes: list[bytes] = []
        self.num_hashed_blocks = 0
        self.num_cached_tokens: int | None = None  # tokens found in the prefix cache when it first started
        self.scheduled_time: float | None = None
        self.last_token_time: float | None = None  # when the host read its newest token
        self.finished = False
        self.has_bias = self.logits_processor.dynamic or self.logits_processor.bias_row(()) is not None

    @property
    def output_len(self) -> int:
        """Output tokens that the host knows."""
        return self.num_tokens - self.prompt_len

    @property
    def output_ids(self) -> np.ndarray:
        """i32[output_len]."""
        return self.token_ids[self.prompt_len : self.num_tokens]

    @property
    def num_sampled(self) -> int:
        """Output tokens that are sampled once everything dispatched so far has run."""
        return max(0, self.num_scheduled + 1 - self.prompt_len)

    @property
    def is_prefilling(self) -> bool:
        """Whether more tokens must be prefilled before the next one can be sampled."""
        return self.num_scheduled < self.prefill_target

    @property
    def awaits_bias(self) -> bool:
        """Whether another thread still computes the bias of the next token."""
        return self.pending_bias is not None and not self.pending_bias.row.done()

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler needs the counts of this sequence's tokens."""
        return self.params.has_penalties

    def append_tokens(self, token_ids: list[int]) -> None:
        """Take the next output tokens."""
        self.token_ids[self.num_tokens : self.num_tokens + len(token_ids)] = token_ids
        self.num_tokens += len(token_ids)

    def block_hashes(self, block_size: int, num_tokens: int) -> list[bytes]:
        """Hashes of the full blocks within the first `num_tokens` tokens, all of which the host knows."""
        num_blocks = num_tokens // block_size
        while len(self.hashes) < num_blocks:
            first = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.prompt.cache_salt
            overlapping = [s for s in self.prompt.spans if s.start < first + block_size and s.start + s.length > first]
            media = b"".join(
                f"{len(s.item_hash)}:{s.item_hash}@{first - s.start + s.embed_offset};".encode() for s in overlapping
            )
            self.hashes.append(block_hash(parent, self.token_ids[first : first + block_size], media))
        return self.hashes[:num_blocks]

    def reset(self) -> None:
        """Start over after a preemption. The caller has freed the blocks and the row."""
        self.num_scheduled = 0
        self.prefill_target = self.num_tokens
        self.num_hashed_blocks = 0
        self.row = None
        self.block_ids = []
        self.cross_block_ids = []
