"""Checks the size of media as given, before anything is decoded, hashed or copied.

Broadcast views and lazily opened images can have shapes far beyond memory, which later steps would allocate.
"""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmjax.multimodal import image
from mmjax.multimodal.arrays import is_array
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError


def check_size(modality: str, data: Any, limits: MediaLimits) -> None:
    """RequestError for an item above the limits. Nothing else is checked."""
    if isinstance(data, tuple) and len(data) == 2 and (data[1] is None or not is_array(data[1])):
        media, metadata = data
        if modality == "audio" or (modality == "video" and isinstance(metadata, Mapping)):
            data = media
    if modality == "image":
        _check_image(data, limits)
    elif modality == "video":
        _check_video(data, limits)
    else:
        _check_audio(data, limits)


def _check_image(data: Any, limits: MediaLimits) -> None:
    if isinstance(data, Image.Image):
        image.check_size(data, limits)
    elif is_array(data) and limits.image_pixels and math.prod(data.shape) > 4 * limits.image_pixels:
        raise RequestError(
            f"An image array of shape {tuple(data.shape)} exceeds the limit of {limits.image_pixels} pixels. Scale the "
            "image down.",
            "media_too_large",
        )


def _check_video(data: Any, limits: MediaLimits) -> None:
    frames = data if isinstance(data, (list, tuple)) else [data]
    count = data.shape[0] if is_array(data) and data.ndim == 4 else len(frames)
    if limits.video_frames and count > limits.video_frames:
        raise _video_too_large(f"{count} frames", f"{limits.video_frames} frames")
    size = 0
    for frame in frames:
        if isinstance(frame, Image.Image):
            image.check_size(frame, limits)
            size += 3 * frame.width * frame.height
        elif is_array(frame):
            size += math.prod(frame.shape) * getattr(frame.dtype, "itemsize", 1)
    if limits.video_bytes and size > limits.video_bytes:
        raise _video_too_large(f"{size} bytes", f"{limits.video_bytes} bytes")


def _video_too_large(size: str, limit: str) -> RequestError:
    return RequestError(
        f"The video has {size}, over the limit of {limit}. Send fewer or smaller frames.", "media_too_large"
    )


def _check_audio(data: Any, limits: MediaLimits) -> None:
    count = math.prod(data.shape) if is_array(data) else len(data) if isinstance(data, (list, tuple)) else 0
    if limits.audio_bytes and 4 * count > limits.audio_bytes:
        raise RequestError(
            f"The audio has {count} samples, over the limit of {limits.audio_bytes // 4}. Split it first.",
            "media_too_large",
        )
