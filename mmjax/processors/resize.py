"""Resizing images as the published processors do. NumPy and PIL only."""

import numpy as np
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC


def resize(
    image: Image.Image | np.ndarray, height: int, width: int, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Antialiased resize (PIL's) of an RGB image or uint8 [H, W, 3] array to uint8 [height, width, 3]."""
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    return np.asarray(image)


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of an RGB image or an [H, W, 3] array."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)
