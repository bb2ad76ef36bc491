"""Images and videos of the Qwen families: patches at native size, and positions on three axes.

Sizes: both edges are rounded to multiples of patch_size * merge_size, and the area is brought into
min_pixels..max_pixels. Layout of `pixels`: patches are in the order (t, h / 2, w / 2, 2, 2), so that four consecutive
ones form an embedding; a patch is (channel, frame of the pair, row, column).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.hf_config import HfConfig, canonical, image_options, video_options
from mmjax.multimodal.video import MAX_NUMBER, MIN_RATE, Video
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    ProcessorKwargs,
    expand_placeholders,
    positive_int,
)
from mmjax.processors.image_options import (
    allow_only,
    flag,
    refused,
    resampling,
    same_normalization,
    tower_sizes,
)
from mmjax.processors.resize import image_size, resize
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

MAX_ASPECT = 200
PixelBounds = tuple[int, int]


def patch_fields(patch_dim: int, *, windows: bool = False, position_grid: bool = False) -> tuple[FeatureField, ...]:
    """One patch per input, in the order of `QwenVLProcessor`.

    patch_coords: its row and column. segment_ids: its frame. windows: for towers that attend within windows, which
    want patches window by window; window_ids: the patch's window; embed_order: the first patch of each embedding.
    position_grid: for towers with a square table of learned positions; position_coords: where the patch lies in it.
    """
    fields = [
        FeatureField("pixels", (patch_dim,), "uint8"),
        FeatureField("patch_coords", (2,)),
        FeatureField("segment_ids", pad=-1, is_segment_id=True),
    ]
    if windows:
        fields.append(FeatureField("window_ids", pad=-1, is_segment_id=True))
        fields.append(FeatureField("embed_order", axis="embeds", index_stride=1))
    if position_grid:
        fields.append(FeatureField("position_coords", (2,), "float32"))
    return tuple(fields)


def smart_resize(height: int, width: int, factor: int, low: int, high: int, frames: int = 1) -> tuple[int, int]:
    """Nearest multiples of `factor` with an area within low..high and about the same aspect (published rule).

    frames: what the area is multiplied by, for families whose bounds are of a whole video.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RequestError(
            f"absolute aspect ratio must be smaller than {MAX_ASPECT}, got {max(height, width) / min(height, width):g} "
            f"({width}x{height}). Crop or pad the image.",
            "aspect_ratio",
        )
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor  # banker's rounding, as published
    padded = frames if frames == 1 else round(frames / 2) * 2
    if padded * new_h * new_w > high:
        beta = math.sqrt(frames * height * width / high)
        new_h = max(factor, math.floor(height / beta / factor) * factor)
        new_w = max(factor, math.floor(width / beta / factor) * factor)
    elif padded * new_h * new_w < low:
        beta = math.sqrt(low / (frames * height * width))
        new_h, new_w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_h, new_w


class QwenVLProcessor(Processor):
    """What the families share. A family says its default pixel bounds, and may add features or reorder patches."""

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
    default_bounds: Mapping[str, PixelBounds]  # of the published processors, where the files name none

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        config = canonical(config)
        vision = config["vision_config"]
        self.patch_size, self.merge_size = vision["patch_size"], vision["spatial_merge_size"]
        self.temporal_patch_size = vision["temporal_patch_size"]
        self.placeholder_ids: dict[str, int] = {
            modality: config[f"{modality}_token_id"] for modality in ("image", "video")
        }
        options = {"image": image_options(files), "video": video_options(files)}
        for each in options.values():
            self._check(each)
        same_normalization(options["image"], options["video"])
        self.pixel_bounds = {name: area_bounds(each, self.default_bounds[name]) for name, each in options.items()}
        self.resample = {name: resampling(each) for name, each in options.items()}
        self.do_resize = {name: flag(each, "do_resize", True) for name, each in options.items()}

    def _check(self, options: HfConfig) -> None:
        """ValueError for options that this family cannot honor."""
        allow_only(options, "images of any size are resized, never cropped", do_center_crop=False)
        tower_sizes(
            options,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
        )
        size = options.get("size")
        names = {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
        if size is not None and not (isinstance(size, Mapping) and names >= {k for k, v in size.items() if v}):
            raise refused(options, "size", "shortest_edge and longest_edge are the areas between which an image is")

    def resized_size(self, modality: str, frames: int, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
        """(height, width) to which every frame is resized; `bounds` are areas in pixels."""
        return smart_resize(height, width, self.patch_size * self.merge_size, *bounds)

    def _target_size(
        self, modality: str, frames: int, height: int, width: int, kwargs: ProcessorKwargs
    ) -> tuple[int, int]:
        factor = self.patch_size * self.merge_size
        if kwargs.get("do_resize", self.do_resize[modality]):
            return self.resized_size(modality, frames, height, width, area_bounds(kwargs, self.pixel_bounds[modality]))
        if height % factor or width % factor:
            raise RequestError(
                f"do_resize=False needs a height and width divisible by {factor}, got {width}x{height}.", "bad_kwargs"
            )
        return height, width

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width) or a video (frames, height, width)."""
        frames = size[0] if modality == "video" else 1
        height, width = self._target_size(modality, frames, size[-2], size[-1], kwargs)
        return (
            math.ceil(frames / self.temporal_patch_size)
            * (height // self.patch_size)
            * (width // self.patch_size)
            // self.merge_size**2
        )

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An image or a video, as `patch_fields`."""
        frames = list(media.frames) if isinstance(media, Video) else [media]
        height, width = self._target_size(modality, len(frames), *image_size(frames[0]), kwargs)
        resized = [resize(frame, height, width, self.resample[modality]) for frame in frames]
        t, h, w = -(-len(resized) // self.temporal_patch_size), height // self.patch_size, width // self.patch_size
        order = self.patch_order(h, w)
        pixels = np.empty((t, h * w, 3, self.temporal_patch_size, self.patch_size, self.patch_size), np.uint8)
        patches = np.empty(0, np.uint8)
        for index in range(t * self.temporal_patch_size):
            if index < len(resized):  # an image counts twice; videos of an odd number of frames repeat the last
                patches = self._patches(resized[index])[order]
            pixels[index // self.temporal_patch_size, :, :, index % self.temporal_patch_size] = patches
        coords = np.broadcast_to(patch_coords(h, w, self.merge_size)[order], (t, h * w, 2)).reshape(-1, 2)
        features = {
            "pixels": pixels.reshape(t * h * w, -1),
            "patch_coords": np.ascontiguousarray(coords),
            "segment_ids": np.repeat(np.arange(t, dtype=np.int32), h * w),
        }
        grid = (t, h // self.merge_size, w // self.merge_size)
        times = self.frame_times(media, t, kwargs) if isinstance(media, Video) else ()
        return MediaItem(modality, self.add_features(features, (t, h, w)), t * h * w, math.prod(grid), grid, times)

    def patch_order(self, h: int, w: int) -> np.ndarray | slice:
        """Which patch of a frame of h x w patches, as `_patches` gives them, comes first, second and so on."""
        return slice(None)

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item of a grid of (t, h, w) patches, without its embeddings."""
        return grid_item(modality, size, self.merge_size)

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """The features of a grid of (t, h, w) patches, with those that the family adds."""
        return features

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """The time of each step of a video, in families that use it; see `MediaItem`."""
        return ()

    def _patches(self, frame: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> patches, four to an embedding: [n, 3, patch_size, patch_size]."""
        m, p = self.merge_size, self.patch_size
        h, w = frame.shape[0] // p, frame.shape[1] // p
        blocks = frame.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return blocks.reshape(h * w, 3, p, p)

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One pad token per embedding of each item."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """(int32 [3, T], delta) of (time, row, column); see `mrope`."""
        blocks = [(span.start, self.span_rope_positions(items[span.modality][span.item_index], span)) for span in spans]
        return mrope(len(token_ids), blocks)

    def span_rope_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """int32 [3, length]: positions of the span's embeddings, relative to the item's first."""
        return np.indices(item.grid, dtype=np.int32).reshape(3, -1)


def mrope(length: int, blocks: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Positions of a prompt with blocks (first token, relative positions int32 [3, n]) of media: int32 [3, length], and
    the delta of later tokens.

    Text advances all three axes together; a block counts from the next free position, and text continues after the
    largest position used (also after long videos, where transformers 5 restarts too early).
    """
    out = np.empty((3, length), np.int32)
    done = next_position = 0
    for start, block in blocks:
        out[:, done:start] = np.arange(next_position, next_position + start - done)
        next_position += start - done
        done = start + block.shape[1]
        out[:, start:done] = block + next_position
        next_position += int(block.max()) + 1
    out[:, done:] = np.arange(next_position, next_position + length - done)
    return out, next_position - done  # position of token i = i + (next_position - done) from `done` on


def area_bounds(source: Mapping[str, Any], default: PixelBounds) -> PixelBounds:
    """(min, max) pixels: min_pixels and max_pixels, else size.shortest_edge and longest_edge, else the default."""
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
    """(row, column) of each patch, four to an embedding: int32 [h * w, 2]."""
    grid = np.indices((h, w), dtype=np.int32).reshape(2, h // merge, merge, w // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def grid_item(modality: str, size: tuple[int, ...], merge: int) -> MediaItem:
    """The item of a grid of (t, h, w) patches, merge * merge to an embedding. RequestError for a size that is none."""
    if len(size) != 3 or size[1] % merge or size[2] % merge or (modality == "image" and size[0] != 1):
        raise RequestError(
            f"`{modality}_grid_thw` must be (t, h, w) in patches, h and w divisible by {merge}"
            f"{' and t 1' if modality == 'image' else ''}, got {list(size)}.",
            "bad_embeds",
        )
    grid = (size[0], size[1] // merge, size[2] // merge)
    return MediaItem(modality, {}, num_inputs=0, num_embeds=math.prod(grid), grid=grid)


def position_coords(coords: np.ndarray, grid: tuple[int, ...], grid_size: int) -> np.ndarray:
    """Where patches lie in a square table of positions whose corners are the grid's: float32 [n, 2].

    coords: their (row, column), int32 [n, 2]. grid: (.., h, w) patches. grid_size: entries along an edge of the table.
    """
    down, across = (np.linspace(0, grid_size - 1, n, dtype=np.float32) for n in grid[-2:])
    return np.stack([down[coords[:, 0]], across[coords[:, 1]]], axis=1)


DEFAULT_FPS = 2.0  # of videos without metadata, as in the published processors


class WindowedQwenVLProcessor(QwenVLProcessor):
    """For towers that attend within windows, which never cross frames. Patches are ordered window by window."""

    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        vision = config["vision_config"]
        # along an edge of a window
        self.window_embeds: int = vision["window_size"] // self.patch_size // self.merge_size
        self.positions_per_second: float = vision["tokens_per_second"]

    def _windows(self, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a frame of h x w patches: the window of each embedding, and the order that sorts them by it."""
        return windows(h // self.merge_size, w // self.merge_size, self.window_embeds)

    def patch_order(self, h: int, w: int) -> np.ndarray | slice:
        """Window by window."""
        square = self.merge_size**2
        return (self._windows(h, w)[1][:, None] * square + np.arange(square)).reshape(-1)

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """With window_ids and embed_order."""
        t, h, w = grid
        window, order = self._windows(h, w)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        frame, square = np.arange(t, dtype=np.int32)[:, None], self.merge_size**2
        window_ids = window[order].astype(np.int32) + frame * np.int32(window[-1] + 1)
        return features | {
            "window_ids": np.repeat(window_ids.reshape(-1), square),
            "embed_order": ((rank + frame * np.int32(len(order))) * np.int32(square)).reshape(-1),
        }

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Positions, not yet rounded, at which the steps begin, by `fps` or else by the video's metadata."""
        return self._step_positions(steps, frame_rate(video, kwargs, DEFAULT_FPS))

    def _step_positions(self, steps: int, rate: float) -> tuple[float, ...]:
        return tuple(step * (self.temporal_patch_size / rate) * self.positions_per_second for step in range(steps))

    def span_rope_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """The first axis of a video follows time instead of steps, at DEFAULT_FPS where its rate is unknown (given
        embeddings)."""
        block = super().span_rope_positions(item, span)
        times = np.floor(item.frame_times or self._step_positions(item.grid[0], DEFAULT_FPS)).astype(np.int32)
        block[0] = times[block[0]]
        return block


@functools.lru_cache(maxsize=8)  # asked for twice for each image, and images of a batch often have one size
def windows(h: int, w: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a frame of h x w embeddings: the window of each, of `edge` by `edge`, and the order that sorts them by it;
    inside a window the order stays. Neither array may be changed."""
    row, column = np.indices((h, w)).reshape(2, -1) // edge
    window = row * (column[-1] + 1) + column
    return window, np.argsort(window, kind="stable")


def frame_rate(video: Video, kwargs: ProcessorKwargs, default: float) -> float:
    """Frames per second of a video's frames: `fps`, or else by its metadata. RequestError unless positive."""
    metadata = video.metadata
    rate: Any = kwargs.get("fps")
    if rate is None:
        rate = metadata.get("fps")
        if rate and metadata.get("total_num_frames") and metadata.get("frames_indices") is not None:
            rate = rate * len(metadata["frames_indices"]) / metadata["total_num_frames"]  # of the sampled frames
    rate = rate or default
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not MIN_RATE <= rate <= MAX_NUMBER:
        raise RequestError(f"mm_processor_kwargs: fps must be a positive number, got {rate!r}.", "bad_kwargs")
    return float(rate)
