"""Embeddings in place of a whole prompt: one per token, as wide as the decoder."""

from typing import Any

import numpy as np

from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.processors.base import MediaItem
from mmjax.types import RequestError

PROMPT_MODALITY = "prompt"
NO_TOKEN = np.iinfo(np.int32).max  # the token id of an embedding: outside every vocabulary, so penalties ignore it


def read_prompt_embeds(given: Any, width: int) -> np.ndarray:
    """Floats [T, width], from an array of any library. RequestError for anything else."""
    if not is_array(given):
        raise RequestError(
            "`prompt_embeds` must be an array of torch, NumPy or JAX of shape (tokens, hidden size), got "
            f"{type(given).__name__}.",
            "bad_embeds",
        )
    shape = tuple(given.shape)
    if len(shape) != 2 or not shape[0]:
        raise RequestError(
            f"`prompt_embeds` must be 2D (tokens, hidden size) with at least one token, got shape {shape}.",
            "bad_embeds",
        )
    if shape[1] != width:
        raise RequestError(
            f"`prompt_embeds` hidden dimension mismatch: got {shape[1]}, but model expects {width}. Embedding shape: "
            f"{shape}",
            "bad_embeds",
        )
    embeds = to_numpy(given)
    if embeds.dtype.kind != "f":
        raise RequestError(f"`prompt_embeds` must hold floats, got {embeds.dtype}.", "bad_embeds")
    return embeds


def to_items(embeds: np.ndarray, width: int, block_size: int) -> list[MediaItem]:
    """Items of `block_size` embeddings each, copied to float32 [n, width]. If the mm_embeds buffer is wider than the
    decoder, the other columns, which are added to later layers, are 0. RequestError for values that are not finite."""
    wide = np.zeros((len(embeds), width), np.float32)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused
        wide[:, : embeds.shape[1]] = embeds
    if not np.isfinite(wide).all():
        raise RequestError("`prompt_embeds` contains NaN or infinite values.", "bad_embeds")
    parts = (wide[start : start + block_size] for start in range(0, len(wide), block_size))
    return [MediaItem(PROMPT_MODALITY, {}, 0, len(part), embeds=part) for part in parts]
