"""Pixel work that image families share: resizing like the published processors do. NumPy and PIL only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmjax.types import RequestError

LARGEST = 2**31 - 1  # of any size, count, area or rate
LEAST_RATE = 1e-6  # frames a second; with fewer, times leave the range of positions


def resize(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic (antialiased, PIL) resize of an RGB image or uint8 [H, W, 3] array to uint8 [height, width, 3]."""
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of an RGB image or an [H, W, 3] array."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)


def positive_int(kwargs: Mapping[str, Any], name: str) -> int:
    """A positive integer from processor kwargs; RequestError when it is anything else."""
    value = kwargs[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"mm_processor_kwargs: {name} must be a positive integer, got {value!r}.", "bad_kwargs")
    if value > LARGEST:
        raise RequestError(f"mm_processor_kwargs: {name} must be at most {LARGEST}.", "bad_kwargs")
    return value


def table_coords(coords: np.ndarray, grid: tuple[int, ...], grid_size: int) -> np.ndarray:
    """float32[U, 2]: where patches at place i32[U, 2] of a grid (.., h, w) lie in a table of side x side entries whose
    corners are the grid's corners."""
    down, across = (np.linspace(0, grid_size - 1, n, dtype=np.float32) for n in grid[-2:])
    return np.stack([down[coords[:, 0]], across[coords[:, 1]]], axis=1)
