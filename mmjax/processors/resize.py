"""Resizing images as the published processors do. NumPy and PIL only."""

import numpy as np
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling = BICUBIC) -> Image.Image:
    """`image.resize(size, resample)` as Pillow 13 does it, whatever Pillow is installed.

    Pillow resizes one axis after the other, and rounds to 8 bits between them, so the order decides the last bit. Up to
    12 the rows come first; 13 begins with the columns where the height shrinks by more than twice what the width does.
    """
    (width, height), (old_width, old_height) = size, image.size
    shrinks = old_height - height
    first = (old_width, height) if shrinks > 0 and shrinks > 2 * (old_width - width) else (width, old_height)
    return image.resize(first, resample).resize(size, resample)


def resize(
    image: Image.Image | np.ndarray, height: int, width: int, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Antialiased resize (PIL's) of an RGB image or uint8 [H, W, 3] array to uint8 [height, width, 3]."""
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        image = resized(image, (width, height), resample)
    return np.asarray(image)


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of an RGB image or an [H, W, 3] array."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)
