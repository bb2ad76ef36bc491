"""Converts images to RGB: PIL images, encoded files, and arrays of every common layout and depth."""

import dataclasses
import functools
import io
import logging
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.types import RequestError

log = logging.getLogger(__name__)

Color = tuple[int, int, int]
T = TypeVar("T")
WHITE: Color = (255, 255, 255)
# formats with external handlers (EPS, WMF) or that nobody puts into a prompt are refused
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")  # MPO files open as JPEG
MODES = ("RGB", "RGBA", "L", "LA")  # values of image_mode
SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
# for a damaged file, Pillow's plugins raise anything, such as RuntimeError (AVIF) and AssertionError (PNG)
DECODE_ERRORS = Exception

_load_lock = threading.Lock()  # the same lazily opened image may be in several prompts of a batch


@dataclasses.dataclass(frozen=True, eq=False)
class MediaWithBytes(Generic[T]):
    """A decoded item and the bytes from which it was decoded. It has the attributes of the item."""

    media: T
    original_bytes: bytes = dataclasses.field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "media":  # `media` is missing while the object is copied
            raise AttributeError(name)
        return getattr(self.media, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.media, dtype) if copy else np.asarray(self.media, dtype)


def unwrap(media: Any) -> Any:
    """The item of a `MediaWithBytes`; any other object as it is."""
    return media.media if isinstance(media, MediaWithBytes) else media


def background_color(value: Any) -> Color:
    """Check a background color."""
    is_triple = isinstance(value, (list, tuple)) and len(value) == 3
    if not is_triple or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in value):
        raise RequestError(
            "rgba_background_color must be a list or tuple of 3 integers in the range [0, 255].", "bad_media_kwargs"
        )
    return (value[0], value[1], value[2])


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def checked_mode(mode: Any) -> str:
    """Check an image_mode."""
    if mode not in MODES:
        raise RequestError(f"image_mode must be one of {', '.join(MODES)}, got {mode!r}.", "bad_media_kwargs")
    return str(mode)


def load(
    source: bytes | Path, *, mode: str = "RGB", background: Color = WHITE, limits: MediaLimits = DEFAULT
) -> Image.Image:
    """Decode an encoded image completely; of an animation, the first frame. RequestError if that fails."""
    if not isinstance(source, bytes):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise _failed(error.strerror or type(error).__name__) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images, since `upright` checks the size
        image = _open(source, limits)
        return convert_image_mode(upright(image, limits), mode, background=background)


def _open(source: bytes, limits: MediaLimits) -> Image.Image:
    """Open an encoded image. Its pixels are not read yet."""
    try:
        return Image.open(io.BytesIO(source), formats=_formats())
    except UnidentifiedImageError as error:
        raise _failed(f"not an image in a supported format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        if Image.MAX_IMAGE_PIXELS is None or 0 < limits.image_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
            raise _too_large(None, limits) from error
    except DECODE_ERRORS as error:
        raise _failed(error) from error
    with _load_lock:  # the operator allows more pixels than Pillow, whose limit is global
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(source), formats=_formats())
        except DECODE_ERRORS as error:
            raise _failed(error) from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def decode(media: Any, *, background: Color = WHITE, limits: MediaLimits = DEFAULT) -> Image.Image | np.ndarray:
    """One image, in any form that callers may pass, as an RGB image or uint8 [H, W, 3]."""
    if isinstance(media, Image.Image):
        return to_rgb(media, background=background, limits=limits)
    if is_array(media):
        array = to_numpy(media)
        if array.ndim != 3:
            raise RequestError(f"An image array must have 3 axes, got shape {array.shape}.", "bad_media")
        frame = frames_from_array(array[None], "image", background=background)[0]
        if limits.image_pixels and frame.shape[0] * frame.shape[1] > limits.image_pixels:
            raise _too_large(frame.shape[:2], limits)
        return frame
    raise RequestError(
        f"An image must be a PIL image or an array, got {type(media).__name__}. Open files first: "
        '`PIL.Image.open("picture.png")`.',
        "bad_media",
    )


def to_rgb(image: Image.Image, *, background: Color = WHITE, limits: MediaLimits = DEFAULT) -> Image.Image:
    """Any PIL image in RGB, upright."""
    return convert_image_mode(upright(image, limits), "RGB", background=background)


def upright(image: Image.Image, limits: MediaLimits = DEFAULT) -> Image.Image:
    """A PIL image with its pixels read, turned as its EXIF tags say. RequestError for one that is too large."""
    check_size(image, limits)
    try:
        read(image)
        turned = exif_of(image).get(ExifTags.Base.Orientation, 1) != 1  # exif_transpose also copies upright images
        return ImageOps.exif_transpose(image) if turned else image
    except DECODE_ERRORS as error:
        raise _failed(error) from error


def convert_image_mode(image: Image.Image, to_mode: str, *, background: Color = WHITE) -> Image.Image:
    """An image in another mode. Transparency that is lost shows the background; 16-bit grayscale is scaled to 8 bits,
    not clipped."""
    if image.mode == checked_mode(to_mode):
        return image
    try:
        if to_mode in ALPHA_MODES and (image.mode in ALPHA_MODES or image.has_transparency_data):
            return image.convert(to_mode)
        flat = _flatten(image, background)
        return flat if to_mode == "RGB" else flat.convert(to_mode)
    except DECODE_ERRORS as error:
        if isinstance(error, RequestError):
            raise
        raise _failed(error) from error


def check_size(image: Image.Image, limits: MediaLimits = DEFAULT) -> None:
    """RequestError for an image without pixels or with too many. Decodes nothing."""
    width, height = image.size
    if not width or not height:
        raise _failed(f"the image is empty ({width}x{height})")
    if limits.image_pixels and width * height > limits.image_pixels:
        raise _too_large((height, width), limits)


def read(image: Image.Image) -> None:
    """Read the pixels of a lazily opened image. May be called from several threads."""
    with _load_lock:
        image.load()


def exif_of(image: Image.Image) -> Mapping[int, Any]:
    """The EXIF tags; empty when they cannot be parsed, since the pixels may be fine."""
    try:
        return image.getexif()
    except DECODE_ERRORS:
        return {}


def _flatten(image: Image.Image, background: Color) -> Image.Image:
    """The image in RGB, without transparency."""
    if image.mode == "RGB":
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "I":  # 32 bits, in which older files hold 16-bit grayscale
        values = np.asarray(image)
        deep = values.max() > 255
        gray = _to_8_bits(values.clip(0, 65535)) if deep else values.clip(0, 255).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image), "image")).convert("RGB")
    if image.mode in ALPHA_MODES or image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no La to RGBA
        flat = Image.new("RGB", rgba.size, background)
        flat.paste(rgba, mask=rgba.getchannel("A"))
        return flat
    return image.convert("RGB")


def frames_from_array(array: np.ndarray, modality: str, *, background: Color = WHITE) -> np.ndarray:
    """[T, H, W, C] or [T, C, H, W] of any number type, C in {1, 3, 4}, as uint8 [T, H, W, 3], copied only if need be.

    Channels are last if the last axis is 3 or 4, or 1 and no other axis can be channels; otherwise they are first.
    """
    *_, first, middle, last = shape = array.shape[1:]
    if 0 in array.shape:
        raise RequestError(f"The {modality} array is empty: its shape is {shape}.", "bad_media")
    if last == 1 and first in (1, 3, 4) and middle * first > 1:
        raise RequestError(
            f"Cannot tell channels from pixels in a {modality} array of shape {shape}: drop the axis of length 1, "
            "or pass PIL.",
            "bad_media",
        )
    if last not in (1, 3, 4):
        if first not in (1, 3, 4):
            raise RequestError(
                f"A {modality} array must be (height, width, channels) or (channels, height, width) with 1, 3 or 4 "
                f"channels, got shape {shape}.",
                "bad_media",
            )
        array = np.moveaxis(array, 1, -1)
    frames = _to_uint8(array, modality)
    if frames.shape[-1] == 1:
        frames = np.broadcast_to(frames, (*frames.shape[:-1], 3))
    elif frames.shape[-1] == 4:
        alpha = frames[..., 3:].astype(np.float32) / 255
        frames = np.rint(frames[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(frames)


def _to_uint8(array: np.ndarray, modality: str) -> np.ndarray:
    """Values of any number type in 0..255 (uint16: 0..65535; floats up to 1.0: 0..1) as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return _to_8_bits(array)
    if array.dtype.kind not in "iuf":
        raise RequestError(f"A {modality} array cannot hold {array.dtype}; use uint8.", "bad_media")
    low, high = float(array.min()), float(array.max())  # both are NaN where any value is
    if not -1 < low <= high < 256:
        raise RequestError(
            f"The values of a {modality} array must lie in 0..255, got {low:g}..{high:g}. Pass raw pixels: "
            "normalization is part of the model.",
            "bad_media",
        )
    if array.dtype.kind == "f" and high <= 1.0:
        log.warning("%s array of floats in 0..1: scaled by 255. Pass uint8 pixels to be exact.", modality)
        array = array * np.float32(255)
    return np.rint(array).clip(0, 255).astype(np.uint8)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """16-bit values scaled to 8 bits and rounded: 65535 becomes 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _too_large(shape: tuple[int, ...] | None, limits: MediaLimits) -> RequestError:
    size = "it" if shape is None else "x".join(map(str, shape))
    return RequestError(
        f"Failed to load image: {size} exceeds the limit of {limits.image_pixels} pixels. Scale the image down.",
        "media_too_large",
    )


def _failed(reason: object) -> RequestError:
    message = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the data", str(reason) or type(reason).__name__)  # no addresses
    return RequestError(f"Failed to load image: {message}", "bad_media")
