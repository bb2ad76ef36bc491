"""Ids of media: which must be equal, and which must differ."""

import uuid
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mmjax.multimodal import hash as hash_module
from mmjax.multimodal.hash import content_id, named_id
from mmjax.types import RequestError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def key(media: Any, kind: str = "image", model: str = "m", kwargs: Any = None, io: Any = None) -> str:
    return content_id(model, kind, media, kwargs or {}, io or {})


def palette(colors: list[int], transparency: int | None = None) -> Image.Image:
    picture = Image.new("P", (2, 2))
    picture.putpalette(colors)
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


def oriented(value: int) -> Image.Image:
    picture = Image.fromarray(PIXELS)
    picture.getexif()[ExifTags.Base.Orientation] = value
    return picture


def test_different_contents_differ() -> None:
    picture = Image.fromarray(PIXELS)
    samples = np.arange(100, dtype=np.float32)
    media = [
        picture,
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        Image.frombytes("RGB", (4, 6), picture.tobytes()),  # the same bytes in another shape
        *(Image.new(mode, (4, 4)) for mode in ("L", "1", "P", "RGB", "RGBA")),
        Image.new("RGB", (30, 30), "red"),
        Image.new("RGB", (100, 20), "red"),
        palette([1, 2, 3]),
        palette([3, 2, 1]),
        palette([1, 2, 3], 0),
        oriented(6),
        PIXELS,
        PIXELS.transpose(1, 0, 2),
        PIXELS.astype(np.int16),
        PIXELS.view(np.int8),
        PIXELS.reshape(6, 4, 3),
        [PIXELS],
        [PIXELS, PIXELS],
        (PIXELS, {"fps": 2.0}),
        (PIXELS, {"fps": 3.0}),
        samples,
        (samples, 16000),
        (samples, 8000),
        (samples, None),
        samples.tolist(),
        samples.astype(np.float64),
        [b"ab", b"c"],
        [b"a", b"bc"],
        ["ab", "c"],
        [["ab"], "c"],
        1,
        1.0,
        True,
        "1",
        b"1",
    ]
    keys = [key(entry) for entry in media]
    assert len(set(keys)) == len(keys)


def test_equal_contents_are_equal() -> None:
    assert key(Image.fromarray(PIXELS)) == key(Image.fromarray(PIXELS.copy()))
    assert key(PIXELS[::-1, ::2]) == key(PIXELS[::-1, ::2].copy())
    assert key(np.asfortranarray(PIXELS)) == key(PIXELS)
    assert key((PIXELS, {"fps": 2.0, "total_num_frames": 4})) == key((PIXELS, {"total_num_frames": 4, "fps": 2.0}))
    assert key(PIXELS, kwargs={"a": 1, "b": {"c": 2, "d": 3}}) == key(PIXELS, kwargs={"b": {"d": 3, "c": 2}, "a": 1})


def test_everything_that_changes_the_result_counts() -> None:
    keys = [
        key(PIXELS),
        key(PIXELS, kind="video"),
        key(PIXELS, model="other"),
        key(PIXELS, kwargs={"max_pixels": 1}),
        key(PIXELS, kwargs={"max_pixels": 2}),
        key(PIXELS, io={"max_pixels": 1}),
        key(PIXELS, io={"rgba_background_color": [0, 0, 0]}),
    ]
    assert len(set(keys)) == len(keys)


def test_named_ids_and_content_ids_never_collide() -> None:
    content = key(PIXELS)
    keys = [
        content,
        named_id("m", "image", content, None, {}, {}),
        named_id("m", "image", "cat", None, {}, {}),
        named_id("m", "video", "cat", None, {}, {}),
        named_id("m", "image", "cat", "tenant", {}, {}),
        named_id("m", "image", "cat", None, {"max_pixels": 1}, {}),
        named_id("n", "image", "cat", None, {}, {}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_uuid_in_the_exif_replaces_the_content() -> None:
    one, two = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (9, 9), "blue")
    name = uuid.uuid4()
    for picture in (one, two):
        picture.getexif()[ExifTags.Base.ImageID] = name
    assert key(one) == key(two)
    two.getexif()[ExifTags.Base.ImageID] = uuid.uuid4()
    assert key(one) != key(two)
    two.getexif()[ExifTags.Base.ImageID] = "a text is no uuid"
    assert key(two) != key(one)


def test_jax_and_numpy_arrays_of_equal_content_are_equal() -> None:
    import jax.numpy as jnp

    assert key(jnp.asarray(PIXELS)) == key(PIXELS)


def test_values_that_cannot_be_hashed() -> None:
    with pytest.raises(RequestError, match="Cannot identify a value of type object"):
        key(object())


def test_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = key(PIXELS)
    lengths = {"sha256": 64, "blake3": 64, "sha512": 128}
    for name, length in lengths.items():
        monkeypatch.setenv("VLLM_MM_HASHER_ALGORITHM", name)
        assert len(key(PIXELS)) == length and (key(PIXELS) == usual) == (length == 64)
    monkeypatch.setenv("MMJAX_MM_HASHER_ALGORITHM", "md5")
    with pytest.raises(RequestError, match="MMJAX_MM_HASHER_ALGORITHM"):
        key(PIXELS)


def test_views_are_hashed_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_module, "MAX_COPY_BYTES", 8)
    for view in (PIXELS[::-1, ::2], np.broadcast_to(PIXELS[:1], (5, 6, 3)), np.asfortranarray(PIXELS)):
        assert key(view) == key(view.copy(order="C"))
