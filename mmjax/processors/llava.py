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
    linear_positions,
)
from mmjax.processors.embed_items import any_length_item
from mmjax.processors.resize import image_size, resize
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

MAX_ASPECT = 1000  # the resized long edge is aspect * 336: bounds what one odd image can allocate


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`."""

    mm_limits: Mapping[str, int | None] = {"image": None}
    placeholder_token: Mapping[str, str] = {"image": "<image>"}
    placeholder_text: Mapping[str, str] = placeholder_token
    accepted_kwargs: frozenset[str] = frozenset()  # any other size would not fit the tower's position table
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",)}
    item_for_embeds = any_length_item
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        vision = config["vision_config"]
        self.placeholder_ids = {"image": config["image_token_index"]}
        self.image_size: int = vision["image_size"]
        prepare = files.get("preprocessor_config.json", {})
        edge, crop = (
            prepare.get("size", self.image_size),
            prepare.get("crop_size", self.image_size),
        )  # a number in old files
        self.shortest_edge: int = edge["shortest_edge"] if isinstance(edge, Mapping) else edge
        height, width = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"preprocessor_config.json crops to {width}x{height}, but the vision tower of config.json takes "
                f"{self.image_size}x{self.image_size}: the two files belong to different checkpoints"
            )
        keeps_class = config["vision_feature_select_strategy"] == "full"
        self.embeds_per_image = (self.image_size // vision["patch_size"]) ** 2 + keeps_class

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """The same for every image."""
        return self.embeds_per_image

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An RGB image or uint8 [H, W, 3] -> pixels u8[1, 3, S, S]: shortest edge to S, then the centre."""
        height, width = image_size(media)
        short, long = sorted((height, width))
        if long > MAX_ASPECT * short:
            raise RequestError(
                f"absolute aspect ratio must be at most {MAX_ASPECT}, got {long / short:g} ({width}x{height}). Crop or "
                "pad the image.",
                "aspect_ratio",
            )
        other = int(self.shortest_edge * long / short)
        frame = resize(media, *((other, self.shortest_edge) if width <= height else (self.shortest_edge, other)))
        return MediaItem(
            modality,
            {"pixels": self._crop(frame).transpose(2, 0, 1)[None].copy()},
            num_inputs=1,
            num_embeds=self.embeds_per_image,
        )

    def _crop(self, frame: np.ndarray) -> np.ndarray:
        """The centre [S, S, 3]; an edge that is too short is padded with black."""
        short = [max(0, self.image_size - edge) for edge in frame.shape[:2]]
        if any(short):
            frame = np.pad(frame, [*((-(-gap // 2), gap // 2) for gap in short), (0, 0)])
        top, left = ((edge - self.image_size) // 2 for edge in frame.shape[:2])
        return frame[top : top + self.image_size, left : left + self.image_size]

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One image token per row of each image; RequestError when placeholders and images do not match."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
