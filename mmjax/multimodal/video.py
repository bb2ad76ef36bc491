"""Videos to frames: lists of images, arrays of either layout, and files with the two published rules of sampling."""

import dataclasses
import logging
import math
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.multimodal import ffmpeg, image
from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.limits import DEFAULT, Limits
from mmjax.types import RequestError

log = logging.getLogger(__name__)

BACKENDS = ("opencv", "opencv_dynamic")  # names of sampling rules; both decode with ffmpeg


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames uint8 [T, H, W, 3] and what is known of their source: total_num_frames, fps, duration (s), video_backend,
    frames_indices, do_sample_frames. Metadata is empty when the caller gave none."""

    frames: np.ndarray
    metadata: Mapping[str, Any]


def decode(media: Any, *, background: image.Color = image.WHITE, limits: Limits = DEFAULT) -> Video:
    """What a caller may pass as one video: a list of PIL images or 3-D arrays, a 4-D array, or (those, metadata)."""
    frames, metadata = media if isinstance(media, tuple) and len(media) == 2 else (media, {})
    if not isinstance(metadata, Mapping):
        raise RequestError(f"Video metadata must be a dictionary, got {type(metadata).__name__}.", "bad_media")
    if is_array(frames):
        array = to_numpy(frames)
        if array.ndim != 4:
            raise RequestError(
                f"A video array must be (frames, height, width, channels) or (frames, channels, height, width), got "
                f"shape {array.shape}.",
                "bad_media",
            )
        return Video(image.frames_from_array(array, "video", background=background), dict(metadata))
    if not isinstance(frames, (list, tuple)) or not frames:
        raise RequestError(
            "A video must be an array, or a non-empty list of PIL images or of 3-D arrays (its frames), got "
            f"{'an empty list' if isinstance(frames, (list, tuple)) else type(frames).__name__}.",
            "bad_media",
        )
    if all(is_array(frame) for frame in frames):
        arrays = [to_numpy(frame) for frame in frames]
        _same_size([array.shape for array in arrays])
        if arrays[0].ndim == 3:
            return Video(image.frames_from_array(np.stack(arrays), "video", background=background), dict(metadata))
    pictures = [np.asarray(image.decode(frame, background=background, limits=limits)) for frame in frames]
    _same_size([picture.shape for picture in pictures])
    return Video(np.stack(pictures), dict(metadata))


def _same_size(shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise RequestError(
            f"All frames of a video must have the same size, got {sorted(set(shapes))[:4]}.", "bad_media"
        )


def load(
    source: bytes | Path,
    *,
    num_frames: int = 32,
    fps: float | None = None,
    max_duration: float = 300,
    video_backend: str = "opencv",
    limits: Limits = DEFAULT,
) -> Video:
    """Decode a video file, keeping only the sampled frames.

    `opencv`: at most `num_frames` (-1: all) and, with `fps`, at most that many per second. `opencv_dynamic`: `fps`
    (default 2) over at most `max_duration` seconds. Frames that cannot be decoded are left out, with a warning.
    """
    _check_sampling(num_frames, fps, max_duration, video_backend)
    with tempfile.TemporaryDirectory(prefix="mmjax-") as folder, ffmpeg.as_file(source, Path(folder)) as file:
        try:
            total, rate, frame_bytes = ffmpeg.probe_video(file)
            if not total:
                raise RequestError("Could not open video stream: it has no frames.", "bad_media")
            if video_backend == "opencv":
                wanted = uniform_indices(total, rate, num_frames, -1 if fps is None else fps)
            else:
                wanted = timed_indices(total, rate, 2 if fps is None else fps, max_duration)
            if limits.video_bytes and len(wanted) * frame_bytes > limits.video_bytes:
                raise RequestError(
                    f"{len(wanted)} frames of this video need {len(wanted) * frame_bytes} bytes, over the limit of "
                    f"{limits.video_bytes}. Lower num_frames or fps.",
                    "media_too_large",
                )
            frames = _read_frames(file, wanted, total)
        except (subprocess.SubprocessError, OSError) as error:
            raise RequestError("Could not open video stream.", "bad_media") from error
    if len(frames) < len(wanted):
        log.warning("%d of %d sampled video frames could not be decoded", len(wanted) - len(frames), len(wanted))
        wanted = wanted[: len(frames)]
    metadata = {
        "total_num_frames": total,
        "fps": rate,
        "duration": total / rate if rate else 0,
        "video_backend": video_backend,
        "frames_indices": wanted,
        "do_sample_frames": len(wanted) == total,
    }
    return Video(frames, metadata)


def _check_sampling(num_frames: Any, fps: Any, max_duration: Any, backend: str) -> None:
    if backend not in BACKENDS:
        raise RequestError(
            f"Extension class {backend} not found; video_backend is one of {BACKENDS}.", "bad_media_kwargs"
        )
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < -1 or num_frames == 0:
        raise RequestError(f"num_frames must be greater than 0 or -1, got {num_frames!r}.", "bad_media_kwargs")
    for name, value in (("fps", -1 if fps is None else fps), ("max_duration", max_duration)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number, got {value!r}.", "bad_media_kwargs")
    if backend == "opencv_dynamic" and ((fps is not None and fps <= 0) or max_duration <= 0):
        raise RequestError("opencv_dynamic needs fps and max_duration above 0.", "bad_media_kwargs")


def uniform_indices(total: int, rate: float, num_frames: int, fps: float) -> list[int]:
    """Evenly spaced frames, first and last included; bounded by `num_frames` and by `fps` per second where positive."""
    count = min(num_frames, total) if num_frames > 0 else total
    if fps > 0:
        count = min(count, math.floor((total / rate if rate else 0) * fps))
    count = max(1, count)
    return list(range(total)) if count == total else np.linspace(0, total - 1, count).astype(int).tolist()


def timed_indices(total: int, rate: float, fps: float, max_duration: float) -> list[int]:
    """A frame every 1/fps seconds; of clips longer than `max_duration`, that many evenly spread, the end included."""
    if rate <= 0:
        raise RequestError("Could not open video stream: its frame rate is unknown.", "bad_media")
    last, duration = total - 1, total / rate
    if duration <= max_duration:
        indices = [min(last, math.ceil(i * rate / fps)) for i in range(math.floor(duration * fps))]
    else:
        count = int(max_duration * fps)
        if count >= total:
            return list(range(total))
        indices = [min(last, math.ceil(t * rate)) for t in np.linspace(0, duration, count)]
    return sorted(set(indices)) or [0]


def _read_frames(file: Path, wanted: list[int], total: int) -> np.ndarray:
    """uint8 [T, H, W, 3] of the frames with these numbers, as far as they decode."""
    pick = [] if len(wanted) == total else ["-vf", "select=" + "+".join(f"eq(n\\,{i})" for i in wanted)]
    out = ["-frames:v", str(len(wanted)), "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm"]
    data, _ = ffmpeg.run(file, ["-map", "0:v:0", *pick, *out, "-pix_fmt", "rgb24", "pipe:1"])
    frames, at = [], 0
    while at < len(data):  # every frame says its own size: ffmpeg has turned the picture upright already
        magic, size, _, _ = data[at : at + 64].split(b"\n", 3)
        width, height = map(int, size.split())
        at += len(magic) + len(size) + len(b"255") + 3
        frames.append(np.frombuffer(data, np.uint8, width * height * 3, at).reshape(height, width, 3))
        at += width * height * 3
    if not frames:
        raise RequestError("Could not open video stream: no frame could be decoded.", "bad_media")
    _same_size([frame.shape for frame in frames])
    return np.stack(frames)
