"""LLaVA-1.5: every image becomes one square crop and a fixed number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.hf_config import canonical, image_options
from mmjax.processors import base
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    expand_placeholders,
    item_of_any_length,
    linear_positions,
)
from mmjax.processors.image_options import SquareImage
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer


def image_fields(image_size: int) -> tuple[FeatureField, ...]:
    """One square image per input."""
    return (FeatureField("pixels", (3, image_size, image_size), "uint8"),)


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`."""

    mm_limits: Mapping[str, int | None] = {"image": None}
    placeholder_token: Mapping[str, str] = {"image": "<image>"}
    placeholder_text: Mapping[str, str] = placeholder_token
    accepted_kwargs: frozenset[str] = frozenset()  # another size would not fit the tower's position table
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",)}
    item_for_embeds = item_of_any_length
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        config = canonical(config)
        vision = config["vision_config"]
        self.placeholder_ids = {"image": config["image_token_id"]}
        self.image_size: int = vision["image_size"]
        self.prepare = SquareImage.from_options(image_options(files), self.image_size)
        has_class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        drops_first = config.get("vision_feature_select_strategy", "default") == "default"
        self.embeds_per_image = (self.image_size // vision["patch_size"]) ** 2 + has_class_token - drops_first

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """The same for every image."""
        return self.embeds_per_image

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """`image_fields`: as published, the shortest edge is resized to the tower's image size, and the center is
        cropped."""
        pixels = self.prepare(media).transpose(2, 0, 1)[None].copy()
        return MediaItem(modality, {"pixels": pixels}, num_inputs=1, num_embeds=self.embeds_per_image)

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One image token per embedding of each image."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
