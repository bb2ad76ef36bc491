"""LLaVA-1.5: every image becomes one square crop and a fixed number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import Expanded, Item, Kwargs, Span, expand_placeholders, linear_positions
from mmjax.processors.outlines import rows_outline
from mmjax.processors.vision import image_size, resize
from mmjax.text.tokenizer import Tokenizer

MAX_ASPECT = 1000  # the resized long edge is aspect * 336: bounds what one odd image can allocate


class Processor:
    """See `mmjax.processors.base.Processor`."""

    kinds: Mapping[str, int | None] = {"image": None}
    marker: Mapping[str, str] = {"image": "<image>"}
    placeholder: Mapping[str, str] = marker
    accepts: frozenset[str] = frozenset()  # any other size would not fit the tower's position table
    embeds: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",)}
    outline = rows_outline
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        vision = config["vision_config"]
        self.markers = {"image": config["image_token_index"]}
        self.size: int = vision["image_size"]
        prepare = files.get("preprocessor_config.json", {})
        edge, crop = prepare.get("size", self.size), prepare.get("crop_size", self.size)  # a number in old files
        self.edge: int = edge["shortest_edge"] if isinstance(edge, Mapping) else edge
        height, width = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        if (height, width) != (self.size, self.size):
            raise ValueError(
                f"preprocessor_config.json crops to {width}x{height}, but the vision tower of config.json takes "
                f"{self.size}x{self.size}: the two files belong to different checkpoints"
            )
        keeps_class = config["vision_feature_select_strategy"] == "full"
        self.rows = (self.size // vision["patch_size"]) ** 2 + keeps_class

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """The same for every image."""
        return self.rows

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
        """An RGB image or uint8 [H, W, 3] -> pixels u8[1, 3, S, S]: shortest edge to S, then the centre."""
        height, width = image_size(media)
        short, long = sorted((height, width))
        other = int(self.edge * long / short)
        frame = resize(media, *((other, self.edge) if width <= height else (self.edge, other)))
        return Item(kind, {"pixels": self._crop(frame).transpose(2, 0, 1)[None].copy()}, units=1, rows=self.rows)

    def _crop(self, frame: np.ndarray) -> np.ndarray:
        """The centre [S, S, 3]; an edge that is too short is padded with black."""
        short = [max(0, self.size - edge) for edge in frame.shape[:2]]
        if any(short):
            frame = np.pad(frame, [*((-(-gap // 2), gap // 2) for gap in short), (0, 0)])
        top, left = ((edge - self.size) // 2 for edge in frame.shape[:2])
        return frame[top : top + self.size, left : left + self.size]

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded:
        """One image token per row of each image; RequestError when placeholders and images do not match."""
        return expand_placeholders(tokens, items, self.markers, self.placeholder)

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(tokens))
