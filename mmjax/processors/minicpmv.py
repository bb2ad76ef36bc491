"""MiniCPM-V 2.6: pictures as a whole and in slices, frames of a video as a whole; the same number of tokens each.

A placeholder becomes tags and runs of placeholder tokens, so that one item has several spans. The placeholder is text,
whose brackets the tokenizer may have joined with what stands beside them: so prompts are spelled out, cut and tokenised
again, a piece between two special tokens at a time.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.multimodal.video import Video
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    linear_positions,
    placeholder_mismatch,
)
from mmjax.processors.slices import Slicer
from mmjax.processors.spelling import SpelledPrompt
from mmjax.processors.vision import image_size, positive_int
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

TAGS = {  # preprocessor_config.json: what it is there, and what it is unless that file says otherwise
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "unk": "<unk>",
}


class Processor:
    """See `mmjax.processors.base.Processor`.

    `max_slice_nums`: most slices of an image. `use_image_id`: whether images are numbered.
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
        self.tokenizer, prepare = tokenizer, files["preprocessor_config.json"]
        vision, self.queries = config["vision_config"], config["query_num"]
        self.slicer = Slicer(
            slice_size=prepare["scale_resolution"],
            patch=prepare["patch_size"],
            position_grid=vision["image_size"] // vision["patch_size"],
        )
        self.max_slices: int = prepare["max_slice_nums"] if prepare.get("slice_mode", True) else 1
        self.numbered: bool = prepare.get("use_image_id", True)
        self.tags = {name: self._tag(prepare.get(name, text)) for name, text in TAGS.items()}
        self.query_run = [self.tags["unk"]] * self.queries
        spelled = {
            modality: SpelledPrompt(tokenizer, self._encode(text)).text
            for modality, text in self.placeholder_text.items()
        }
        self.pattern = re.compile("|".join(f"(?P<{modality}>{re.escape(text)})" for modality, text in spelled.items()))

    def _tag(self, text: str) -> int:
        found = self.tokenizer.id_of(text)
        if found is None:
            raise ValueError(f"tokenizer.json has no token {text!r}, which preprocessor_config.json puts around images")
        return found

    # --- items

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Placeholder tokens of an image (height, width) or a video (frames, height, width)."""
        if modality == "video":
            return size[0] * self.queries
        grid = self.slicer.grid(size[-2], size[-1], self._most(kwargs))
        return self.queries * (1 + (math.prod(grid) if grid else 0))

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """An RGB image or uint8 [H, W, 3], or a Video -> pixels u8[U, values], position i32[U], place i32[U, 2],
        segment i32[U]; grid: (rows, columns, whether numbered), no rows when there is but the whole, or (frames,)."""
        views: list[np.ndarray] = []
        shape: tuple[int, ...]
        if isinstance(media, Video):
            for frame in media.frames:
                views += self.slicer.slices(Image.fromarray(frame), None)
            shape = (len(views),)
        else:
            grid = self.slicer.grid(*image_size(media), self._most(kwargs))
            views = self.slicer.slices(Image.fromarray(media) if isinstance(media, np.ndarray) else media, grid)
            shape = (*(grid or (0, 0)), int(kwargs.get("use_image_id", self.numbered)))
        places = [self.slicer.patch_coords(view) for view in views]
        features = {
            "pixels": np.concatenate([self.slicer.patches(view) for view in views]),
            "position_ids": np.concatenate([position for position, _ in places]),
            "patch_coords": np.concatenate([place for _, place in places]),
            "segment_ids": np.repeat(np.arange(len(views), dtype=np.int32), [len(place) for _, place in places]),
        }
        return MediaItem(
            modality, features, num_inputs=len(features["pixels"]), num_embeds=len(views) * self.queries, grid=shape
        )

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item of an image (width, height), or of a video of so many rows, without its rows."""
        if len(size) != (2 if modality == "image" else 1) or (modality == "video" and size[0] % self.queries):
            fix = "a video needs a multiple of" if modality == "video" else "`image_sizes` are (width, height), at"
            raise RequestError(f"{fix} {self.queries} rows to a view, got {list(size)}.", "bad_embeds")
        if modality == "video":
            return MediaItem(modality, {}, num_inputs=0, num_embeds=size[0], grid=(size[0] // self.queries,))
        grid = self.slicer.grid(size[1], size[0], self._most(kwargs)) or (0, 0)
        shape = (*grid, int(kwargs.get("use_image_id", self.numbered)))
        return MediaItem(modality, {}, num_inputs=0, num_embeds=self.queries * (1 + math.prod(grid)), grid=shape)

    def _most(self, kwargs: ProcessorKwargs) -> int:
        return positive_int(kwargs, "max_slice_nums") if "max_slice_nums" in kwargs else self.max_slices

    # --- prompts

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """Tags and runs of placeholder tokens for every placeholder, or the spans of a prompt that has them already.

        RequestError when placeholders and items do not match.
        """
        prompt = SpelledPrompt(self.tokenizer, token_ids)
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
            written = self._written(modality, index, items[modality][index])
            spans += self._placed(modality, index, [len(out) + start for start in self._runs(written)])
            out += written
            done = match.end()
        return ExpandedPrompt(out + prompt.tokens(prompt.text[done:]), spans)

    def _written(self, modality: str, index: int, item: MediaItem) -> list[int]:
        """What stands for an item in the prompt: a run for the whole, then the slices, a line for every row of them."""
        tags = self.tags
        picture = [tags["im_start"], *self.query_run, tags["im_end"]]
        if modality == "video":
            return picture * item.grid[0]
        rows, columns, numbered = item.grid
        number = [tags["im_id_start"], *self._encode(str(index)), tags["im_id_end"]] if numbered else []
        line = [tags["slice_start"], *self.query_run, tags["slice_end"]] * columns
        lines = [*line, *self._encode("\n")] * (rows - 1) + line if rows else []
        return number + picture + lines

    def _runs(self, tokens: Sequence[int]) -> list[int]:
        """Where the runs of placeholder tokens begin."""
        opening, count = (self.tags["im_start"], self.tags["slice_start"]), self.queries
        starts = (at + 1 for at, token in enumerate(tokens) if token in opening)
        return [start for start in starts if list(tokens[start : start + count]) == self.query_run]

    def _placed(self, modality: str, index: int, starts: Sequence[int]) -> list[PlaceholderSpan]:
        return [
            PlaceholderSpan(at, self.queries, modality, index, view * self.queries) for view, at in enumerate(starts)
        ]

    def _spans(self, tokens: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> list[PlaceholderSpan]:
        """The spans of a prompt that was expanded before. What is numbered is an image; else videos come first."""
        starts, spans = self._runs(tokens), list[PlaceholderSpan]()
        left = {modality: list(range(len(items.get(modality, ())))) for modality in self.mm_limits}
        while starts:
            numbered = starts[0] >= 2 and tokens[starts[0] - 2] == self.tags["im_id_end"]
            modality = "video" if left["video"] and not numbered else "image"
            views = items[modality][left[modality][0]].num_embeds // self.queries if left[modality] else math.inf
            if views > len(starts):
                break
            spans += self._placed(modality, left[modality].pop(0), starts[: int(views)])
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
