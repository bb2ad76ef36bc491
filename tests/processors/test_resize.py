"""The order in which the axes of an image are resized, under any version of Pillow."""

import numpy as np
import pytest
from PIL import Image

from mmjax.processors.resize import resize


@pytest.mark.parametrize(
    ("old", "new", "columns_first"),  # (height, width)
    [
        ((112, 84), (56, 84), True),
        ((112, 84), (56, 56), False),  # exactly twice as much
        ((113, 84), (56, 56), True),
        ((100, 100), (90, 140), True),  # wider, and less high
        ((84, 112), (56, 56), False),
        ((56, 56), (112, 84), False),
        ((56, 84), (112, 28), False),
    ],
)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_order_of_axes(
    old: tuple[int, int], new: tuple[int, int], columns_first: bool, resample: Image.Resampling
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8))
    between = (old[1], new[0]) if columns_first else (new[1], old[0])
    wanted = np.asarray(image.resize(between, resample).resize(new[::-1], resample))
    np.testing.assert_array_equal(resize(image, *new, resample), wanted)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(
    ("old", "new"), [((112, 84), (56, 98)), ((112, 84), (45, 84)), ((84, 112), (84, 50)), ((3, 500), (5, 300))]
)
def test_strips_make_the_same_image(
    old: tuple[int, int], new: tuple[int, int], resample: Image.Resampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    wanted = resize(image, *new, resample)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("mmjax.processors.resize.MIN_SPLIT_PIXELS", 0)
    np.testing.assert_array_equal(resize(image, *new, resample), wanted)
