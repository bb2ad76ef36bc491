"""The state of one answer: its tokens, its pages, and how far the device has come with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from mmjax.engine.block_pool import block_hash
from mmjax.engine.logits import LogitsProcessor
from mmjax.processors.base import MediaItem
from mmjax.types import SamplingParams

_numbers = itertools.count()


class MediaSpan(NamedTuple):
    """Tokens [start, start + length) take rows first..first+length-1 of the item with this content key."""

    start: int
    length: int
    item_hash: str
    item: MediaItem
    embed_offset: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class EnginePrompt:
    """What all answers to one request share. tokens: i32[T]; positions: i32[R, T]; token i >= T sits at i + delta.

    audio: the items that an encoder-decoder reads through cross attention. salt: mixed into the page keys.
    """

    token_ids: np.ndarray
    rope_positions: np.ndarray
    rope_delta: int
    spans: tuple[MediaSpan, ...] = ()
    encoder_items: tuple[tuple[str, MediaItem], ...] = ()
    salt: bytes = b""


class Sequence:
    """One answer in the making.

    `whole`: every token of the prompt must run, be it in the prefix cache or not. `planned` tokens have their keys in
    pages once everything dispatched so far has run; `known` tokens have reached the host. Between the two lies what is
    in flight.
    """

    def __init__(
        self,
        index: int,
        prompt: EnginePrompt,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Seq[int],
        max_model_len: int,
        logits_processor: LogitsProcessor,
        needs_all_tokens: bool = False,
    ) -> None:
        self.seq_id = next(_numbers)
        self.index = index
        self.prompt = prompt
        self.params = params
        self.seed_words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
        self.stop_ids = tuple(stop_ids)
        self.logits_processor = logits_processor
        self.needs_all_tokens = needs_all_tokens or params.prompt_logprobs is not None
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
        self.finished = False
        self.has_bias = logits_processor.dynamic or logits_processor.bias_row(()) is not None

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
        """Output tokens sampled once everything dispatched has run."""
        return max(0, self.num_scheduled + 1 - self.prompt_len)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens remain to prefill before the next one can be sampled."""
        return self.num_scheduled < self.prefill_target

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler needs the history of this sequence."""
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    def append_tokens(self, tokens: list[int]) -> None:
        """More tokens from the device."""
        self.token_ids[self.num_tokens : self.num_tokens + len(tokens)] = tokens
        self.num_tokens += len(tokens)

    def block_hashes(self, block_size: int, tokens: int) -> list[bytes]:
        """Content keys of the full pages within the first `tokens` known tokens."""
        full = tokens // block_size
        while len(self.hashes) < full:
            first = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.prompt.salt
            overlapping = [s for s in self.prompt.spans if s.start < first + block_size and s.start + s.length > first]
            extra = b"".join(
                f"{len(s.item_hash)}:{s.item_hash}@{first - s.start + s.embed_offset};".encode() for s in overlapping
            )
            self.hashes.append(block_hash(parent, self.token_ids[first : first + block_size], extra))
        return self.hashes[:full]

    def reset(self) -> None:
        """Back to nothing computed, as after preemption. The caller has released pages and row."""
        self.num_scheduled = 0
        self.prefill_target = self.num_tokens
        self.num_hashed_blocks = 0
        self.row = None
        self.block_ids = []
        self.cross_block_ids = []
