"""Limits on the size of a media item, encoded and decoded: small files can expand to gigabytes."""

import dataclasses

from mmjax.config import env_number

FFMPEG_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Limits of one item; 0 means no limit."""

    source_bytes: int = 256 << 20  # as fetched, read from a file, or decoded from base64
    image_pixels: int = 178_956_970  # Pillow's own error level
    audio_seconds: float = 600.0  # of a file
    audio_bytes: int = 256 << 20  # as float32 samples over all channels
    video_frames: int = 16_384
    video_bytes: int = 4 << 30  # as uint8 RGB frames
    tensor_bytes: int = 2 << 30  # of a base64 tensor, with every repeated element counted

    @classmethod
    def from_env(cls) -> "MediaLimits":
        """The limits that the operator has set. ValidationError for a variable that is not a number."""
        return cls(
            source_bytes=int(env_number("MAX_MEDIA_DOWNLOAD_SIZE_MB", cls.source_bytes >> 20) * 2**20),
            image_pixels=int(env_number("MAX_IMAGE_PIXELS", cls.image_pixels)),
            audio_seconds=env_number("MAX_AUDIO_DECODE_DURATION_S", cls.audio_seconds),
            audio_bytes=int(env_number("MAX_AUDIO_DECODE_BYTES", cls.audio_bytes)),
            video_frames=int(env_number("MAX_VIDEO_FRAMES", cls.video_frames)),
            video_bytes=int(env_number("MAX_VIDEO_DECODE_BYTES", cls.video_bytes)),
            tensor_bytes=int(env_number("MAX_EMBED_DECODE_BYTES", cls.tensor_bytes)),
        )


DEFAULT = MediaLimits()
