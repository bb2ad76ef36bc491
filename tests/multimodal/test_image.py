"""Unusual images, made here: orientation, depth, transparency, colour spaces, layouts, damage."""

import io
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.multimodal import image
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(media: Any, **options: Any) -> np.ndarray:
    return np.asarray(image.decode(media, **options))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    turn = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(image.load(encoded(Image.fromarray(PIXELS), exif=exif)))
    expected = Image.fromarray(PIXELS)
    np.testing.assert_array_equal(upright, expected if turn is None else expected.transpose(turn))


def test_broken_exif_does_not_matter() -> None:
    data = encoded(Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(image.load(data)), PIXELS)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled(mode: str) -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    picture = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    assert picture.mode == mode
    np.testing.assert_array_equal(decoded(picture)[0], [[v] * 3 for v in (0, 1, 128, 255)])
    if mode == "I;16":
        np.testing.assert_array_equal(np.asarray(image.load(encoded(picture))), decoded(picture))


def test_eight_bits_in_mode_i_are_kept() -> None:
    assert decoded(Image.fromarray(np.array([[0, 200]], np.int32)))[0, :, 0].tolist() == [0, 200]


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV", "F", "I"):
        picture = Image.new(mode, (4, 3))
        flat = image.to_rgb(picture)
        assert flat.mode == "RGB" and flat.size == (4, 3), mode


def test_cmyk_jpeg() -> None:
    flat = image.load(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(np.asarray(flat)[4, 4], [255, 0, 0], atol=3)


def palette_with_hole() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    picture.info["transparency"] = 1
    return Image.open(io.BytesIO(encoded(picture, transparency=1)))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(lambda: Image.fromarray(np.array([[[10, 20, 30, 255], [9, 9, 9, 0]]], np.uint8)), id="RGBA"),
        pytest.param(palette_with_hole, id="P"),
        pytest.param(lambda: Image.fromarray(np.array([[[20, 255], [9, 0]]], np.uint8), "LA"), id="LA"),
        pytest.param(lambda: palette_with_hole().convert("PA"), id="PA"),
    ],
)
@pytest.mark.parametrize("background", [(255, 255, 255), (1, 2, 3)])
@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
def test_transparency_shows_the_background(picture: Any, background: image.Color) -> None:
    made = picture()
    opaque = [20, 20, 20] if made.mode == "LA" else [10, 20, 30]
    assert decoded(made, background=background)[0].tolist() == [opaque, list(background)]


def test_rgb_ignores_the_background() -> None:
    np.testing.assert_array_equal(decoded(Image.fromarray(PIXELS), background=(1, 2, 3)), PIXELS)


@pytest.mark.parametrize(
    "value", ["white", (1, 2), (1, 2, 256), (1, 2, -1), (1, 2, 3.0), (True, 0, 0), None, {1, 2, 3}]
)
def test_background_is_checked(value: Any) -> None:
    with pytest.raises(RequestError, match="list or tuple of 3 integers"):
        image.background_color(value)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_allclose(np.asarray(image.load(data)), np.asarray(frames[0]), atol=6)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 50, 3), (50, 1, 3), (3, 3, 3), (1, 1, 1), (7, 5, 1), (7, 5, 4)])
def test_channels_last(shape: tuple[int, ...]) -> None:
    array = RNG.integers(0, 256, shape, np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    np.testing.assert_array_equal(decoded(array), np.broadcast_to(array[..., :3], (*shape[:2], 3)))


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 7, 5), (3, 1, 5), (3, 640, 2)])
def test_channels_first(shape: tuple[int, ...]) -> None:
    array = RNG.integers(0, 256, shape, np.uint8)
    expected = np.broadcast_to(array.transpose(1, 2, 0), (*shape[1:], 3))
    np.testing.assert_array_equal(decoded(array), expected)


@pytest.mark.parametrize("shape", [(3, 50, 1), (3, 1, 1), (1, 50, 1), (5, 5, 5), (2, 9, 9), (0, 5, 3), (5, 0, 3)])
def test_ambiguous_layouts(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="image array"):
        image.decode(np.zeros(shape, np.uint8))


def test_number_types(caplog: pytest.LogCaptureFixture) -> None:
    expected = PIXELS
    for array in (PIXELS.astype(np.int64), PIXELS.astype(np.float32), PIXELS.astype(np.uint16) * 257):
        np.testing.assert_array_equal(decoded(array), expected)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(decoded(PIXELS / 255), expected)
    assert "floats in 0..1" in caplog.text
    np.testing.assert_array_equal(decoded(PIXELS > 100), np.where(PIXELS > 100, 255, 0))
    np.testing.assert_array_equal(decoded(np.asfortranarray(PIXELS)[::-1]), PIXELS[::-1])


def test_arrays_of_other_libraries() -> None:
    import jax.numpy as jnp

    np.testing.assert_array_equal(decoded(jnp.asarray(PIXELS)), PIXELS)
    values = jnp.asarray(PIXELS // 2 * 2 % 128, jnp.bfloat16)
    np.testing.assert_array_equal(decoded(values), PIXELS // 2 * 2 % 128)


class OnlyDlpack:
    """An array of a library that NumPy does not know."""

    ndim, shape, dtype = PIXELS.ndim, PIXELS.shape, PIXELS.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return PIXELS.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return PIXELS.__dlpack_device__()


def test_arrays_through_dlpack() -> None:
    np.testing.assert_array_equal(decoded(OnlyDlpack()), PIXELS)


@pytest.mark.parity
def test_torch_tensors() -> None:
    import torch

    chw = torch.tensor(PIXELS.transpose(2, 0, 1).copy())
    np.testing.assert_array_equal(decoded(chw), PIXELS)
    np.testing.assert_array_equal(decoded(chw.float().requires_grad_()), PIXELS)
    np.testing.assert_array_equal(decoded((chw % 128).bfloat16()), PIXELS % 128)


@pytest.mark.parametrize(
    ("media", "words"),
    [
        (np.full((4, 4, 3), np.nan), "must lie in 0..255"),
        (np.full((4, 4, 3), -2.0), "must lie in 0..255"),
        (np.full((4, 4, 3), 256), "must lie in 0..255"),
        (np.zeros((4, 4, 3), complex), "cannot hold complex128"),
        (np.array([[["a"] * 3]]), "cannot hold"),
        (np.zeros((4, 4)), "3 axes"),
        ("cat.png", "Open files first"),
        (b"\x89PNG", "Open files first"),
        (3, "must be a PIL image or an array"),
        (Image.new("RGB", (0, 5)), "empty"),
    ],
)
def test_refusals(media: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        image.decode(media)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(kind: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    for part in (data[: len(data) // 2], data[:12]):
        with pytest.raises(RequestError, match="Failed to load image") as caught:
            image.load(part)
        assert " at 0x" not in str(caught.value)
    if kind != "WEBP":  # not even opened by Pillow
        lazy = Image.open(io.BytesIO(data[: len(data) * 9 // 10]))
        with pytest.raises(RequestError, match="Failed to load image"):
            image.decode(lazy)


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"])
def test_files_that_are_not_images(data: bytes) -> None:
    with pytest.raises(RequestError, match="not an image in a supported format") as caught:
        image.load(data)
    assert "0x" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Failed to load image"):
        image.load(tmp_path / "none.png")


def test_pixel_limit_is_checked_before_decoding() -> None:
    data = encoded(Image.new("1", (3000, 2000)))
    small, words = MediaLimits(image_pixels=5_000_000), "exceeds the limit of 5000000 pixels"
    with pytest.raises(RequestError, match=words) as caught:
        image.load(data, limits=small)
    assert caught.value.code == "media_too_large"
    lazy = Image.open(io.BytesIO(data))
    with pytest.raises(RequestError, match=words):
        image.decode(lazy, limits=small)
    with pytest.raises(RequestError, match=words):
        image.decode(np.zeros((3000, 2000, 4), np.uint8), limits=MediaLimits(image_pixels=5_000_000))
    assert image.load(data, limits=MediaLimits(image_pixels=0)).size == (3000, 2000)


def test_a_lazy_image_in_many_threads() -> None:
    lazy = Image.open(io.BytesIO(encoded(Image.fromarray(RNG.integers(0, 256, (300, 300, 3), np.uint8)))))
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(image.to_rgb(lazy).tobytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len(set(results)) == 1


def test_real_files(shared: Path) -> None:
    media = shared / "media/images"
    upright = np.asarray(image.load(media / "exif_orient_1.jpg"), np.int16)
    for orientation in (6, 8):
        turned = np.asarray(image.load(media / f"exif_orient_{orientation}.jpg"), np.int16)
        assert np.abs(turned - upright).mean() < 3
    for file in media.iterdir():
        assert image.load(file).mode == "RGB"
    # the same photograph as 8-bit and as 16-bit greyscale
    moon, deep = (np.asarray(image.load(media / name), np.int16) for name in ("moon.png", "gray16.png"))
    assert np.abs(moon - deep).max() <= 1
