"""LLaVA-OneVision: a picture as a whole and in crops at about its own resolution; videos frame by frame.

The crops' patches are put together again to the picture, less the margins that made it fit; above nine crops' worth it
is scaled down bilinearly. Every line ends with a newline, and the whole comes first. A frame is scaled to half, and a
newline ends the video.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.multimodal.video import Video
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

SLACK = 1.1  # only above so many times the edge that is wanted, a picture is scaled down
Grid = tuple[int, int]


NEWLINE = -1  # in place of a patch: the row is the model's newline


class EmbedSources(NamedTuple):
    """Row r is the sum over j of source_weight[r, j] times patch source_index[r, j] of its item. Any axes may lead."""

    source_index: np.ndarray  # int32 [..., 4]
    source_weight: np.ndarray  # float32 [..., 4]

    def flat(self) -> "EmbedSources":
        """One leading axis."""
        return EmbedSources(self.source_index.reshape(-1, 4), self.source_weight.reshape(-1, 4))


def concat_sources(parts: Sequence[EmbedSources], axis: int = 0) -> EmbedSources:
    """Parts one after the other."""
    return EmbedSources(*(np.concatenate(arrays, axis=axis) for arrays in zip(*parts, strict=True)))


def single_sources(patches: np.ndarray) -> EmbedSources:
    """Patches as they are: int [...] to picks [..., 4]."""
    source_index = np.repeat(patches.astype(np.int32)[..., None], 4, axis=-1)
    source_weight = np.zeros(source_index.shape, np.float32)
    source_weight[..., 0] = 1
    return EmbedSources(source_index, source_weight)


def newline_sources(*shape: int) -> EmbedSources:
    """The newline, so many times."""
    return single_sources(np.full(shape, NEWLINE))


def resampled_sources(patches: np.ndarray, lines: int, columns: int) -> EmbedSources:
    """A grid of patches int [h, w] scaled bilinearly, by the centres of its cells and without smoothing, to picks
    [lines, columns, 4]."""
    if patches.shape == (lines, columns):
        return single_sources(patches)
    (top, low), (left, right) = _neighbours(patches.shape[0], lines), _neighbours(patches.shape[1], columns)
    rows = [at for at, _ in (top, top, low, low)]
    across = [at for at, _ in (left, right, left, right)]
    source_index = np.stack([patches[np.ix_(y, x)] for y, x in zip(rows, across, strict=True)], axis=-1)
    source_weight = [
        np.outer(y, x) for y, x in ((top[1], left[1]), (top[1], right[1]), (low[1], left[1]), (low[1], right[1]))
    ]
    return EmbedSources(source_index.astype(np.int32), np.stack(source_weight, axis=-1).astype(np.float32))


def _neighbours(have: int, want: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each of `want` cells the two of `have` around its centre, each with its source_weight."""
    at = np.maximum((np.arange(want) + 0.5) * (have / want) - 0.5, 0)
    first = at.astype(np.int32)
    beyond = (at - first).astype(np.float32)
    return (first, 1 - beyond), (np.minimum(first + 1, have - 1), beyond)


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`.

    `vision_aspect_ratio` may be "anyres_max_N" (scaled down above N crops' worth of rows) or "pad": one crop only, the
    picture padded to a square, as transformers prepares several images of one prompt.
    """

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None}
    placeholder_token: Mapping[str, str] = {"image": "<image>", "video": "<video>"}
    placeholder_text: Mapping[str, str] = placeholder_token
    accepted_kwargs = frozenset({"vision_aspect_ratio"})
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",), "video": ("video_embeds",)}
    item_for_embeds = any_length_item
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        vision = config["vision_config"]
        self.placeholder_ids = {"image": config["image_token_index"], "video": config["video_token_index"]}
        self.crop_size: int = vision["image_size"]
        self.grid_size = self.crop_size // vision["patch_size"]
        self.aspect: str = config.get("vision_aspect_ratio", "anyres_max_9")
        self.grid_pinpoints = [(height, width) for height, width in config["image_grid_pinpoints"]]
        prepare = files["preprocessor_config.json"]
        self.pad_color = tuple(int(255 * mean) for mean in prepare["image_mean"])
        size = prepare.get("size", {"height": self.crop_size, "width": self.crop_size})
        if (size["height"], size["width"]) != (self.crop_size, self.crop_size):
            raise ValueError(
                f"preprocessor_config.json makes crops of {size['width']}x{size['height']}, but the vision tower of "
                f"config.json takes {self.crop_size}x{self.crop_size}: the two files belong to different checkpoints"
            )

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width) or a video (frames, height, width)."""
        if modality == "video":
            return size[0] * math.ceil(self.grid_size / 2) ** 2 + 1
        most = self._most(kwargs)
        if most is None:
            return self.grid_size**2 + 1
        height, width = size[-2:]
        height, width = self._scaled(self._kept(height, width, self._canvas(height, width)), most)
        return self.grid_size**2 + height * (width + 1)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An RGB image or uint8 [H, W, 3], or a Video -> pixels u8[U, 3, S, S], source i32[rows, 4], share
        f32[rows, 4].

        Row r is the sum over j of share[r, j] times patch source[r, j] of the item; where that is -1, the newline.
        """
        if isinstance(media, Video):
            crops = [resize(frame, self.crop_size, self.crop_size) for frame in media.frames]
            picks = self._frames(len(crops))
        elif (most := self._most(kwargs)) is None:
            crops, picks = [self._padded(media)], concat_sources([self._first, newline_sources(1)])
        else:
            crops, picks = self._crops(media), self._lines(image_size(media), most)
        pixels = np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2))
        return MediaItem(
            modality, {"pixels": pixels, **picks._asdict()}, num_inputs=len(crops), num_embeds=len(picks.source_index)
        )

    # --- pixels

    def _canvas(self, height: int, width: int) -> Grid:
        """(height, width): of the allowed sizes that on which most of the picture shows, then the smallest."""

        def rank(allowed: Grid) -> Grid:
            scale = min(allowed[1] / width, allowed[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, -allowed[0] * allowed[1]

        return max(self.grid_pinpoints, key=rank)

    def _crops(self, image: Any) -> list[np.ndarray]:
        """The whole, out of proportion, and the crops row by row of the picture centred on its canvas."""
        (height, width), size = image_size(image), self.crop_size
        canvas = self._canvas(height, width)
        scale = min(canvas[1] / width, canvas[0] / height)
        if canvas[1] / width < canvas[0] / height:
            fitted = min(math.ceil(height * scale), canvas[0]), canvas[1]
        else:
            fitted = canvas[0], min(math.ceil(width * scale), canvas[1])
        board = np.zeros((*canvas, 3), np.uint8)
        top, left = ((edge - inner) // 2 for edge, inner in zip(canvas, fitted, strict=True))
        board[top : top + fitted[0], left : left + fitted[1]] = resize(image, *fitted)
        cells = board.reshape(canvas[0] // size, size, canvas[1] // size, size, 3).swapaxes(1, 2)
        return [resize(image, size, size), *cells.reshape(-1, size, size, 3)]

    def _padded(self, image: Any) -> np.ndarray:
        """The picture on a square of the mean colour."""
        height, width = image_size(image)
        edge = max(height, width)
        board = np.empty((edge, edge, 3), np.uint8)
        board[:] = self.pad_color
        top, left = (edge - height) // 2, (edge - width) // 2
        board[top : top + height, left : left + width] = np.asarray(image)
        return resize(board, self.crop_size, self.crop_size)

    # --- rows

    def _most(self, kwargs: ProcessorKwargs) -> int | None:
        """Crops' worth of rows above which a picture is scaled down; None: one padded crop only."""
        aspect = kwargs.get("vision_aspect_ratio", self.aspect)
        if aspect == "pad":
            return None
        match = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(aspect))
        if match is None:
            raise RequestError(
                f"mm_processor_kwargs: vision_aspect_ratio must be 'pad' or 'anyres_max_N', got {aspect!r}.",
                "bad_kwargs",
            )
        return int(match[1])

    def _kept(self, height: int, width: int, canvas: Grid) -> Grid:
        """Lines and columns of patches on the canvas less the margins (rounded to patches as published)."""
        lines, columns = (edge // self.crop_size * self.grid_size for edge in canvas)
        if width / height > columns / lines:
            lines -= (lines - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (lines / height), 7))) // 2 * 2
        return lines, columns

    def _scaled(self, grid: Grid, most: int) -> Grid:
        """Lines and columns after scaling down to `most` crops' worth."""
        ratio = math.sqrt(grid[0] * grid[1] / (most * self.grid_size**2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > SLACK else grid

    @property
    def _first(self) -> EmbedSources:
        """The patches of the first crop."""
        return single_sources(np.arange(self.grid_size**2))

    def _lines(self, size: Grid, most: int) -> EmbedSources:
        """The rows of a picture of this size: of the whole, then line by line, each with its newline."""
        side, canvas = self.grid_size, self._canvas(*size)
        down, across = (edge // self.crop_size for edge in canvas)
        patches = np.arange(side**2, (1 + down * across) * side**2)
        patches = patches.reshape(down, across, side, side).swapaxes(1, 2).reshape(down * side, across * side)
        lines, columns = self._kept(*size, canvas)
        top, left = (len(patches) - lines) // 2, (len(patches[0]) - columns) // 2
        kept = patches[top : top + lines, left : left + columns]
        scaled = resampled_sources(kept, *self._scaled((lines, columns), most))
        return concat_sources(
            [self._first, concat_sources([scaled, newline_sources(len(scaled.source_index), 1)], axis=1).flat()]
        )

    def _frames(self, count: int) -> EmbedSources:
        """The rows of a video: every frame at half its lines and columns, and a newline."""
        half, patches = math.ceil(self.grid_size / 2), self.grid_size**2
        frame = resampled_sources(np.arange(patches).reshape(self.grid_size, self.grid_size), half, half).flat()
        frames = [
            EmbedSources(frame.source_index + first, frame.source_weight)
            for first in range(0, count * patches, patches)
        ]
        return concat_sources([*frames, newline_sources(1)])

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One image or video token per row of each item; RequestError when placeholders and items do not match."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
