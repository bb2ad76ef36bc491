"""LLaVA-1.5: every image becomes one square crop and a fixed number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
from mmjax.processors.resize import image_size, resize
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

MAX_ASPECT = 1000  # the resized long edge is aspect * 336: bounds what one odd image can allocate


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
        vision = config["vision_config"]
        self.placeholder_ids = {"image": config["image_token_index"]}
        self.image_size: int = vision["image_size"]
        prepare = files.get("preprocessor_config.json", {})
        # numbers in old files
        edge, crop = prepare.get("size", self.image_size), prepare.get("crop_size", self.image_size)
        self.shortest_edge: int = edge["shortest_edge"] if isinstance(edge, Mapping) else edge
        height, width = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"preprocessor_config.json crops to {width}x{height}, but the vision tower of config.json takes "
                f"{self.image_size}x{self.image_size}: the two files belong to different checkpoints"
            )
        has_class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        drops_first = config.get("vision_feature_select_strategy", "default") == "default"
        self.embeds_per_image = (self.image_size // vision["patch_size"]) ** 2 + has_class_token - drops_first

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """The same for every image."""
        return self.embeds_per_image

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """`image_fields`: the shortest edge is resized to the tower's image size, then the center is cropped."""
        height, width = image_size(media)
        short, long = sorted((height, width))
        if long > MAX_ASPECT * short:
            raise RequestError(
                f"absolute aspect ratio must be at most {MAX_ASPECT}, got {long / short:g} ({width}x{height}). Crop or "
                "pad the image.",
                "aspect_ratio",
            )
        other = int(self.shortest_edge * long / short)
        resized = resize(media, *((other, self.shortest_edge) if width <= height else (self.shortest_edge, other)))
        return MediaItem(
            modality,
            {"pixels": self._crop(resized).transpose(2, 0, 1)[None].copy()},
            num_inputs=1,
            num_embeds=self.embeds_per_image,
        )

    def _crop(self, image: np.ndarray) -> np.ndarray:
        """The center of uint8 [height, width, 3]; an edge that is too short is padded with black."""
        missing = [max(0, self.image_size - edge) for edge in image.shape[:2]]
        if any(missing):
            image = np.pad(image, [*((-(-gap // 2), gap // 2) for gap in missing), (0, 0)])
        top, left = ((edge - self.image_size) // 2 for edge in image.shape[:2])
        return image[top : top + self.image_size, left : left + self.image_size]

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One image token per embedding of each image."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
