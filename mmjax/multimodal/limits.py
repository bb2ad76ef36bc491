"""How much one media item may decode to. Small files can expand to gigabytes, so decoders ask before they allocate."""

import dataclasses

FFMPEG_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one decoded item; 0 switches a bound off."""

    image_pixels: int = 178_956_970  # Pillow's own error level
    audio_seconds: float = 600.0
    audio_bytes: int = 256 << 20  # as float32 samples over all channels
    video_bytes: int = 4 << 30  # as uint8 RGB frames


DEFAULT = Limits()
