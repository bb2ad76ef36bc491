"""Windows of the second Qwen tower, and its clock: patches in the order of their windows, positions in seconds."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.base import MediaItem, PlaceholderSpan, ProcessorKwargs
from mmjax.processors.patches import QwenVLProcessor
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

FPS = 2.0  # of clips that come without metadata, as the published processors have it


class WindowedQwenVLProcessor(QwenVLProcessor):
    """Adds `window` i32[U] to the features, and `order` i32[rows]: the place of each row's first patch among the units,
    which come window by window. Windows never cross frames."""

    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        vision = config["vision_config"]
        self.window_embeds: int = vision["window_size"] // self.patch_size // self.merge_size  # of a window, in rows
        self.positions_per_second: float = vision["tokens_per_second"]  # positions per second

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Units in the order of their windows."""
        t, h, w = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
        across, down = -(-w // self.window_embeds), -(-h // self.window_embeds)
        frame, row, column = np.indices((t, h, w)).reshape(3, -1)
        window = (frame * down + row // self.window_embeds) * across + column // self.window_embeds
        order = np.argsort(window, kind="stable")  # of rows; inside a window they keep their order
        square = self.merge_size**2
        units = (order[:, None] * square + np.arange(square)).reshape(-1)
        back = np.empty(len(order), np.int32)
        back[order] = np.arange(len(order), dtype=np.int32) * square
        moved = {name: np.ascontiguousarray(feature[units]) for name, feature in features.items()}
        return moved | {"window_ids": np.repeat(window[order].astype(np.int32), square), "embed_order": back}

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Ticks, not yet rounded, at which each step begins, by the rate of the frames: `fps`, or by the metadata."""
        return self._positions(steps, frame_rate(video, kwargs, FPS))

    def _positions(self, steps: int, rate: float) -> tuple[float, ...]:
        return tuple(step * (self.temporal_patch_size / rate) * self.positions_per_second for step in range(steps))

    def span_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """A clip's first axis counts ticks instead of steps; a clip of unknown rate (its rows given) has FPS."""
        block = super().span_positions(item, span)
        ticks = np.floor(item.frame_times or self._positions(item.grid[0], FPS)).astype(np.int32)
        block[0] = ticks[block[0]]
        return block


def frame_rate(video: Video, kwargs: ProcessorKwargs, default: float) -> float:
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
