"""Functions that scripts for vLLM import: fetch one media item, or encode one as base64."""

import mimetypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmjax.multimodal.media import AudioMediaIO, ImageMediaIO, MediaConnector, VideoMediaIO

Options = Mapping[str, Any] | None


def _connector(modality: str, options: Options) -> MediaConnector:
    return MediaConnector(media_io_kwargs={modality: options} if options else None)


def fetch_image(image_url: str, image_io_kwargs: Options = None) -> Image.Image:
    """The image at an http(s) or data URL. See `MediaConnector` for options and errors."""
    return _connector("image", image_io_kwargs).fetch_image(image_url)


def fetch_audio(audio_url: str, audio_io_kwargs: Options = None) -> tuple[np.ndarray, float]:
    """(mono float32 samples, sampling rate) of the audio at an http(s) or data URL."""
    return _connector("audio", audio_io_kwargs).fetch_audio(audio_url)


def fetch_video(video_url: str, video_io_kwargs: Options = None) -> tuple[np.ndarray, dict[str, Any]]:
    """(frames uint8 [T, H, W, 3], metadata) of the video at an http(s) or data URL."""
    return _connector("video", video_io_kwargs).fetch_video(video_url)


def encode_image_base64(image: Image.Image, *, image_mode: str = "RGB", format: str = "PNG") -> str:
    """The image as a file in base64."""
    return ImageMediaIO(image_mode).encode_base64(image, image_format=format)


def encode_audio_base64(audio: Any, sampling_rate: int, *, format: str = "WAV") -> str:
    """Samples [n], [channels, n] or [n, channels], as a file in base64."""
    return AudioMediaIO().encode_base64((audio, sampling_rate), audio_format=format)


def encode_video_base64(frames: Any, *, format: str = "JPEG") -> str:
    """Frames as JPEG files in base64, separated by commas."""
    return VideoMediaIO().encode_base64(frames, video_format=format)


def encode_image_url(image: Image.Image, *, image_mode: str = "RGB", format: str = "PNG") -> str:
    """The image as a data URL."""
    return _data_url("image", format, encode_image_base64(image, image_mode=image_mode, format=format))


def encode_audio_url(audio: Any, sampling_rate: int, *, format: str = "WAV") -> str:
    """Samples as a data URL."""
    return _data_url("audio", format, encode_audio_base64(audio, sampling_rate, format=format))


def encode_video_url(frames: Any, *, format: str = "JPEG") -> str:
    """Frames as a data URL of type video/jpeg."""
    return _data_url("video", format, encode_video_base64(frames, format=format))


def _data_url(modality: str, format: str, text: str) -> str:
    known = mimetypes.types_map.get(f".{format.lower()}", "")
    media_type = known if known.startswith(f"{modality}/") else f"{modality}/{format.lower()}"
    return f"data:{media_type};base64,{text}"
