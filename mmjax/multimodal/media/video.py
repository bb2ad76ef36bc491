"""Decodes and encodes video files, and sequences of JPEG images in place of videos."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmjax.config import env
from mmjax.multimodal import image, url_sources, video
from mmjax.multimodal.media.base import MediaIO
from mmjax.multimodal.media.image import ImageMediaIO
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError

Frames = tuple[np.ndarray, dict[str, Any]]


class VideoMediaIO(MediaIO[Frames]):
    """Video files, as (frames uint8 [T, H, W, 3], metadata). The options are those of
    `mmjax.multimodal.video.FrameSampling`. RequestError for invalid values."""

    OPTIONS = ("num_frames", "fps", "max_duration", "frame_recovery", "video_backend")

    def __init__(
        self,
        image_io: ImageMediaIO | None = None,
        num_frames: int = 32,
        *,
        fps: float | None = None,
        max_duration: float = 300,
        frame_recovery: bool = False,
        video_backend: str | None = None,
        limits: MediaLimits | None = None,
    ):
        self.limits = limits or MediaLimits.from_env()
        self.image_io = image_io or ImageMediaIO(limits=self.limits)
        self.sampling = video.FrameSampling(
            num_frames, fps, max_duration, video_backend or env("VIDEO_LOADER_BACKEND", "opencv"), frame_recovery
        )

    @classmethod
    def merge_kwargs(
        cls, default_kwargs: Mapping[str, Any] | None, runtime_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The operator's options, overridden by those of a request. If a request sets only one of num_frames and fps,
        the operator's value of the other is dropped."""
        defaults, given = dict(default_kwargs or {}), dict(runtime_kwargs or {})
        if "num_frames" in given and "fps" not in given:
            defaults.pop("fps", None)
        if "fps" in given and "num_frames" not in given:
            defaults.pop("num_frames", None)
        return {**defaults, **given}

    def load_bytes(self, data: bytes) -> Frames:
        """Decode the sampled frames of a video file."""
        decoded = video.load(bytes(data), self.sampling, limits=self.limits)
        return decoded.frames, dict(decoded.metadata)

    def load_base64(self, media_type: str, data: str) -> Frames:
        """Decode a video file in base64; if media_type is video/jpeg, JPEG files in base64, separated by commas."""
        if media_type.lower() != "video/jpeg":
            return super().load_base64(media_type, data)
        count, limit = self.sampling.num_frames, self.limits.video_frames
        parts = data.split(",", min(count, len(data))) if count > 0 else data.split(",")
        parts = parts[:count] if count > 0 else parts
        if limit and len(parts) > limit:
            raise RequestError(f"The video has {len(parts)} frames, over the limit of {limit}.", "media_too_large")
        frames, num_bytes = [], 0
        for part in parts:
            frame = self.image_io.load_bytes(url_sources.from_base64(part, self.limits)).media
            frames.append(np.asarray(image.convert_image_mode(frame, "RGB")))
            num_bytes += frames[-1].nbytes
            if self.limits.video_bytes and num_bytes > self.limits.video_bytes:
                message = f"The frames of the video need more than {self.limits.video_bytes} bytes. Send fewer."
                raise RequestError(message, "media_too_large")
        rate = float(max(self.sampling.fps or 0, 0)) or 1.0
        return video.decode(frames, limits=self.limits).frames, {
            "total_num_frames": len(frames),
            "fps": rate,
            "duration": len(frames) / rate,
            "video_backend": "jpeg_sequence",
            "frames_indices": list(range(len(frames))),
            "do_sample_frames": False,
        }

    def encode_base64(self, media: Any, *, video_format: str = "JPEG") -> str:
        """Frames as JPEG files in base64, separated by commas."""
        if video_format != "JPEG":
            raise RequestError("Only JPEG is supported as video_format.", "bad_media_kwargs")
        frames = map(Image.fromarray, video.decode(media, limits=self.limits).frames)
        return ",".join(self.image_io.encode_base64(frame, image_format="JPEG") for frame in frames)
