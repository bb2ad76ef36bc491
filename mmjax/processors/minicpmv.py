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
from mmjax.processors.base import Expanded, Item, Kwargs, Span, linear_positions, mismatch
from mmjax.processors.slices import Slicer
from mmjax.processors.spelling import Spelling
from mmjax.processors.vision import image_size, pixel_count
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

    kinds: Mapping[str, int | None] = {"image": None, "video": None}
    placeholder: Mapping[str, str] = {"image": "(<image>./</image>)", "video": "(<video>./</video>)"}
    marker: Mapping[str, str] = placeholder
    accepts = frozenset({"max_slice_nums", "use_image_id"})
    embeds: Mapping[str, tuple[str, ...]] = {"image": ("image_embeds", "image_sizes"), "video": ("video_embeds",)}
    sampling_rate: int | None = None

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise ValueError("MiniCPM-V needs its tokenizer: only there stand the ids of the tokens around images")
        self.tokenizer, prepare = tokenizer, files["preprocessor_config.json"]
        vision, self.queries = config["vision_config"], config["query_num"]
        self.slicer = Slicer(
            edge=prepare["scale_resolution"],
            patch=prepare["patch_size"],
            side=vision["image_size"] // vision["patch_size"],
        )
        self.most: int = prepare["max_slice_nums"] if prepare.get("slice_mode", True) else 1
        self.numbered: bool = prepare.get("use_image_id", True)
        self.tags = {name: self._tag(prepare.get(name, text)) for name, text in TAGS.items()}
        self.run = [self.tags["unk"]] * self.queries
        spelled = {kind: Spelling(tokenizer, self._encode(text)).text for kind, text in self.placeholder.items()}
        self.pattern = re.compile("|".join(f"(?P<{kind}>{re.escape(text)})" for kind, text in spelled.items()))

    def _tag(self, text: str) -> int:
        found = self.tokenizer.id_of(text)
        if found is None:
            raise ValueError(f"tokenizer.json has no token {text!r}, which preprocessor_config.json puts around images")
        return found

    # --- items

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """Placeholder tokens of an image (height, width) or a video (frames, height, width)."""
        if kind == "video":
            return size[0] * self.queries
        grid = self.slicer.grid(size[-2], size[-1], self._most(kwargs))
        return self.queries * (1 + (math.prod(grid) if grid else 0))

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
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
        places = [self.slicer.places(view) for view in views]
        features = {
            "pixels": np.concatenate([self.slicer.patches(view) for view in views]),
            "position": np.concatenate([position for position, _ in places]),
            "place": np.concatenate([place for _, place in places]),
            "segment": np.repeat(np.arange(len(views), dtype=np.int32), [len(place) for _, place in places]),
        }
        return Item(kind, features, units=len(features["pixels"]), rows=len(views) * self.queries, grid=shape)

    def outline(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> Item:
        """The item of an image (width, height), or of a video of so many rows, without its rows."""
        if len(size) != (2 if kind == "image" else 1) or (kind == "video" and size[0] % self.queries):
            fix = "a video needs a multiple of" if kind == "video" else "`image_sizes` are (width, height), at"
            raise RequestError(f"{fix} {self.queries} rows to a view, got {list(size)}.", "bad_embeds")
        if kind == "video":
            return Item(kind, {}, units=0, rows=size[0], grid=(size[0] // self.queries,))
        grid = self.slicer.grid(size[1], size[0], self._most(kwargs)) or (0, 0)
        shape = (*grid, int(kwargs.get("use_image_id", self.numbered)))
        return Item(kind, {}, units=0, rows=self.queries * (1 + math.prod(grid)), grid=shape)

    def _most(self, kwargs: Kwargs) -> int:
        return pixel_count(kwargs, "max_slice_nums") if "max_slice_nums" in kwargs else self.most

    # --- prompts

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded:
        """Tags and runs of placeholder tokens for every placeholder, or the spans of a prompt that has them already.

        RequestError when placeholders and items do not match.
        """
        prompt = Spelling(self.tokenizer, tokens)
        found = list(self.pattern.finditer(prompt.text))
        if not found:
            return Expanded(list(tokens), self._spans(tokens, items))
        for kind in self.kinds:
            count, expected = sum(match.lastgroup == kind for match in found), len(items.get(kind, ()))
            if count != expected:
                raise mismatch(kind, expected, count, self.placeholder[kind])
        out: list[int] = []
        spans: list[Span] = []
        done, numbers = 0, {kind: itertools.count() for kind in self.kinds}
        for match in found:
            kind = str(match.lastgroup)
            index = next(numbers[kind])
            out += prompt.tokens(prompt.text[done : match.start()])
            written = self._written(kind, index, items[kind][index])
            spans += self._placed(kind, index, [len(out) + start for start in self._runs(written)])
            out += written
            done = match.end()
        return Expanded(out + prompt.tokens(prompt.text[done:]), spans)

    def _written(self, kind: str, index: int, item: Item) -> list[int]:
        """What stands for an item in the prompt: a run for the whole, then the slices, a line for every row of them."""
        tags = self.tags
        picture = [tags["im_start"], *self.run, tags["im_end"]]
        if kind == "video":
            return picture * item.grid[0]
        rows, columns, numbered = item.grid
        number = [tags["im_id_start"], *self._encode(str(index)), tags["im_id_end"]] if numbered else []
        line = [tags["slice_start"], *self.run, tags["slice_end"]] * columns
        lines = [*line, *self._encode("\n")] * (rows - 1) + line if rows else []
        return number + picture + lines

    def _runs(self, tokens: Sequence[int]) -> list[int]:
        """Where the runs of placeholder tokens begin."""
        opening, count = (self.tags["im_start"], self.tags["slice_start"]), self.queries
        starts = (at + 1 for at, token in enumerate(tokens) if token in opening)
        return [start for start in starts if list(tokens[start : start + count]) == self.run]

    def _placed(self, kind: str, index: int, starts: Sequence[int]) -> list[Span]:
        return [Span(at, self.queries, kind, index, view * self.queries) for view, at in enumerate(starts)]

    def _spans(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> list[Span]:
        """The spans of a prompt that was expanded before. What is numbered is an image; else videos come first."""
        starts, spans = self._runs(tokens), list[Span]()
        left = {kind: list(range(len(items.get(kind, ())))) for kind in self.kinds}
        while starts:
            numbered = starts[0] >= 2 and tokens[starts[0] - 2] == self.tags["im_id_end"]
            kind = "video" if left["video"] and not numbered else "image"
            views = items[kind][left[kind][0]].rows // self.queries if left[kind] else math.inf
            if views > len(starts):
                break
            spans += self._placed(kind, left[kind].pop(0), starts[: int(views)])
            del starts[: int(views)]
        for kind, missing in left.items():
            expected, surplus = len(items.get(kind, ())), bool(starts) and kind == "image"
            if missing or surplus:
                raise mismatch(kind, expected, expected - len(missing) + surplus, self.placeholder[kind])
        return spans

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(tokens))
