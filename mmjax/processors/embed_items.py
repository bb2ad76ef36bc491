"""Items of which only the size is known: what embeddings in place of media make of a prompt."""

import math

from mmjax.processors.base import MediaItem, Processor, ProcessorKwargs
from mmjax.types import RequestError


def any_length_item(self: Processor, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
    """`Processor.outline` of families whose items may have any number of rows."""
    return MediaItem(modality, {}, num_inputs=0, num_embeds=size[0])


def grid_item(modality: str, size: tuple[int, ...], merge: int) -> MediaItem:
    """The item of a grid of (t, h, w) patches, of which merge * merge make a row."""
    if len(size) != 3 or size[1] % merge or size[2] % merge or (modality == "image" and size[0] != 1):
        raise RequestError(
            f"`{modality}_grid_thw` must be (t, h, w) in patches, h and w divisible by {merge}"
            f"{' and t 1' if modality == 'image' else ''}, got {list(size)}.",
            "bad_embeds",
        )
    grid = (size[0], size[1] // merge, size[2] // merge)
    return MediaItem(modality, {}, num_inputs=0, num_embeds=math.prod(grid), grid=grid)
