"""Items of which only the size is known: what embeddings in place of media make of a prompt."""

import math

from mmjax.processors.base import Item, Kwargs, Processor
from mmjax.types import RequestError


def rows_outline(self: Processor, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> Item:
    """`Processor.outline` of families whose items may have any number of rows."""
    return Item(kind, {}, units=0, rows=size[0])


def grid_outline(kind: str, size: tuple[int, ...], merge: int) -> Item:
    """The item of a grid of (t, h, w) patches, of which merge * merge make a row."""
    if len(size) != 3 or size[1] % merge or size[2] % merge or (kind == "image" and size[0] != 1):
        raise RequestError(
            f"`{kind}_grid_thw` must be (t, h, w) in patches, h and w divisible by {merge}"
            f"{' and t 1' if kind == 'image' else ''}, got {list(size)}.",
            "bad_embeds",
        )
    grid = (size[0], size[1] // merge, size[2] // merge)
    return Item(kind, {}, units=0, rows=math.prod(grid), grid=grid)
