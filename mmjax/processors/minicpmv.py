"""MiniCPM-V 2.6: images as a whole and in slices, frames of a video as a whole; the same number of tokens each.

A placeholder becomes tags and runs of placeholder tokens, so that an item has several spans. The placeholder is plain
text, whose brackets the tokenizer may have merged with the text beside them: so prompts are detokenized, split at the
placeholders and tokenized again, one piece between two special tokens at a time.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.hf_config import image_options
from mmjax.multimodal.video import Video
from mmjax.processors import base
from mmjax.processors.arange import arange32
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    linear_positions,
    placeholder_mismatch,
    positive_int,
)
from mmjax.processors.image_options import allow_only, tower_sizes
from mmjax.processors.resize import BICUBIC, image_size, resize
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

TAGS = {  # by key of preprocessor_config.json: the token where that file does not name one
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "unk": "<unk>",
}

Grid = tuple[int, int]
AREA_FACTOR = 2  # a slice has at least 1 / 2 and at most 2 times the patches of a square one


def patch_fields(patch_dim: int) -> tuple[FeatureField, ...]:
    """One patch per input, slice by slice. position_ids: its row of the tower's position table. patch_coords: its row
    and column within its slice. segment_ids: its slice."""
    return (
        FeatureField("pixels", (patch_dim,), "uint8"),
        FeatureField("position_ids"),
        FeatureField("patch_coords", (2,)),
        FeatureField("segment_ids", pad=-1, is_segment_id=True),
    )


class Slicer(NamedTuple):
    """Cuts images. slice_size: edge of a square slice, in pixels. patch: edge of a patch. position_grid: patches along
    an edge of the tower's position table."""

    slice_size: int
    patch: int
    position_grid: int

    def grid(self, height: int, width: int, max_slices: int) -> Grid | None:
        """(rows, columns) of slices, in about the image's aspect; None for an image that is not sliced."""
        wanted = min(math.ceil(height * width / self.slice_size**2), max_slices)
        if wanted <= 1:
            return None
        counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slices]
        grids = [(n // columns, columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
        aspect = math.log(width / height)
        return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))

    def slices(self, image: Image.Image, grid: Grid | None) -> list[np.ndarray]:
        """The whole image and, row by row, its slices: uint8 [height, width, 3] each."""
        width, height = image.size
        fitted = self._fit(height, width, grow=grid is None)
        out = [resize(image, *fitted)]
        if grid is not None:
            cell = self.cell(height, width, grid)
            resized = resize(image, cell[0] * grid[0], cell[1] * grid[1])
            cells = resized.reshape(grid[0], cell[0], grid[1], cell[1], 3).swapaxes(1, 2)
            out.extend(cells.reshape(-1, *cell, 3))
        return out

    def cell(self, height: int, width: int, grid: Grid) -> Grid:
        """(height, width) of each slice of a grid."""
        even = (_nearest(edge, count) / count for edge, count in zip((height, width), grid, strict=True))
        return self._fit(*even, grow=True)

    def _fit(self, height: float, width: float, *, grow: bool) -> Grid:
        """(height, width) in multiples of a patch, of the same aspect and about slice_size squared in area; a smaller
        image keeps its size unless `grow`."""
        if grow or height * width > self.slice_size**2:
            aspect = width / height
            height = int(self.slice_size / math.sqrt(aspect))
            width = int(height * aspect)
        fitted = _nearest(height, self.patch), _nearest(width, self.patch)
        patches, area = math.prod(fitted) // self.patch**2, (self.slice_size // self.patch) ** 2
        # what the encoder has room for; no image within about 1000 : 1 is refused
        if not area // AREA_FACTOR <= patches <= AREA_FACTOR * area:
            raise RequestError(
                f"an image of these proportions would be scaled to {fitted[1]}x{fitted[0]}, which is too thin. "
                "Crop or pad the image.",
                "aspect_ratio",
            )
        return fitted

    def patches(self, view: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] to its patches row by row: uint8 [n, 3 * patch * patch]."""
        p, (height, width) = self.patch, view.shape[:2]
        cells = view.reshape(height // p, p, width // p, p, 3).transpose(0, 2, 4, 1, 3)
        return cells.reshape(-1, 3 * p * p)

    def patch_coords(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each patch: its row of the position table int32 [n], and its (row, column) int32 [n, 2]."""
        rows, columns = view.shape[0] // self.patch, view.shape[1] // self.patch
        position = self._bucket(rows)[:, None] * self.position_grid + self._bucket(columns)
        return position.reshape(-1), np.indices((rows, columns), np.int32).reshape(2, -1).T

    def _bucket(self, count: int) -> np.ndarray:
        """int32 [count]: in which of position_grid equal parts of an edge each of `count` patches begins."""
        bounds = arange32(1 / self.position_grid, 1.0, 1 / self.position_grid)
        return np.searchsorted(bounds, arange32(0.0, 1 - 1e-6, 1 / count), side="right").astype(np.int32)


def _nearest(length: float, unit: int) -> int:
    return max(round(length / unit), 1) * unit


FIRST_SURROGATE = 0xD800  # lone surrogates stand for special tokens: no text can hold them
SURROGATE = re.compile("([\ud800-\udfff])")


class DetokenizedPrompt:
    """A prompt as text, with a lone surrogate for each special token, that can be tokenized again in parts.

    The tokenizer never looks across a special token, so that pieces between two of them can be tokenized alone; pieces
    that were not split keep their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]):
        self.tokenizer = tokenizer
        self.specials = sorted(tokenizer.special_ids)
        surrogates = {token: chr(FIRST_SURROGATE + number) for number, token in enumerate(self.specials)}
        self._pieces: dict[str, list[int]] = {}
        out, piece = [], list[int]()
        for token in (*tokens, None):
            if token is not None and token not in surrogates:
                piece.append(token)
                continue
            if piece:
                out.append(tokenizer.decode(piece))
                self._pieces[out[-1]] = piece
            if token is not None:
                out.append(surrogates[token])
            piece = []
        self.text = "".join(out)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a part of `text`."""
        out: list[int] = []
        for piece in filter(None, SURROGATE.split(text)):
            if SURROGATE.match(piece):
                out.append(self.specials[ord(piece) - FIRST_SURROGATE])
            else:
                out += self._pieces.get(piece) or self.tokenizer.encode(piece, add_special_tokens=False)
        return out


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`.

    max_slice_nums: the most slices of an image. use_image_id: whether images are numbered in the prompt. The grid of an
    image: (rows, columns, whether it is numbered), with 0 rows where it is not sliced; of a video: (frames,).
    """

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None}
    placeholder_text: Mapping[str, str] = {"image": "(<image>./</image>)", "video": "(<video>./</video>)"}
    placeholder_token: Mapping[str, str] = placeholder_text
    accepted_kwargs = frozenset({"max_slice_nums", "use_image_id"})
    embed_fields: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds", "image_sizes"), "video": ("video_embeds",)}
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise ValueError("MiniCPM-V needs its tokenizer: only there stand the ids of the tokens around images")
        self.tokenizer, prepare = tokenizer, image_options(files)
        vision, self.num_queries = config["vision_config"], config["query_num"]
        rule = "images are cut into slices of about scale_resolution squared, which are resized bicubically"
        allow_only(prepare, rule, do_resize=True, resample=BICUBIC, do_center_crop=False, do_pad=False)
        tower_sizes(prepare, patch_size=vision["patch_size"])
        self.slicer = Slicer(
            slice_size=prepare["scale_resolution"],
            patch=prepare["patch_size"],
            position_grid=vision["image_size"] // vision["patch_size"],
        )
        self.max_slices: int = prepare["max_slice_nums"] if prepare.get("slice_mode", True) else 1
        self.use_image_id: bool = prepare.get("use_image_id", True)
        self.tags = {name: self._tag(prepare.get(name, text)) for name, text in TAGS.items()}
        self.query_run = [self.tags["unk"]] * self.num_queries
        texts = {
            modality: DetokenizedPrompt(tokenizer, self._encode(text)).text
            for modality, text in self.placeholder_text.items()
        }
        self.pattern = re.compile("|".join(f"(?P<{modality}>{re.escape(text)})" for modality, text in texts.items()))

    def _tag(self, text: str) -> int:
        found = self.tokenizer.id_of(text)
        if found is None:
            raise ValueError(f"tokenizer.json has no token {text!r}, which preprocessor_config.json puts around images")
        return found

    # -- items -------------------------------------------------------------------------------------------------------

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Placeholder tokens of an image (height, width) or a video (frames, height, width)."""
        if modality == "video":
            return size[0] * self.num_queries
        grid = self.slicer.grid(size[-2], size[-1], self._max_slices(kwargs))
        return self.num_queries * (1 + (math.prod(grid) if grid else 0))

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An image or a video, as `patch_fields`."""
        views: list[np.ndarray] = []
        if isinstance(media, Video):
            for frame in media.frames:
                views += self.slicer.slices(Image.fromarray(frame), None)
            item_grid: tuple[int, ...] = (len(views),)
        else:
            grid = self.slicer.grid(*image_size(media), self._max_slices(kwargs))
            views = self.slicer.slices(Image.fromarray(media) if isinstance(media, np.ndarray) else media, grid)
            item_grid = self._image_grid(grid, kwargs)
        positions = [self.slicer.patch_coords(view) for view in views]
        features = {
            "pixels": np.concatenate([self.slicer.patches(view) for view in views]),
            "position_ids": np.concatenate([ids for ids, _ in positions]),
            "patch_coords": np.concatenate([coords for _, coords in positions]),
            "segment_ids": np.repeat(np.arange(len(views), dtype=np.int32), [len(ids) for ids, _ in positions]),
        }
        num_inputs, num_embeds = len(features["pixels"]), len(views) * self.num_queries
        return MediaItem(modality, features, num_inputs, num_embeds, item_grid)

    def _image_grid(self, grid: Grid | None, kwargs: ProcessorKwargs) -> tuple[int, ...]:
        return (*(grid or (0, 0)), int(kwargs.get("use_image_id", self.use_image_id)))

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item of an image (width, height), or of a video of so many embeddings, without them."""
        if len(size) != (2 if modality == "image" else 1) or (modality == "video" and size[0] % self.num_queries):
            fix = "a video needs a multiple of" if modality == "video" else "`image_sizes` are (width, height), at"
            raise RequestError(f"{fix} {self.num_queries} rows to a view, got {list(size)}.", "bad_embeds")
        if modality == "video":
            return MediaItem(modality, {}, num_inputs=0, num_embeds=size[0], grid=(size[0] // self.num_queries,))
        grid = self.slicer.grid(size[1], size[0], self._max_slices(kwargs))
        num_embeds = self.num_queries * (1 + (math.prod(grid) if grid else 0))
        return MediaItem(modality, {}, num_inputs=0, num_embeds=num_embeds, grid=self._image_grid(grid, kwargs))

    def _max_slices(self, kwargs: ProcessorKwargs) -> int:
        return positive_int(kwargs, "max_slice_nums") if "max_slice_nums" in kwargs else self.max_slices

    # -- prompts -----------------------------------------------------------------------------------------------------

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """Tags and runs of placeholder tokens for every placeholder, or the spans of a prompt that has them already."""
        prompt = DetokenizedPrompt(self.tokenizer, token_ids)
        found = list(self.pattern.finditer(prompt.text))
        if not found:
            return ExpandedPrompt(list(token_ids), self._spans(token_ids, items))
        for modality in self.mm_limits:
            count, expected = sum(match.lastgroup == modality for match in found), len(items.get(modality, ()))
            if count != expected:
                raise placeholder_mismatch(modality, expected, count, self.placeholder_text[modality])
        out: list[int] = []
        spans: list[PlaceholderSpan] = []
        done, numbers = 0, {modality: itertools.count() for modality in self.mm_limits}
        for match in found:
            modality = str(match.lastgroup)
            index = next(numbers[modality])
            out += prompt.tokens(prompt.text[done : match.start()])
            expanded = self._expand(index, items[modality][index])
            spans += self._spans_at(modality, index, [len(out) + start for start in self._runs(expanded)])
            out += expanded
            done = match.end()
        return ExpandedPrompt(out + prompt.tokens(prompt.text[done:]), spans)

    def _expand(self, index: int, item: MediaItem) -> list[int]:
        """The tokens of an item: a run for the whole image, then its slices, a line for every row of them."""
        tags = self.tags
        whole = [tags["im_start"], *self.query_run, tags["im_end"]]
        if item.modality == "video":
            return whole * item.grid[0]
        rows, columns, numbered = item.grid
        number = [tags["im_id_start"], *self._encode(str(index)), tags["im_id_end"]] if numbered else []
        line = [tags["slice_start"], *self.query_run, tags["slice_end"]] * columns
        lines = [*line, *self._encode("\n")] * (rows - 1) + line if rows else []
        return number + whole + lines

    def _runs(self, tokens: Sequence[int]) -> list[int]:
        """The starts of the runs of placeholder tokens."""
        opening, count = (self.tags["im_start"], self.tags["slice_start"]), self.num_queries
        starts = (at + 1 for at, token in enumerate(tokens) if token in opening)
        return [start for start in starts if list(tokens[start : start + count]) == self.query_run]

    def _spans_at(self, modality: str, index: int, starts: Sequence[int]) -> list[PlaceholderSpan]:
        return [
            PlaceholderSpan(start, self.num_queries, modality, index, view * self.num_queries)
            for view, start in enumerate(starts)
        ]

    def _spans(self, tokens: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> list[PlaceholderSpan]:
        """The spans of a prompt that is expanded already. A numbered item is an image; others are videos first."""
        starts, spans = self._runs(tokens), list[PlaceholderSpan]()
        left = {modality: list(range(len(items.get(modality, ())))) for modality in self.mm_limits}
        while starts:
            numbered = starts[0] >= 2 and tokens[starts[0] - 2] == self.tags["im_id_end"]
            modality = "video" if left["video"] and not numbered else "image"
            views = items[modality][left[modality][0]].num_embeds // self.num_queries if left[modality] else math.inf
            if views > len(starts):
                break
            spans += self._spans_at(modality, left[modality].pop(0), starts[: int(views)])
            del starts[: int(views)]
        for modality, missing in left.items():
            expected, surplus = len(items.get(modality, ())), bool(starts) and modality == "image"
            if missing or surplus:
                raise placeholder_mismatch(
                    modality, expected, expected - len(missing) + surplus, self.placeholder_text[modality]
                )
        return spans

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
