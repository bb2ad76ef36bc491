"""Windows of the second Qwen tower, and its clock: patches in the order of their windows, positions in seconds."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.base import Item, Kwargs, Span
from mmjax.processors.patches import PatchProcessor
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

FPS = 2.0  # of clips that come without metadata, as the published processors have it


class WindowProcessor(PatchProcessor):
    """Adds `window` i32[U] to the features, and `order` i32[rows]: the place of each row's first patch among the units,
    which come window by window. Windows never cross frames."""

    accepts = PatchProcessor.accepts | {"fps"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        vision = config["vision_config"]
        self.side: int = vision["window_size"] // self.patch // self.merge  # of a window, in rows
        self.ticks: float = vision["tokens_per_second"]  # positions per second

    def more(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Units in the order of their windows."""
        t, h, w = grid[0], grid[1] // self.merge, grid[2] // self.merge
        across, down = -(-w // self.side), -(-h // self.side)
        frame, row, column = np.indices((t, h, w)).reshape(3, -1)
        window = (frame * down + row // self.side) * across + column // self.side
        order = np.argsort(window, kind="stable")  # of rows; inside a window they keep their order
        square = self.merge**2
        units = (order[:, None] * square + np.arange(square)).reshape(-1)
        back = np.empty(len(order), np.int32)
        back[order] = np.arange(len(order), dtype=np.int32) * square
        moved = {name: np.ascontiguousarray(feature[units]) for name, feature in features.items()}
        return moved | {"window": np.repeat(window[order].astype(np.int32), square), "order": back}

    def times(self, video: Video, steps: int, kwargs: Kwargs) -> tuple[float, ...]:
        """Ticks, not yet rounded, at which each step begins, by the rate of the frames: `fps`, or by the metadata."""
        return self._ticks(steps, frame_rate(video, kwargs, FPS))

    def _ticks(self, steps: int, rate: float) -> tuple[float, ...]:
        return tuple(step * (self.frames / rate) * self.ticks for step in range(steps))

    def block(self, item: Item, span: Span) -> np.ndarray:
        """A clip's first axis counts ticks instead of steps; a clip of unknown rate (its rows given) has FPS."""
        block = super().block(item, span)
        ticks = np.floor(item.times or self._ticks(item.grid[0], FPS)).astype(np.int32)
        block[0] = ticks[block[0]]
        return block


def frame_rate(video: Video, kwargs: Kwargs, default: float) -> float:
    """Frames per second of the frames of a clip: as asked for, or by its metadata. RequestError unless positive."""
    known = video.metadata
    rate: Any = kwargs.get("fps")
    if rate is None:
        rate = known.get("fps")
        if rate and known.get("total_num_frames") and known.get("frames_indices") is not None:
            rate = rate * len(known["frames_indices"]) / known["total_num_frames"]  # of those that were kept
    rate = rate or default
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise RequestError(f"mm_processor_kwargs: fps must be a positive number, got {rate!r}.", "bad_kwargs")
    return float(rate)
