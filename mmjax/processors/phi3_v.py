"""Phi-3.5-vision: an image as a grid of square crops and a global view, with separators between rows.

The canvas that is cut into crops is as large as `num_crops` squares allow at the image's aspect, padded with white. The
global view is that canvas resized, by a linear interpolation that the device computes from the crops.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.hf_config import image_options
from mmjax.processors import base
from mmjax.processors.base import (
    Encode,
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    expand_placeholders,
    item_of_any_length,
    linear_positions,
    placeholder_mismatch,
    positive_int,
)
from mmjax.processors.image_options import allow_only, edges, refused
from mmjax.processors.resize import image_size, resize
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

DEFAULT_CROPS = 4  # where no file says how many
MAX_CROPS = 128  # bounds what one request can allocate
CLIP_IMAGE_SIZE, CLIP_PATCH_SIZE = 336, 14  # of the tower that the published config only names
IMAGE_ID = 32044  # of <|image|> as published, where there is no tokenizer
NEWLINE, DIVIDER = -1, -2  # in patch_index: the model's two learned separators
TAG = re.compile(r"<\|image_(\d+)\|>")


def crop_fields(crop_size: int, embeds_per_edge: int) -> tuple[FeatureField, ...]:
    """One square crop or global view per input; the pixels of a view are zero, and the device computes them.

    crop_coords: a crop's (row, rows, column, columns) in its image. view_index: the input that is its image's global
    view, -1 for that view itself. patch_index: which square of 2 x 2 patches of all the item's inputs an embedding is
    made from, or NEWLINE or DIVIDER.
    """
    return (
        FeatureField("pixels", (3, crop_size, crop_size), "uint8"),
        FeatureField("crop_coords", (4,), pad=1),
        FeatureField("view_index", pad=-1, index_stride=1),
        FeatureField("patch_index", pad=NEWLINE, axis="embeds", index_stride=embeds_per_edge**2),
    )


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`. `tokenize` represents image tag k of the text as the token -1 - k."""

    mm_limits: Mapping[str, int | None] = {"image": None}
    placeholder_token: Mapping[str, str] = {"image": "<|image_"}
    placeholder_text: Mapping[str, str] = {"image": "<|image_{i}|>"}
    accepted_kwargs = frozenset({"num_crops"})
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds",)}
    item_for_embeds = item_of_any_length
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        vision = config["img_processor"].get("vision_config", {})
        self.crop_size: int = vision.get("image_size", CLIP_IMAGE_SIZE)
        self.embeds_per_edge = self.crop_size // vision.get("patch_size", CLIP_PATCH_SIZE) // 2
        options = image_options(files)
        allow_only(
            options,
            "an image is resized bilinearly to fill num_crops squares and padded with white, as published",
            do_resize=True,
            resample=Image.Resampling.BILINEAR,
            do_center_crop=False,
            do_pad=True,
        )
        if (size := edges(options, "size", square=True)) and set(size.values()) != {self.crop_size}:
            raise refused(options, "size", f"a crop has the {self.crop_size} pixels of the vision tower")
        self.num_crops: int = options.get("num_crops", DEFAULT_CROPS)
        self.global_first = config["embd_layer"]["hd_transform_order"] == "glb_sub"
        found = tokenizer.id_of("<|image|>") if tokenizer else IMAGE_ID
        self.image_id = IMAGE_ID if found is None else found

    def _fit(self, height: int, width: int, kwargs: ProcessorKwargs) -> tuple[int, int]:
        """(height, width) of the resized image; its longer edge is a multiple of the crop's."""
        crops = positive_int(kwargs, "num_crops") if "num_crops" in kwargs else self.num_crops
        if crops > MAX_CROPS:
            raise RequestError(
                f"mm_processor_kwargs: num_crops must be at most {MAX_CROPS}, got {crops}.", "bad_kwargs"
            )
        short, long = sorted((height, width))
        ratio = long / short
        scale = max(s for s in range(1, crops + 1) if s == 1 or s * math.ceil(s / ratio) <= crops)
        edges = max(1, int(scale * self.crop_size / ratio)), scale * self.crop_size
        return edges if width >= height else edges[::-1]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.crop_size), -(-width // self.crop_size)

    def _num_embeds(self, rows: int, columns: int) -> int:
        """Tokens of a grid of crops: its lines and those of the view, a separator after each line and one between."""
        return (rows * columns + 1) * self.embeds_per_edge**2 + 1 + (rows + 1) * self.embeds_per_edge

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width)."""
        return self._num_embeds(*self._grid(*self._fit(size[0], size[1], kwargs)))

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An image as `crop_fields`: the global view, left blank for the device, then the crops row by row."""
        canvas = self._canvas(media, *self._fit(*image_size(media), kwargs))
        side = self.crop_size
        rows, columns = canvas.shape[0] // side, canvas.shape[1] // side
        count = rows * columns + 1
        pixels = np.zeros((count, 3, side, side), np.uint8)
        pixels[1:].reshape(rows, columns, 3, side, side)[:] = canvas.reshape(rows, side, columns, side, 3).transpose(
            0, 2, 4, 1, 3
        )
        crop_coords = np.ones((count, 4), np.int32)
        row, column = np.indices((rows, columns)).reshape(2, -1)
        crop_coords[1:] = np.stack([row, np.full_like(row, rows), column, np.full_like(row, columns)], axis=1)
        view_index = np.zeros(count, np.int32)
        view_index[0] = -1
        features = {
            "pixels": pixels,
            "crop_coords": crop_coords,
            "view_index": view_index,
            "patch_index": self._patch_index(rows, columns),
        }
        return MediaItem(modality, features, count, self._num_embeds(rows, columns), grid=(rows, columns))

    def _canvas(self, media: Any, height: int, width: int) -> np.ndarray:
        """uint8 [H, W, 3]: the image resized to (height, width), with white above and below, or beside if upright."""
        image = Image.fromarray(media) if isinstance(media, np.ndarray) else media
        upright = image.height > image.width
        if upright:  # in the published order of steps, which rounding depends on
            image = image.transpose(Image.Transpose.TRANSPOSE)
            height, width = width, height
        resized = resize(image, height, width, Image.Resampling.BILINEAR)
        gap = -height % self.crop_size
        canvas = np.pad(resized, [(gap // 2, gap - gap // 2), (0, 0), (0, 0)], constant_values=255)
        return canvas.transpose(1, 0, 2) if upright else canvas

    def _patch_index(self, rows: int, columns: int) -> np.ndarray:
        """int32 [num_embeds]: see `crop_fields`."""
        edge = self.embeds_per_edge
        squares = np.arange((rows * columns + 1) * edge**2, dtype=np.int32).reshape(-1, edge, edge)
        crops = squares[1:].reshape(rows, columns, edge, edge).transpose(0, 2, 1, 3).reshape(rows * edge, -1)
        parts = [np.pad(lines, [(0, 0), (0, 1)], constant_values=NEWLINE).ravel() for lines in (crops, squares[0])]
        first, second = parts[::-1] if self.global_first else parts
        return np.concatenate([first, np.array([DIVIDER], np.int32), second])

    def tokenize(self, text: str, encode: Encode) -> list[int]:
        """The text between two image tags is tokenized by itself, with special tokens at its start, in chats too (as
        published)."""
        first, *rest = TAG.split(text)
        if not rest:
            return encode(text)
        tokens = encode(first, add_special_tokens=True)
        for number, part in zip(rest[::2], rest[1::2], strict=True):
            tokens += [-1 - int(number), *encode(part, add_special_tokens=True)]
        return tokens

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """Tag k becomes as many image tokens as image k has embeddings; without tags, image tokens stand for images in
        order. RequestError unless every image has one tag."""
        images = items.get("image", ())
        tags = [-1 - token for token in token_ids if token < 0]
        placeholder_ids = {"image": self.image_id}
        if not tags:
            return expand_placeholders(token_ids, items, placeholder_ids, self.placeholder_text)
        loose = sum(token == self.image_id for token in token_ids)
        if not loose and len(tags) == len(images) != len(set(tags) & set(range(1, len(images) + 1))):
            raise RequestError(
                f"Expected there to be {len(images)} prompt placeholders corresponding to {len(images)} image items, "
                f"numbered from 1 and each number once, but instead found "
                f"{', '.join(self.placeholder_text['image'].format(i=tag) for tag in tags)}.",
                "placeholder_mismatch",
            )
        if loose or len(tags) != len(images):
            raise placeholder_mismatch("image", len(images), len(tags) + loose, self.placeholder_text["image"])
        out: list[int] = []
        spans: list[PlaceholderSpan] = []
        for token in token_ids:
            if token < 0:
                spans.append(PlaceholderSpan(len(out), images[-token - 2].num_embeds, "image", -token - 2))
                out.extend([self.image_id] * spans[-1].length)
            else:
                out.append(token)
        return ExpandedPrompt(out, spans)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
