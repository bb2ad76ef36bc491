"""Decodes and encodes image files, and embeddings in place of images."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from mmjax.multimodal import image, tensor_codec
from mmjax.multimodal.media.base import MediaIO, MediaWithBytes
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError


class ImageMediaIO(MediaIO[MediaWithBytes[Image.Image]]):
    """Image files. image_mode: mode of the decoded image. rgba_background_color: the color behind transparent images.
    RequestError for invalid values of either."""

    OPTIONS = ("image_mode", "rgba_background_color")

    def __init__(
        self,
        image_mode: str = "RGB",
        *,
        rgba_background_color: Any = image.WHITE,
        limits: MediaLimits | None = None,
    ):
        self.image_mode = image.checked_mode(image_mode)
        self.background = image.background_color(rgba_background_color)
        self.limits = limits or MediaLimits.from_env()

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Decode an image file: upright, in `image_mode`; of an animation, the first frame."""
        decoded = image.load(bytes(data), mode=self.image_mode, background=self.background, limits=self.limits)
        return MediaWithBytes(decoded, data)

    def encode_base64(self, media: Image.Image, *, image_format: str = "PNG") -> str:
        """The image as a file in base64."""
        buffer = io.BytesIO()
        converted = image.convert_image_mode(media, self.image_mode, background=self.background)
        try:
            converted.save(buffer, image_format)
        except (KeyError, OSError, ValueError) as error:
            message = f"Cannot write a {self.image_mode} image as {image_format}."
            raise RequestError(message, "bad_media_kwargs") from error
        return base64.b64encode(buffer.getvalue()).decode("ascii")


class ImageEmbeddingMediaIO(MediaIO[np.ndarray]):
    """Embeddings: files of one tensor, written by `torch.save` or `numpy.save`. Nothing in them is executed."""

    def __init__(self, *, limits: MediaLimits | None = None):
        self.limits = limits or MediaLimits.from_env()

    def load_bytes(self, data: bytes) -> np.ndarray:
        """Decode a tensor file."""
        return tensor_codec.read_tensor(data, self.limits)

    def load_base64(self, media_type: str, data: str) -> np.ndarray:
        """Decode a tensor file in base64."""
        return tensor_codec.base642tensor(data, limits=self.limits)

    def encode_base64(self, media: Any) -> str:
        """The array as a tensor file in base64."""
        return tensor_codec.tensor2base64(media)
