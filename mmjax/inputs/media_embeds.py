"""Embeddings in place of media: split into items, and checked before anything is scheduled.

`Processor.embed_fields` names the arrays that a family takes for a modality: the embeddings and, if their number does
not determine the item, its size. `Processor.item_for_embeds` makes an item of that size, without embeddings.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.processors import mel_features
from mmjax.processors.base import MediaItem, Processor, ProcessorKwargs
from mmjax.types import RequestError

log = logging.getLogger(__name__)

MAX_SIZE = 1 << 31  # embeddings or patches of one item


@dataclasses.dataclass(frozen=True, eq=False)
class EmbedsInput:
    """One item given as embeddings: its arrays by name."""

    fields: Mapping[str, Any]


class MediaEmbedsReader:
    """Reads the embeddings of one model. width: of an embedding, in some models more than the hidden size."""

    def __init__(self, processor: Processor, width: int):
        self.processor, self.width = processor, width

    def looks_like(self, modality: str, array: Any) -> bool:
        """Whether an array that might be raw media holds embeddings: floats of the model's width."""
        return (
            modality in self.processor.embed_fields
            and tuple(array.shape[-1:]) == (self.width,)
            and "float" in str(array.dtype)
        )

    def field_names(self, modality: str) -> tuple[str, ...]:
        """The names of the arrays of a modality's embeddings. RequestError if the model takes no embeddings of it."""
        names = self.processor.embed_fields.get(modality)
        if names is None:
            known = ", ".join(self.processor.embed_fields) or "no modality"
            raise RequestError(
                f"This model takes no {modality} embeddings (it takes those of {known}): pass raw {modality} data.",
                "unsupported_embeds",
            )
        return names

    def parse_item(self, modality: str, fields: Any) -> EmbedsInput:
        """One item: a dictionary of its arrays, or its embeddings alone."""
        names = self.field_names(modality)
        if not isinstance(fields, Mapping):
            fields = {names[0]: fields}
        _require(names, fields)
        return EmbedsInput({name: fields[name] for name in names})

    def parse_items(self, modality: str, data: Any) -> list[EmbedsInput]:
        """The items in a dictionary of arrays for all items, in an array [n, embeds, W], or in [embeds, W] for one
        item.

        If the model takes sizes, the embeddings of several items may be concatenated: the sizes tell them apart.
        """
        names = self.field_names(modality)
        fields = data if isinstance(data, Mapping) else {names[0]: data}
        _require(names, fields)
        embeds = fields[names[0]]
        if names[0] == mel_features.FEATURES:
            return [EmbedsInput(clip) for clip in mel_features.split_clips(fields)]
        if len(names) == 1:
            return [EmbedsInput({names[0]: part}) for part in (embeds if _is_many(embeds) else [embeds])]
        sizes = np.atleast_2d(_sizes(fields[names[1]], names[1]))
        parts = list(embeds) if _is_many(embeds) else self._split(modality, names, embeds, sizes)
        if len(parts) != len(sizes):
            raise RequestError(
                f"`{names[0]}` holds {len(parts)} items, but `{names[1]}` has {len(sizes)} rows: pass one per item.",
                "bad_embeds",
            )
        return [EmbedsInput({names[0]: part, names[1]: size}) for part, size in zip(parts, sizes, strict=True)]

    def _split(self, modality: str, names: Sequence[str], embeds: Any, sizes: np.ndarray) -> list[Any]:
        """The embeddings of each item, from an array that concatenates them."""
        if not is_array(embeds):
            raise _not_an_array(modality, names[0], embeds)
        if len(sizes) == 1:
            return [embeds]
        counts = [self._item_of_size(modality, names[1], size, {}).num_embeds for size in sizes]
        if embeds.ndim != 2 or sum(counts) != len(embeds):
            raise RequestError(
                f"`{names[0]}` has shape {tuple(embeds.shape)}, but `{names[1]}` describes {len(counts)} items of "
                f"{counts} rows, {sum(counts)} together.",
                "bad_embeds",
            )
        ends = np.cumsum(counts)
        return [embeds[int(end - count) : int(end)] for count, end in zip(counts, ends, strict=True)]

    def to_media_item(self, modality: str, index: int, given: EmbedsInput, kwargs: ProcessorKwargs) -> MediaItem:
        """The item, its embeddings checked and copied to float32 [n, W]."""
        names = self.field_names(modality)
        if names[0] == mel_features.FEATURES:
            return mel_features.media_item(self.processor, index, given.fields)
        embeds = self._check_embeds(modality, index, names[0], given.fields[names[0]])
        if len(names) == 1:
            return dataclasses.replace(self.processor.item_for_embeds(modality, (len(embeds),), kwargs), embeds=embeds)
        size = _sizes(given.fields[names[1]], names[1])
        size = size[0] if size.ndim == 2 and len(size) == 1 else size
        item = self._item_of_size(modality, names[1], size, kwargs)
        if item.num_embeds != len(embeds):
            raise RequestError(
                f"`{names[0]}` of {modality} item {index} has {len(embeds)} rows, but its `{names[1]}` "
                f"{size.tolist()} needs {item.num_embeds}.",
                "bad_embeds",
            )
        return dataclasses.replace(item, embeds=embeds)

    def _check_embeds(self, modality: str, index: int, name: str, given: Any) -> np.ndarray:
        """An array of any library as float32 [n, W]."""
        title = modality.capitalize()
        if not is_array(given):
            raise _not_an_array(modality, name, given)
        shape = tuple(given.shape)
        if len(shape) == 3 and shape[0] == 1:
            log.warning("%s embedding of shape %s: pass one item as (rows, hidden size)", modality, shape)
            given, shape = given[0], shape[1:]
        if len(shape) != 2:
            raise RequestError(
                f"{title} embedding must be 2D (seq_len, hidden_size) or 3D (batch, seq_len, hidden_size), got "
                f"{len(shape)}D tensor with shape {shape}.",
                "bad_embeds",
            )
        if shape[1] != self.width:
            raise RequestError(
                f"{title} embedding[{index}] hidden dimension mismatch: got {shape[1]}, but model expects "
                f"{self.width}. Embedding shape: {shape}",
                "bad_embeds",
            )
        embeds = to_numpy(given)
        if embeds.dtype.kind != "f":
            raise RequestError(f"{title} embedding[{index}] must hold floats, got {embeds.dtype}.", "bad_embeds")
        if not len(embeds):
            raise RequestError(f"{title} embedding[{index}] is empty: its shape is {shape}.", "bad_embeds")
        embeds = embeds.astype(np.float32)  # a copy, because the caller may write to the array later
        if not np.isfinite(embeds).all():
            raise RequestError(f"{title} embedding[{index}] contains NaN or infinite values.", "bad_embeds")
        return embeds

    def _item_of_size(self, modality: str, name: str, size: np.ndarray, kwargs: ProcessorKwargs) -> MediaItem:
        if size.ndim != 1 or (size < 1).any() or math.prod(size.tolist()) > MAX_SIZE:
            raise RequestError(f"`{name}` must hold positive sizes, got {size.tolist()}.", "bad_embeds")
        return self.processor.item_for_embeds(modality, tuple(size.tolist()), kwargs)


def _require(names: Sequence[str], fields: Mapping[str, Any]) -> None:
    if any(fields.get(name) is None for name in names):
        raise RequestError(
            f"The data should contain the fields: {set(names)}, but only found the following keys: "
            f"{ {name for name, value in fields.items() if value is not None} or '{}' }",
            "bad_embeds",
        )


def _is_many(embeds: Any) -> bool:
    """Whether there is one array per item."""
    return isinstance(embeds, (list, tuple)) or (is_array(embeds) and embeds.ndim == 3)


def _sizes(given: Any, name: str) -> np.ndarray:
    """Sizes in any kind of array or list, as int64 [k] or [n, k]."""
    try:
        if is_array(given):
            sizes = to_numpy(given)
        else:
            sizes = np.asarray([to_numpy(row) if is_array(row) else row for row in given])
    except (TypeError, ValueError) as error:
        raise RequestError(f"`{name}` must be an array of integers, one row per item.", "bad_embeds") from error
    if sizes.dtype.kind not in "iu" or not 1 <= sizes.ndim <= 2 or not sizes.size:
        raise RequestError(
            f"`{name}` must be an array of integers, one row per item, got {sizes.dtype} of shape {sizes.shape}.",
            "bad_embeds",
        )
    return sizes.astype(np.int64)


def _not_an_array(modality: str, name: str, given: Any) -> RequestError:
    return RequestError(
        f"`{name}` of a {modality} must be an array of torch, NumPy or JAX of shape (rows, hidden size), got "
        f"{type(given).__name__}.",
        "bad_embeds",
    )
