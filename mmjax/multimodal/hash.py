"""Hashes of media: equal content has equal ids, different content has different ids.

Every value is fed to the hash as a type tag, a length and bytes, so no two sequences of values have the same encoding.
"""

import hashlib
import numbers
import struct
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from mmjax.config import env
from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.image import DECODE_ERRORS, exif_of, read
from mmjax.types import RequestError

MAX_COPY_BYTES = 1 << 24
# blake3 is vLLM's default. Python does not have it, and ids never leave the process, so another hash works too.
ALGORITHMS = {"sha256": hashlib.sha256, "sha512": hashlib.sha512, "blake3": hashlib.sha256}


def content_id(
    model: str, modality: str, media: Any, processor_kwargs: Mapping[str, Any], io_kwargs: Mapping[str, Any]
) -> str:
    """The id of a media item, from its content and everything that changes how it is decoded and processed."""
    return _digest("content", model, modality, media, processor_kwargs, io_kwargs)


def named_id(
    model: str,
    modality: str,
    name: str,
    salt: str | None,
    processor_kwargs: Mapping[str, Any],
    io_kwargs: Mapping[str, Any],
) -> str:
    """The id of a media item, from the caller's uuid. It never equals a content id, and it differs for every cache
    salt, so that tenants with different salts can neither read nor replace each other's items."""
    return _digest("named", model, modality, name, salt, processor_kwargs, io_kwargs)


def _digest(*values: Any) -> str:
    name = env("MM_HASHER_ALGORITHM", "sha256").lower()
    if name not in ALGORITHMS:
        raise RequestError(
            f"MMJAX_MM_HASHER_ALGORITHM must be one of {', '.join(ALGORITHMS)}, got {name!r}.", "bad_name"
        )
    digest = ALGORITHMS[name]()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    """Feed one value: tag, length (bytes of a leaf, members of a container), then the content."""
    if isinstance(value, Image.Image):
        _feed_image(digest, value)
    elif is_array(value):
        array = to_numpy(value)
        if array.dtype.hasobject:
            raise RequestError(f"An array of media cannot hold {array.dtype}; use uint8 or float32.", "bad_media")
        _leaf(digest, b"A", f"{array.dtype.str}{array.shape}".encode())
        _count(digest, b"D", array.nbytes)
        _feed_numbers(digest, array)
    elif isinstance(value, Mapping):
        _count(digest, b"M", len(value))
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        if len(value) > 64 and all(type(x) is float for x in value):  # audio samples, fed as one buffer
            _leaf(digest, b"L", np.asarray(value, np.float64))
            return
        _count(digest, b"T", len(value))
        for member in value:
            _feed(digest, member)
    else:
        _feed_scalar(digest, value)


def _feed_numbers(digest: "hashlib._Hash", array: np.ndarray) -> None:
    """Feed the numbers in row order. A large view that repeats or skips numbers is copied row by row."""
    if array.ndim > 1 and not array.flags.c_contiguous and array.nbytes > MAX_COPY_BYTES:
        for row in array:
            _feed_numbers(digest, row)
    elif array.size:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _feed_scalar(digest: "hashlib._Hash", value: Any) -> None:
    if value is None:
        _leaf(digest, b"N", b"")
    elif isinstance(value, (bool, np.bool_)):
        _leaf(digest, b"B", bytes([bool(value)]))
    elif isinstance(value, numbers.Integral):
        _leaf(digest, b"I", str(int(value)).encode())
    elif isinstance(value, numbers.Real):
        _leaf(digest, b"F", struct.pack("<d", float(value)))
    elif isinstance(value, str):
        _leaf(digest, b"S", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _leaf(digest, b"Y", value)
    elif isinstance(value, uuid.UUID):
        _leaf(digest, b"U", value.bytes)
    else:
        raise RequestError(
            f"Cannot identify a value of type {type(value).__name__}: media are images, arrays or lists of them.",
            "bad_media",
        )


def _feed_image(digest: "hashlib._Hash", image: Image.Image) -> None:
    """Feed mode, size, orientation, transparency, palette and pixels; or only the UUID in the EXIF ImageID."""
    exif = exif_of(image)
    declared = exif.get(ExifTags.Base.ImageID)
    if isinstance(declared, uuid.UUID):
        _count(digest, b"E", 1)
        _feed(digest, declared)
        return
    try:
        read(image)
        pixels = image.tobytes()
    except DECODE_ERRORS as error:
        raise RequestError("Failed to load image: the file is truncated or damaged.", "bad_media") from error
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    _count(digest, b"P", 6)
    for value in (image.mode, image.size, exif.get(ExifTags.Base.Orientation), image.info.get("transparency"), palette):
        _feed(digest, value)
    _leaf(digest, b"D", pixels)


def _leaf(digest: "hashlib._Hash", tag: bytes, content: Any) -> None:
    size = content.nbytes if isinstance(content, (np.ndarray, memoryview)) else len(content)
    _count(digest, tag, size)
    digest.update(content)


def _count(digest: "hashlib._Hash", tag: bytes, length: int) -> None:
    digest.update(tag + struct.pack("<Q", length))
