"""Embeddings in place of a whole prompt: rows as wide as the decoder, one per token. Any decoder takes them."""

from typing import Any

import numpy as np

from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.processors.base import MediaItem
from mmjax.types import RequestError

PROMPT_MODALITY = "prompt"
NO_TOKEN = np.iinfo(np.int32).max  # stands where a row does: in no vocabulary, so no penalty counts it


def read(given: Any, width: int) -> np.ndarray:
    """Floats [T, width] as they came, of any array library. RequestError for anything else."""
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
    rows = to_numpy(given)
    if rows.dtype.kind != "f":
        raise RequestError(f"`prompt_embeds` must hold floats, got {rows.dtype}.", "bad_embeds")
    return rows


def to_items(rows: np.ndarray, width: int, piece: int) -> list[MediaItem]:
    """The rows in items of `piece`, copied to float32 [n, width]: where the slab is wider than the decoder, what is
    added to later layers is 0. RequestError for what is not finite."""
    made = np.zeros((len(rows), width), np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        made[:, : rows.shape[1]] = rows
    if not np.isfinite(made).all():
        raise RequestError("`prompt_embeds` contains NaN or infinite values.", "bad_embeds")
    parts = (made[start : start + piece] for start in range(0, len(made), piece))
    return [MediaItem(PROMPT_MODALITY, {}, 0, len(part), embeds=part) for part in parts]
