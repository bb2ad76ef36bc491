"""Decodes and encodes audio files, and embeddings in their place."""

import base64
import io
from typing import Any

import numpy as np

from mmjax.multimodal import audio
from mmjax.multimodal.media.base import MediaIO
from mmjax.multimodal.media.image import ImageEmbeddingMediaIO
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError


class AudioMediaIO(MediaIO[tuple[np.ndarray, float]]):
    """Audio files and the audio tracks of videos, as (mono float32 [n], sampling rate)."""

    def __init__(self, *, limits: MediaLimits | None = None):
        self.limits = limits or MediaLimits.from_env()

    def load_bytes(self, data: bytes) -> tuple[np.ndarray, float]:
        """Decode an audio file."""
        return audio.load(bytes(data), limits=self.limits)

    def encode_base64(self, media: tuple[Any, float], *, audio_format: str = "WAV") -> str:
        """(samples, sampling rate) as a file in base64."""
        import soundfile

        samples, rate = media
        array = np.asarray(samples)
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T  # files have time first
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, array, int(rate), format=audio_format)
        except (RuntimeError, TypeError, ValueError) as error:
            raise RequestError(f"Cannot write this audio as {audio_format}.", "bad_media_kwargs") from error
        return base64.b64encode(buffer.getvalue()).decode("ascii")


class AudioEmbeddingMediaIO(ImageEmbeddingMediaIO):
    """Embeddings of audio, in the same form as those of images."""
