"""Language models alone: prompts are text, and stay as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors import base
from mmjax.processors.base import ExpandedPrompt, MediaItem, PlaceholderSpan, ProcessorKwargs, linear_positions
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`."""

    mm_limits: Mapping[str, int | None] = {}
    placeholder_token: Mapping[str, str] = {}
    placeholder_text: Mapping[str, str] = {}
    accepted_kwargs: frozenset[str] = frozenset()
    embed_fields: Mapping[str, tuple[str, ...]] = {}
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        pass

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """RequestError: there is nothing to see or hear with."""
        raise RequestError(f"This is a language model, which takes no {modality}.", "unsupported_modality")

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """None."""
        return 0

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """RequestError, as for `item`."""
        return self.process_item(modality, None, {})

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """The prompt itself."""
        return ExpandedPrompt(list(token_ids), [])

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
