"""How the Qwen families see: pictures and clips of native size as patches, and positions on three axes.

Sizes: both edges are rounded to multiples of patch * merge and the area is kept within min_pixels..max_pixels.
Row layout of `pixels`: patches run over (t, h/2, w/2, 2, 2), so that four consecutive rows form one token; a row holds
(channel, frame of the pair, patch, patch) values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    ProcessorKwargs,
    expand_placeholders,
)
from mmjax.processors.embed_items import grid_item
from mmjax.processors.resize import LARGEST, LEAST_RATE, image_size, positive_int, resize
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

MAX_ASPECT = 200
PixelBounds = tuple[int, int]


def smart_resize(height: int, width: int, factor: int, low: int, high: int, frames: int = 1) -> tuple[int, int]:
    """Nearest multiples of `factor` with an area within low..high and about the same aspect (published rule).

    frames: what the area is multiplied by, for families that bound a whole clip.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RequestError(
            f"absolute aspect ratio must be smaller than {MAX_ASPECT}, got {max(height, width) / min(height, width):g} "
            f"({width}x{height}). Crop or pad the image.",
            "aspect_ratio",
        )
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor  # banker's rounding, as published
    shown = frames if frames == 1 else round(frames / 2) * 2
    if shown * new_h * new_w > high:
        beta = math.sqrt(frames * height * width / high)
        new_h = max(factor, math.floor(height / beta / factor) * factor)
        new_w = max(factor, math.floor(width / beta / factor) * factor)
    elif shown * new_h * new_w < low:
        beta = math.sqrt(low / (frames * height * width))
        new_h, new_w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_h, new_w


class QwenVLProcessor(Processor):
    """What the families have in common. A family says its default areas, and may add features or change the order."""

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None}
    placeholder_token: Mapping[str, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    placeholder_text: Mapping[str, str] = {
        modality: f"<|vision_start|>{token}<|vision_end|>" for modality, token in placeholder_token.items()
    }
    accepted_kwargs = frozenset({"min_pixels", "max_pixels", "size", "do_resize"})
    embed_fields: Mapping[str, tuple[str, ...]] = {
        modality: (f"{modality}_embeds", f"{modality}_grid_thw") for modality in ("image", "video")
    }
    sampling_rate: int | None = None
    default_bounds: Mapping[str, PixelBounds]  # what the published processors use where the files name no sizes

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        vision = config["vision_config"]
        self.patch_size, self.merge_size = vision["patch_size"], vision["spatial_merge_size"]
        self.temporal_patch_size = vision["temporal_patch_size"]
        self.placeholder_ids: dict[str, int] = {
            modality: config[f"{modality}_token_id"]
            if f"{modality}_token_id" in config
            else config[f"{modality}_token_index"]
            for modality in ("image", "video")
        }
        image = files.get("preprocessor_config.json")
        video = files.get("video_preprocessor_config.json", image)  # older repositories keep one file for both
        self.pixel_bounds = {
            modality: area_bounds(file or {}, self.default_bounds[modality])
            for modality, file in (("image", image), ("video", video))
        }

    def resized_size(self, modality: str, frames: int, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
        """(height, width) to which every frame is resized; `bounds` are in pixels."""
        return smart_resize(height, width, self.patch_size * self.merge_size, *bounds)

    def _target(self, modality: str, frames: int, height: int, width: int, kwargs: ProcessorKwargs) -> tuple[int, int]:
        factor = self.patch_size * self.merge_size
        if kwargs.get("do_resize", True):
            return self.resized_size(modality, frames, height, width, area_bounds(kwargs, self.pixel_bounds[modality]))
        if height % factor or width % factor:
            raise RequestError(
                f"do_resize=False needs a height and width divisible by {factor}, got {width}x{height}.", "bad_kwargs"
            )
        return height, width

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width) or a video (frames, height, width)."""
        frames = size[0] if modality == "video" else 1
        height, width = self._target(modality, frames, size[-2], size[-1], kwargs)
        return (
            math.ceil(frames / self.temporal_patch_size)
            * (height // self.patch_size)
            * (width // self.patch_size)
            // self.merge_size**2
        )

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An RGB image or uint8 [H, W, 3], or a Video -> pixels u8[U, values], place i32[U, 2], segment i32[U] and what
        `more` says."""
        frames = list(media.frames) if isinstance(media, Video) else [media]
        height, width = self._target(modality, len(frames), *image_size(frames[0]), kwargs)
        resized = [resize(frame, height, width) for frame in frames]
        resized += resized[-1:] * (
            -len(resized) % self.temporal_patch_size
        )  # an image is shown twice; odd clips repeat the last
        t, h, w = len(resized) // self.temporal_patch_size, height // self.patch_size, width // self.patch_size
        pixels = np.empty((t, h * w, 3, self.temporal_patch_size, self.patch_size, self.patch_size), np.uint8)
        for index, frame in enumerate(resized):
            pixels[index // self.temporal_patch_size, :, :, index % self.temporal_patch_size] = self._patches(frame)
        place = np.broadcast_to(patch_coords(h, w, self.merge_size), (t, h * w, 2)).reshape(-1, 2)
        features = {
            "pixels": pixels.reshape(t * h * w, -1),
            "patch_coords": np.ascontiguousarray(place),
            "segment_ids": np.repeat(np.arange(t, dtype=np.int32), h * w),
        }
        grid = (t, h // self.merge_size, w // self.merge_size)
        times = self.frame_times(media, t, kwargs) if isinstance(media, Video) else ()
        return MediaItem(modality, self.add_features(features, (t, h, w)), t * h * w, math.prod(grid), grid, times)

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item of a grid of (t, h, w) patches, without its rows."""
        return grid_item(modality, size, self.merge_size)

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """The features of `grid` = (t, h, w) patches, completed by what the family's tower wants beside."""
        return features

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """When each of the clip's steps is, where the family asks; see `Item.times`."""
        return ()

    def _patches(self, frame: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> [patches in merge-block order, 3, patch, patch]."""
        m, p = self.merge_size, self.patch_size
        h, w = frame.shape[0] // p, frame.shape[1] // p
        blocks = frame.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return blocks.reshape(h * w, 3, p, p)

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One pad token per row of each item; RequestError when placeholders and items do not match."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """int32[3, T] (time, row, column) and the delta of later tokens; see `mrope`."""
        blocks = [(span.start, self.span_positions(items[span.modality][span.item_index], span)) for span in spans]
        return mrope(len(token_ids), blocks)

    def span_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """int32[3, n]: where the span's rows are, counted from the item's first."""
        return np.indices(item.grid, dtype=np.int32).reshape(3, -1)


def mrope(length: int, blocks: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Positions of a prompt with blocks (first token, int32[3, n]) in it: int32[3, length] and the delta of later ones.

    Text advances all three together; a block counts from the next free position, and text goes on after the largest
    position used (also after long clips, where transformers 5 restarts too early).
    """
    out = np.empty((3, length), np.int32)
    done = free = 0
    for start, block in blocks:
        out[:, done:start] = np.arange(free, free + start - done)
        free += start - done
        done = start + block.shape[1]
        out[:, start:done] = block + free
        free += int(block.max()) + 1
    out[:, done:] = np.arange(free, free + length - done)
    return out, free - done  # position of token i = i + (free - done) from `done` on


def area_bounds(source: Mapping[str, Any], default: PixelBounds) -> PixelBounds:
    """(fewest, most) pixels: min_pixels/max_pixels win over size.shortest_edge/longest_edge win over the default."""
    size = source.get("size") or {}
    if not isinstance(size, Mapping):
        raise RequestError(f"mm_processor_kwargs: size must be a dictionary, got {size!r}.", "bad_kwargs")
    found = []
    for value, names in zip(default, (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")), strict=True):
        for where, name in ((size, names[1]), (size, names[0]), (source, names[0])):
            if where.get(name) is not None:
                value = positive_int(where, name)
        found.append(value)
    low, high = found
    if low > high:
        raise RequestError(f"mm_processor_kwargs: min_pixels ({low}) is above max_pixels ({high}).", "bad_kwargs")
    return low, high


def patch_coords(h: int, w: int, merge: int) -> np.ndarray:
    """(row, column) of each patch in merge-block order: int32[h * w, 2]."""
    grid = np.indices((h, w), dtype=np.int32).reshape(2, h // merge, merge, w // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


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
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not LEAST_RATE <= rate <= LARGEST:
        raise RequestError(f"mm_processor_kwargs: fps must be a positive number, got {rate!r}.", "bad_kwargs")
    return float(rate)
