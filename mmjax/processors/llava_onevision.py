"""LLaVA-OneVision: an image as a whole and in crops at about its own resolution; videos frame by frame.

The patches of the crops are put together to the image again, without the margins that made it fit; above nine crops'
worth it is scaled down bilinearly. Every row of patches ends with a newline, and the whole image comes first. The
frames of a video are scaled to half, and a newline ends it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.hf_config import HfConfig, canonical, image_options, video_options
from mmjax.multimodal.video import Video
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
from mmjax.processors.image_options import (
    allow_only,
    edges,
    flag,
    padded_to_square,
    refused,
    resampling,
    same_normalization,
)
from mmjax.processors.resize import image_size, resize
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

SLACK = 1.1  # an image is scaled down only where its edges are longer than wanted by this factor
Grid = tuple[int, int]
NEWLINE = -1  # in place of a patch: the embedding is the model's newline


def crop_fields(crop_size: int, patches_per_crop: int) -> tuple[FeatureField, ...]:
    """One square crop per input. Embedding e is the sum over j of source_weight[e, j] times patch source_index[e, j] of
    the item, or the newline."""
    return (
        FeatureField("pixels", (3, crop_size, crop_size), "uint8"),
        FeatureField("source_index", (4,), pad=NEWLINE, axis="embeds", index_stride=patches_per_crop),
        FeatureField("source_weight", (4,), "float32", axis="embeds"),
    )


class WeightedPatches(NamedTuple):
    """What embeddings are made from: see `crop_fields`. The shape of the grid of embeddings leads."""

    source_index: np.ndarray  # int32 [..., 4]
    source_weight: np.ndarray  # float32 [..., 4]

    def flat(self) -> "WeightedPatches":
        """With one leading axis."""
        return WeightedPatches(self.source_index.reshape(-1, 4), self.source_weight.reshape(-1, 4))


def concat(parts: Sequence[WeightedPatches], axis: int = 0) -> WeightedPatches:
    """Parts joined along a leading axis."""
    return WeightedPatches(*(np.concatenate(arrays, axis=axis) for arrays in zip(*parts, strict=True)))


def single_patches(patches: np.ndarray) -> WeightedPatches:
    """Embeddings that are one patch each: int [...] -> [..., 4]."""
    source_index = np.repeat(patches.astype(np.int32)[..., None], 4, axis=-1)
    source_weight = np.zeros(source_index.shape, np.float32)
    source_weight[..., 0] = 1
    return WeightedPatches(source_index, source_weight)


def newlines(*shape: int) -> WeightedPatches:
    """A grid of newlines."""
    return single_patches(np.full(shape, NEWLINE))


def resized_patches(patches: np.ndarray, height: int, width: int) -> WeightedPatches:
    """A grid of patches int [h, w] scaled bilinearly to [height, width, 4], by the centers of its cells and without
    antialiasing."""
    if patches.shape == (height, width):
        return single_patches(patches)
    (top, low), (left, right) = _neighbors(patches.shape[0], height), _neighbors(patches.shape[1], width)
    corners = [(y, x) for y in (top, low) for x in (left, right)]
    source_index = np.stack([patches[np.ix_(y[0], x[0])] for y, x in corners], axis=-1)
    source_weight = [np.outer(y[1], x[1]) for y, x in corners]
    return WeightedPatches(source_index.astype(np.int32), np.stack(source_weight, axis=-1).astype(np.float32))


def _neighbors(have: int, want: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each of `want` cells, the two of `have` around its center: (index, weight) of each."""
    at = np.maximum((np.arange(want) + 0.5) * (have / want) - 0.5, 0)
    first = at.astype(np.int32)
    fraction = (at - first).astype(np.float32)
    return (first, 1 - fraction), (np.minimum(first + 1, have - 1), fraction)


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`.

    vision_aspect_ratio: "anyres_max_N", which scales images down above N crops' worth of embeddings, or "pad": one crop
    only, the image padded to a square, as transformers prepares several images of one prompt.
    """

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None}
    placeholder_token: Mapping[str, str] = {"image": "<image>", "video": "<video>"}
    placeholder_text: Mapping[str, str] = placeholder_token
    accepted_kwargs = frozenset({"vision_aspect_ratio"})
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",), "video": ("video_embeds",)}
    item_for_embeds = item_of_any_length
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        config = canonical(config)
        vision = config["vision_config"]
        self.placeholder_ids = {"image": config["image_token_id"], "video": config["video_token_id"]}
        self.crop_size: int = vision["image_size"]
        self.grid_size = self.crop_size // vision["patch_size"]
        self.aspect: str = config.get("vision_aspect_ratio", "anyres_max_9")
        self.grid_pinpoints = [(height, width) for height, width in config["image_grid_pinpoints"]]
        images, videos = image_options(files), video_options(files)
        self.pad_color = tuple(int(255 * mean) for mean in images["image_mean"])
        same_normalization(images, videos)
        self.resample, self.video_resample = resampling(images), resampling(videos)
        self.do_resize, self.video_do_resize = (flag(options, "do_resize", True) for options in (images, videos))
        for options in (images, videos):
            self._check(options)

    def _check(self, options: HfConfig) -> None:
        """ValueError for options that make other crops than the tower takes, or the crops of another grid."""
        allow_only(options, "crops and frames are resized, never cropped", do_center_crop=False)
        for name in ("size", "crop_size"):
            size = edges(options, name, square=True)
            if size and set(size.values()) != {self.crop_size}:
                width, height = (size.get(edge, size.get("shortest_edge")) for edge in ("width", "height"))
                raise ValueError(
                    f"{options.origin()}: {name} makes crops of {width}x{height}, but the vision tower of config.json "
                    f"takes {self.crop_size}x{self.crop_size}: the two files belong to different checkpoints"
                )
        grid = options.get("image_grid_pinpoints")
        if grid is not None and [tuple(canvas) for canvas in grid] != self.grid_pinpoints:
            raise refused(options, "image_grid_pinpoints", "those of config.json differ, and embeddings follow them")

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width) or a video (frames, height, width)."""
        if modality == "video":
            return size[0] * math.ceil(self.grid_size / 2) ** 2 + 1
        max_crops = self._max_crops(kwargs)
        if max_crops is None:
            return self.grid_size**2 + 1
        height, width = size[-2:]
        height, width = self._scaled(self._unpadded(height, width, self._canvas(height, width)), max_crops)
        return self.grid_size**2 + height * (width + 1)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An image or a video, as `crop_fields`."""
        if isinstance(media, Video):
            crops = [self._resized(frame, self.video_resample, self.video_do_resize) for frame in media.frames]
            sources = self._video_sources(len(crops))
        elif (max_crops := self._max_crops(kwargs)) is None:
            crops, sources = [self._padded(media)], concat([self._first_crop, newlines(1)])
        else:
            crops, sources = self._crops(media), self._image_sources(image_size(media), max_crops)
        features = {"pixels": np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2)), **sources._asdict()}
        return MediaItem(modality, features, num_inputs=len(crops), num_embeds=len(sources.source_index))

    # -- pixels ------------------------------------------------------------------------------------------------------

    def _canvas(self, height: int, width: int) -> Grid:
        """The (height, width) of image_grid_pinpoints on which most of the image's pixels fit, then the smallest."""

        def rank(canvas: Grid) -> Grid:
            scale = min(canvas[1] / width, canvas[0] / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, -canvas[0] * canvas[1]

        return max(self.grid_pinpoints, key=rank)

    def _crops(self, image: Any) -> list[np.ndarray]:
        """The whole image, stretched to a square, and the crops row by row of the image centered on its canvas."""
        (height, width), size = image_size(image), self.crop_size
        canvas = self._canvas(height, width)
        scale = min(canvas[1] / width, canvas[0] / height)
        if canvas[1] / width < canvas[0] / height:
            fitted = min(math.ceil(height * scale), canvas[0]), canvas[1]
        else:
            fitted = canvas[0], min(math.ceil(width * scale), canvas[1])
        padded = np.zeros((*canvas, 3), np.uint8)
        top, left = ((edge - inner) // 2 for edge, inner in zip(canvas, fitted, strict=True))
        padded[top : top + fitted[0], left : left + fitted[1]] = resize(image, *fitted, self.resample)
        cells = padded.reshape(canvas[0] // size, size, canvas[1] // size, size, 3).swapaxes(1, 2)
        return [resize(image, size, size, self.resample), *cells.reshape(-1, size, size, 3)]

    def _padded(self, image: Any) -> np.ndarray:
        """The image on a square of the mean color."""
        return self._resized(padded_to_square(image, self.pad_color), self.resample, self.do_resize)

    def _resized(self, image: np.ndarray, resample: Image.Resampling, do_resize: bool) -> np.ndarray:
        """The image as one crop. RequestError for one of another size where do_resize is false."""
        size = self.crop_size
        if not do_resize and image.shape[:2] != (size, size):
            raise RequestError(
                f"do_resize is false in the model's files, so that a video frame, or one of several images padded to a "
                f"square, must have {size}x{size} pixels, got {image.shape[1]}x{image.shape[0]}.",
                "bad_image_size",
            )
        return resize(image, size, size, resample)

    # -- embeddings --------------------------------------------------------------------------------------------------

    def _max_crops(self, kwargs: ProcessorKwargs) -> int | None:
        """Crops' worth of embeddings above which an image is scaled down; None: one padded crop only."""
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

    def _unpadded(self, height: int, width: int, canvas: Grid) -> Grid:
        """Rows and columns of patches on the canvas without the margins (rounded to patches as published)."""
        rows, columns = (edge // self.crop_size * self.grid_size for edge in canvas)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return rows, columns

    def _scaled(self, grid: Grid, max_crops: int) -> Grid:
        """Rows and columns after scaling down to `max_crops` crops' worth."""
        ratio = math.sqrt(grid[0] * grid[1] / (max_crops * self.grid_size**2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > SLACK else grid

    @property
    def _first_crop(self) -> WeightedPatches:
        """The patches of the first crop."""
        return single_patches(np.arange(self.grid_size**2))

    def _image_sources(self, size: Grid, max_crops: int) -> WeightedPatches:
        """The embeddings of an image of this size: of the whole, then row by row, each with its newline."""
        side, canvas = self.grid_size, self._canvas(*size)
        down, across = (edge // self.crop_size for edge in canvas)
        patches = np.arange(side**2, (1 + down * across) * side**2)
        patches = patches.reshape(down, across, side, side).swapaxes(1, 2).reshape(down * side, across * side)
        rows, columns = self._unpadded(*size, canvas)
        top, left = (len(patches) - rows) // 2, (len(patches[0]) - columns) // 2
        unpadded = patches[top : top + rows, left : left + columns]
        scaled = resized_patches(unpadded, *self._scaled((rows, columns), max_crops))
        with_newlines = concat([scaled, newlines(len(scaled.source_index), 1)], axis=1)
        return concat([self._first_crop, with_newlines.flat()])

    def _video_sources(self, count: int) -> WeightedPatches:
        """The embeddings of a video: every frame at half its rows and columns, and a newline."""
        half, patches = math.ceil(self.grid_size / 2), self.grid_size**2
        frame = resized_patches(np.arange(patches).reshape(self.grid_size, self.grid_size), half, half).flat()
        frames = [
            WeightedPatches(frame.source_index + first, frame.source_weight)
            for first in range(0, count * patches, patches)
        ]
        return concat([*frames, newlines(1)])

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One image or video token per embedding of each item."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
