"""Videos to frames: lists of images, arrays of either layout, and files with the two published rules of sampling."""

import dataclasses
import logging
import math
import numbers
import operator
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.multimodal import ffmpeg, image
from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.types import RequestError

log = logging.getLogger(__name__)

BACKENDS = ("opencv", "opencv_dynamic")  # names of sampling rules; both decode with ffmpeg
LEAST, LARGEST = 1e-6, 2**31 - 1  # of any rate, count or frame number
LONGEST_FILTER = 100_000  # characters; an argument of a program may have 128 KiB


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames uint8 [T, H, W, 3] and what is known of their source: total_num_frames, fps, duration (s), video_backend,
    frames_indices, do_sample_frames. Metadata is empty when the caller gave none."""

    frames: np.ndarray
    metadata: Mapping[str, Any]


def decode(media: Any, *, background: image.Color = image.WHITE, limits: MediaLimits = DEFAULT) -> Video:
    """What a caller may pass as one video: a list of PIL images or 3-D arrays, a 4-D array, or (those, metadata)."""
    frames, metadata = media if isinstance(media, tuple) and len(media) == 2 else (media, {})
    if not isinstance(metadata, Mapping):
        raise RequestError(f"Video metadata must be a dictionary, got {type(metadata).__name__}.", "bad_media")
    stacked = _frames(frames, background, limits)
    return Video(stacked, _checked(metadata, len(stacked)))


def _frames(frames: Any, background: image.Color, limits: MediaLimits) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    if is_array(frames):
        array = to_numpy(frames)
        if array.ndim != 4:
            raise RequestError(
                f"A video array must be (frames, height, width, channels) or (frames, channels, height, width), got "
                f"shape {array.shape}.",
                "bad_media",
            )
        return image.frames_from_array(array, "video", background=background)
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
            return image.frames_from_array(np.stack(arrays), "video", background=background)
    pictures = [np.asarray(image.decode(frame, background=background, limits=limits)) for frame in frames]
    _same_size([picture.shape for picture in pictures])
    return np.stack(pictures)


def _checked(metadata: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Metadata whose known values are what processors may rely on: positive rates, one frame number for each frame."""
    made = dict(metadata)
    for name in ("fps", "duration", "total_num_frames"):
        value = made.get(name)
        least = 0 if name == "duration" else LEAST
        if value is not None and not (_is_number(value) and least <= value <= LARGEST):
            raise RequestError(f"Video metadata: {name} must be a positive number, got {value!r}.", "bad_media")
    indices = made.get("frames_indices")
    if indices is not None:
        try:
            given = to_numpy(indices).tolist() if is_array(indices) else indices
            made["frames_indices"] = [operator.index(index) for index in given]
        except TypeError as error:
            raise RequestError("Video metadata: frames_indices must be a list of integers.", "bad_media") from error
        numbers_of = made["frames_indices"]
        if len(numbers_of) != count or min(numbers_of) < 0 or max(numbers_of) > LARGEST:
            raise RequestError(
                f"Video metadata: frames_indices must number each of the {count} frames that are given, from 0 up.",
                "bad_media",
            )
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _same_size(shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise RequestError(
            f"All frames of a video must have the same size, got {sorted(set(shapes))[:4]}.", "bad_media"
        )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a video file are wanted.

    `opencv`: at most `num_frames` (-1: all), evenly spread, and with `fps` above 0 at most that many per second.
    `opencv_dynamic`: `fps` per second (default 2), of clips longer than `max_duration` seconds that many in all.
    `frame_recovery`: a frame that cannot be decoded is replaced by the next that can, before the next wanted one, and
    at the end of a damaged stream by the last that can. RequestError for unusable values.
    """

    num_frames: int = 32
    fps: float | None = None
    max_duration: float = 300
    video_backend: str = "opencv"
    frame_recovery: bool = False

    def __post_init__(self) -> None:
        if self.video_backend not in BACKENDS:
            raise _bad_option(f"Extension class {self.video_backend} not found; video_backend is one of {BACKENDS}.")
        count = self.num_frames
        if isinstance(count, bool) or not isinstance(count, int) or count < -1 or count == 0:
            raise _bad_option(f"num_frames must be greater than 0 or -1, got {count!r}.")
        for name, value in (("fps", -1 if self.fps is None else self.fps), ("max_duration", self.max_duration)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                raise _bad_option(f"{name} must be a finite number, got {value!r}.")
        if not isinstance(self.frame_recovery, bool):
            raise _bad_option(f"frame_recovery must be true or false, got {self.frame_recovery!r}.")
        if self.video_backend == "opencv_dynamic" and (
            (self.fps is not None and self.fps <= 0) or self.max_duration <= 0
        ):
            raise _bad_option("opencv_dynamic needs fps and max_duration above 0.")

    def indices(self, total: int, rate: float) -> list[int]:
        """Numbers of the wanted frames, ascending, of `total` at `rate` per second."""
        if self.video_backend == "opencv":
            return uniform_indices(total, rate, self.num_frames, -1 if self.fps is None else self.fps)
        return timed_indices(total, rate, 2 if self.fps is None else self.fps, self.max_duration)


def _bad_option(words: str) -> RequestError:
    return RequestError(words, "bad_media_kwargs")


def uniform_indices(total: int, rate: float, num_frames: int, fps: float) -> list[int]:
    """Evenly spaced frames, first and last included; bounded by `num_frames` and by `fps` per second where positive."""
    count = min(num_frames, total) if num_frames > 0 else total
    if fps > 0:
        count = math.floor(min(count, (total / rate if rate else 0) * fps))
    count = max(1, count)
    return list(range(total)) if count == total else np.linspace(0, total - 1, count).astype(int).tolist()


def timed_indices(total: int, rate: float, fps: float, max_duration: float) -> list[int]:
    """A frame every 1/fps seconds; of clips longer than `max_duration`, that many evenly spread, the end included."""
    if rate <= 0:
        raise RequestError("Could not open video stream: its frame rate is unknown.", "bad_media")
    last, duration = total - 1, total / rate
    if duration <= max_duration and fps >= rate:  # however many are asked for, there are no more
        indices = list(range(total))
    elif duration <= max_duration:
        indices = [min(last, math.ceil(i * rate / fps)) for i in range(math.floor(duration * fps))]
    else:
        if max_duration * fps >= total:
            return list(range(total))
        count = int(max_duration * fps)
        indices = [min(last, math.ceil(t * rate)) for t in np.linspace(0, duration, count)]
    return sorted(set(indices)) or [0]


def load(source: bytes | Path, sampling: Sampling = Sampling(), *, limits: MediaLimits = DEFAULT) -> Video:
    """Decode a video file, keeping only the sampled frames. Frames that cannot be decoded or recovered are left out,
    with a warning. RequestError for a file without any, and for more than the limits allow."""
    with tempfile.TemporaryDirectory(prefix="mmjax-") as folder, ffmpeg.as_file(source, Path(folder)) as file:
        try:
            stream = ffmpeg.probe_video(file)
            if not stream.frames:
                raise RequestError("Could not open video stream: it has no frames.", "bad_media")
            found, total, rate = _sample(file, stream, sampling, limits)
        except (subprocess.SubprocessError, OSError) as error:
            raise RequestError("Could not open video stream.", "bad_media") from error
    kept = sorted(found)
    return Video(
        _stack([found[index] for index in kept]),
        {
            "total_num_frames": total,
            "duration": total / rate if rate else 0,
            "video_backend": sampling.video_backend,
            "frames_indices": kept,
            "do_sample_frames": len(kept) == total,
        }
        | ({"fps": rate} if rate else {}),
    )


def _sample(
    file: Path, stream: ffmpeg.Stream, sampling: Sampling, limits: MediaLimits
) -> tuple[dict[int, np.ndarray], int, float]:
    """(frame by its number, frames of the stream, frames per second)."""
    wanted = sampling.indices(stream.frames, stream.rate)
    _check_amount(len(wanted), stream.frame_bytes, limits)
    found = _read(file, stream, wanted, limits)
    missing = [index for index in wanted if index not in found]
    stamps = stream.stamps
    if missing and stamps and not ffmpeg.is_damaged(file):  # those packets hold no frame of their own
        stamps = ffmpeg.decodable(file)
        stream = stream._replace(frames=len(stamps), stamps=stamps)
        wanted = sampling.indices(stream.frames, stream.rate) if stamps else []
        found = _read(file, stream, wanted, limits)
    elif missing and stamps and sampling.frame_recovery:
        number = {stamp: index for index, stamp in enumerate(stamps)}
        good = [number[stamp] for stamp in ffmpeg.decodable(file) if stamp in number]
        found |= _read(file, stream, replacements(wanted, missing, good), limits)
    if not found:
        raise RequestError("Could not open video stream: no frame could be decoded.", "bad_media")
    if len(found) < len(wanted):
        log.warning("%d of %d sampled video frames could not be decoded", len(wanted) - len(found), len(wanted))
    return found, stream.frames, stream.rate


def replacements(wanted: list[int], missing: list[int], good: list[int]) -> list[int]:
    """Frames to take for the `missing` ones of those `wanted`, out of the `good` ones; all ascending.

    The first good frame before the next wanted one; where no good frame follows at all, the last good one that comes
    after every frame taken so far.
    """
    lost, taken = set(missing), []
    last = -1  # the latest frame in the result
    for index, after in zip(wanted, [*wanted[1:], math.inf], strict=True):
        if index not in lost:
            last = index
            continue
        choices = [frame for frame in good if index < frame < after]
        if not choices and (not good or good[-1] < index):
            choices = [frame for frame in good[-1:] if frame > last]
        if choices:
            last = choices[0]
            taken.append(last)
    return taken


def _check_amount(count: int, frame_bytes: int, limits: MediaLimits) -> None:
    if limits.video_frames and count > limits.video_frames:
        raise RequestError(
            f"{count} frames of this video are wanted, over the limit of {limits.video_frames}. Lower num_frames or "
            "fps.",
            "media_too_large",
        )
    if limits.video_bytes and count * frame_bytes > limits.video_bytes:
        raise RequestError(
            f"{count} frames of this video need {count * frame_bytes} bytes, over the limit of {limits.video_bytes}. "
            "Lower num_frames or fps.",
            "media_too_large",
        )


def _read(file: Path, stream: ffmpeg.Stream, wanted: list[int], limits: MediaLimits) -> dict[int, np.ndarray]:
    """Frame by its number, as far as the wanted ones decode."""
    if not wanted:
        return {}
    stamps = stream.stamps
    names = [stamps[index] for index in wanted] if stamps else wanted  # as the filter knows the frames
    select: str | None = "+".join(f"eq({'pts' if stamps else 'n'},{name})" for name in names)
    if len(wanted) == stream.frames or (select and len(select) > LONGEST_FILTER):
        select = None
    number = dict(zip(names, wanted, strict=True))
    found: dict[int, np.ndarray] = {}
    held = 0
    with ffmpeg.Decoding(file, select) as decoding:
        for count, (stamp, frame) in enumerate(decoding):
            name = stamp if stamps else names[min(count, len(names) - 1)] if select else count
            if name not in number:
                continue
            found[number[name]] = frame
            held += frame.nbytes
            if limits.video_bytes and held > limits.video_bytes:  # the stream said less
                _check_amount(len(found) + 1, frame.nbytes, limits)
            if len(found) == len(wanted):
                break
    return found


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    _same_size([frame.shape for frame in frames])
    return np.stack(frames)
