"""Language models alone: prompts are text, and stay as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import Expanded, Item, Kwargs, Span, linear_positions
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError


class Processor:
    """See `mmjax.processors.base.Processor`."""

    kinds: Mapping[str, int | None] = {}
    marker: Mapping[str, str] = {}
    placeholder: Mapping[str, str] = {}
    accepts: frozenset[str] = frozenset()
    embeds: Mapping[str, tuple[str, ...]] = {}
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        pass

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
        """RequestError: there is nothing to see or hear with."""
        raise RequestError(f"This is a language model, which takes no {kind}.", "unsupported_modality")

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """None."""
        return 0

    def outline(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> Item:
        """RequestError, as for `item`."""
        return self.item(kind, None, {})

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded:
        """The prompt itself."""
        return Expanded(list(tokens), [])

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(tokens))
