"""The state of one answer: its tokens, its pages, and how far the device has come with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from mmjax.engine.constraints import Constraints
from mmjax.engine.grammar import Grammar
from mmjax.engine.pages import page_key
from mmjax.engine.timestamps import Timed
from mmjax.processors.base import Item
from mmjax.types import SamplingParams

_numbers = itertools.count()


class MediaSpan(NamedTuple):
    """Tokens [start, start + length) take rows first..first+length-1 of the item with this content key."""

    start: int
    length: int
    key: str
    item: Item
    first: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What all answers to one request share. tokens: i32[T]; positions: i32[R, T]; token i >= T sits at i + delta.

    audio: the items that an encoder-decoder reads through cross attention. salt: mixed into the page keys.
    """

    tokens: np.ndarray
    positions: np.ndarray
    delta: int
    spans: tuple[MediaSpan, ...] = ()
    audio: tuple[tuple[str, Item], ...] = ()
    salt: bytes = b""


class Sequence:
    """One answer in the making.

    `whole`: every token of the prompt must run, be it in the prefix cache or not. `planned` tokens have their keys in
    pages once everything dispatched so far has run; `known` tokens have reached the host. Between the two lies what is
    in flight.
    """

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        *,
        seed: int,
        stops: Seq[int],
        max_len: int,
        constraints: Constraints | Grammar | Timed,
        whole: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.request_id = request_id
        self.index = index
        self.prompt = prompt
        self.params = params
        self.seed_words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
        self.stops = tuple(stops)
        self.constraints = constraints
        self.whole = whole or params.prompt_logprobs is not None
        self.prompt_len = len(prompt.tokens)
        longest = max_len - self.prompt_len
        self.max_tokens = longest if params.max_tokens is None else min(params.max_tokens, longest)
        self.tokens = np.empty(self.prompt_len + self.max_tokens, np.int32)
        self.tokens[: self.prompt_len] = prompt.tokens
        self.known = self.prompt_len
        self.planned = 0
        self.goal = self.prompt_len  # tokens to prefill before decoding (again)
        self.row: int | None = None
        self.pages: list[int] = []
        self.cross_pages: list[int] = []
        self.keys: list[bytes] = []
        self.registered = 0
        self.cached: int | None = None  # tokens found in the prefix cache when it first started
        self.scheduled_time: float | None = None
        self.finished = False
        self.biased = constraints.dynamic or constraints.row(()) is not None

    @property
    def output_len(self) -> int:
        """Output tokens that the host knows."""
        return self.known - self.prompt_len

    @property
    def outputs(self) -> np.ndarray:
        """i32[output_len]."""
        return self.tokens[self.prompt_len : self.known]

    @property
    def sampled(self) -> int:
        """Output tokens sampled once everything dispatched has run."""
        return max(0, self.planned + 1 - self.prompt_len)

    @property
    def prefilling(self) -> bool:
        """Whether tokens remain to prefill before the next one can be sampled."""
        return self.planned < self.goal

    @property
    def penalised(self) -> bool:
        """Whether the sampler needs the history of this sequence."""
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    def extend(self, tokens: list[int]) -> None:
        """More tokens from the device."""
        self.tokens[self.known : self.known + len(tokens)] = tokens
        self.known += len(tokens)

    def page_keys(self, size: int, tokens: int) -> list[bytes]:
        """Content keys of the full pages within the first `tokens` known tokens."""
        full = tokens // size
        while len(self.keys) < full:
            first = len(self.keys) * size
            parent = self.keys[-1] if self.keys else self.prompt.salt
            overlapping = [s for s in self.prompt.spans if s.start < first + size and s.start + s.length > first]
            extra = b"".join(f"{len(s.key)}:{s.key}@{first - s.start + s.first};".encode() for s in overlapping)
            self.keys.append(page_key(parent, self.tokens[first : first + size], extra))
        return self.keys[:full]

    def reset(self) -> None:
        """Back to nothing computed, as after preemption. The caller has released pages and row."""
        self.planned = 0
        self.goal = self.known
        self.registered = 0
        self.row = None
        self.pages = []
        self.cross_pages = []
