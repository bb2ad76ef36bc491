"""Converts videos to frames: lists of images, arrays of either layout, and files, from which frames are sampled."""

import dataclasses
import logging
import math
import numbers
import operator
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.multimodal import ffmpeg, image
from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.types import RequestError

log = logging.getLogger(__name__)

BACKENDS = ("opencv", "opencv_dynamic")  # vLLM's names of two sampling rules; both decode with ffmpeg
MAX_NUMBER = 2**31 - 1  # of any size, count, area, rate or frame index
MIN_RATE = 1e-6  # frames per second; with fewer, timestamps exceed the range of positions
MAX_FILTER_CHARS = 100_000  # an argument of a program may be 128 KiB long


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames uint8 [T, H, W, 3] and metadata of their source: total_num_frames, fps, duration (s), video_backend,
    frames_indices, do_sample_frames. Metadata is empty when the caller gave none."""

    frames: np.ndarray
    metadata: Mapping[str, Any]


def decode(media: Any, *, background: image.Color = image.WHITE, limits: MediaLimits = DEFAULT) -> Video:
    """One video, in any form that callers may pass: a list of PIL images or 3-D arrays, a 4-D array, or (one of these,
    metadata)."""
    frames, metadata = media if isinstance(media, tuple) and len(media) == 2 else (media, {})
    if not isinstance(metadata, Mapping):
        raise RequestError(f"Video metadata must be a dictionary, got {type(metadata).__name__}.", "bad_media")
    array = _to_array(frames, background, limits)
    return Video(array, _check_metadata(metadata, len(array)))


def _to_array(frames: Any, background: image.Color, limits: MediaLimits) -> np.ndarray:
    """Frames of any form as uint8 [T, H, W, 3]."""
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
        _check_same_size([array.shape for array in arrays])
        if arrays[0].ndim == 3:
            return image.frames_from_array(np.stack(arrays), "video", background=background)
    images = [np.asarray(image.decode(frame, background=background, limits=limits)) for frame in frames]
    return _stack(images)


def _check_metadata(metadata: Mapping[str, Any], num_frames: int) -> dict[str, Any]:
    """Check what processors rely on in metadata: positive rates, and one index per frame."""
    checked = dict(metadata)
    for name in ("fps", "duration", "total_num_frames"):
        value = checked.get(name)
        least = 0 if name == "duration" else MIN_RATE
        if value is not None and not (_is_number(value) and least <= value <= MAX_NUMBER):
            raise RequestError(f"Video metadata: {name} must be a positive number, got {value!r}.", "bad_media")
    indices = checked.get("frames_indices")
    if indices is not None:
        try:
            given = to_numpy(indices).tolist() if is_array(indices) else indices
            checked["frames_indices"] = found = [operator.index(index) for index in given]
        except TypeError as error:
            raise RequestError("Video metadata: frames_indices must be a list of integers.", "bad_media") from error
        if len(found) != num_frames or min(found) < 0 or max(found) > MAX_NUMBER:
            raise RequestError(
                f"Video metadata: frames_indices must number each of the {num_frames} frames that are given, from 0 "
                "up.",
                "bad_media",
            )
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_same_size(shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise RequestError(
            f"All frames of a video must have the same size, got {sorted(set(shapes))[:4]}.", "bad_media"
        )


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    _check_same_size([frame.shape for frame in frames])
    return np.stack(frames)


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video file to sample. RequestError for invalid values.

    video_backend "opencv": at most num_frames (-1: all), evenly spaced, and if fps is above 0, at most that many per
    second. "opencv_dynamic": fps frames per second (default 2); of videos longer than max_duration seconds, as many as
    of a video that long. frame_recovery: a frame that cannot be decoded is replaced by the next one that can, unless
    that comes after the next sampled frame; at the end of a damaged stream, by the last one that can.
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
        """The indices of the sampled frames, ascending, out of `total` at `rate` per second."""
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
    """A frame every 1/fps seconds. Of videos longer than max_duration, as many as of a video that long."""
    if rate <= 0:
        raise RequestError("Could not open video stream: its frame rate is unknown.", "bad_media")
    last, duration = total - 1, total / rate
    if duration <= max_duration and fps >= rate:  # there are no more frames than these
        indices = list(range(total))
    elif duration <= max_duration:
        indices = [min(last, math.ceil(i * rate / fps)) for i in range(math.floor(duration * fps))]
    else:
        if max_duration * fps >= total:
            return list(range(total))
        count = int(max_duration * fps)
        indices = [min(last, math.ceil(t * rate)) for t in np.linspace(0, duration, count)]
    return sorted(set(indices)) or [0]


def load(source: bytes | Path, sampling: FrameSampling = FrameSampling(), *, limits: MediaLimits = DEFAULT) -> Video:
    """Decode the sampled frames of a video file. Frames that can be neither decoded nor replaced are left out, with a
    warning. RequestError for a file without frames, and for more than the limits allow."""
    with tempfile.TemporaryDirectory(prefix="mmjax-") as folder, ffmpeg.as_file(source, Path(folder)) as file:
        try:
            stream = ffmpeg.probe_video(file)
            if not stream.frames:
                raise RequestError("Could not open video stream: it has no frames.", "bad_media")
            found, total, rate = _sample(file, stream, sampling, limits)
        except subprocess.TimeoutExpired as error:
            raise RequestError(
                f"Decoding this video takes more than {error.timeout:.0f} seconds. Send a shorter one, or a smaller "
                "resolution.",
                "media_too_large",
            ) from error
        except (subprocess.SubprocessError, OSError) as error:
            raise RequestError("Could not open video stream.", "bad_media") from error
    indices = sorted(found)
    return Video(
        _stack([found[index] for index in indices]),
        {
            "total_num_frames": total,
            "duration": total / rate if rate else 0,
            "video_backend": sampling.video_backend,
            "frames_indices": indices,
            "do_sample_frames": len(indices) == total,
        }
        | ({"fps": rate} if rate else {}),
    )


def _sample(
    file: Path, stream: ffmpeg.VideoStream, sampling: FrameSampling, limits: MediaLimits
) -> tuple[dict[int, np.ndarray], int, float]:
    """(frames by index, frames in the stream, frames per second)."""
    wanted = sampling.indices(stream.frames, stream.rate)
    _check_num_frames(len(wanted), stream.frame_bytes, limits)
    found = _read(file, stream, wanted, limits)
    missing = [index for index in wanted if index not in found]
    timestamps = stream.timestamps
    if missing and timestamps and not ffmpeg.is_damaged(file):  # some packets contain no frame
        timestamps = ffmpeg.decodable_timestamps(file)
        stream = stream._replace(frames=len(timestamps), timestamps=timestamps)
        wanted = sampling.indices(stream.frames, stream.rate) if timestamps else []
        found = _read(file, stream, wanted, limits)
    elif missing and timestamps and sampling.frame_recovery:
        index_of = {timestamp: index for index, timestamp in enumerate(timestamps)}
        decodable = [index_of[each] for each in ffmpeg.decodable_timestamps(file) if each in index_of]
        found |= _read(file, stream, replacements(wanted, missing, decodable), limits)
    if not found:
        raise RequestError("Could not open video stream: no frame could be decoded.", "bad_media")
    if len(found) < len(wanted):
        log.warning("%d of %d sampled video frames could not be decoded", len(wanted) - len(found), len(wanted))
    return found, stream.frames, stream.rate


def replacements(wanted: list[int], missing: list[int], decodable: list[int]) -> list[int]:
    """Indices of the frames that replace the missing ones of those wanted, out of the decodable ones; all ascending.

    A missing frame is replaced by the first decodable one before the next wanted one; if no decodable frame follows,
    by the last decodable one, provided that it comes after every frame used so far.
    """
    is_missing, replaced = set(missing), []
    last = -1  # the last frame in the result
    for index, after in zip(wanted, [*wanted[1:], math.inf], strict=True):
        if index not in is_missing:
            last = index
            continue
        choices = [frame for frame in decodable if index < frame < after]
        if not choices and (not decodable or decodable[-1] < index):
            choices = [frame for frame in decodable[-1:] if frame > last]
        if choices:
            last = choices[0]
            replaced.append(last)
    return replaced


def _check_num_frames(count: int, frame_bytes: int, limits: MediaLimits) -> None:
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


def _read(file: Path, stream: ffmpeg.VideoStream, wanted: list[int], limits: MediaLimits) -> dict[int, np.ndarray]:
    """Those of the wanted frames that can be decoded, by index."""
    found: dict[int, np.ndarray] = {}
    for batch, select in _batches(stream, wanted):
        for index, frame in _read_batch(file, stream, batch, select):
            found[index] = frame
            if limits.video_bytes and len(found) * frame.nbytes > limits.video_bytes:  # larger than the header says
                _check_num_frames(len(found) + 1, frame.nbytes, limits)
    return found


def _batches(stream: ffmpeg.VideoStream, wanted: list[int]) -> Iterator[tuple[list[int], str | None]]:
    """The wanted frames with the filter that selects them, None for all. As few batches as possible, because each
    decodes the file from its start."""
    if not wanted or len(wanted) == stream.frames:
        yield from [(wanted, None)] if wanted else []
        return
    keys = [stream.timestamps[index] for index in wanted] if stream.timestamps else wanted
    select = ffmpeg.select_expression("pts" if stream.timestamps else "n", keys)
    if len(select) <= MAX_FILTER_CHARS or len(wanted) == 1:
        yield wanted, select
    else:
        middle = len(wanted) // 2
        yield from _batches(stream, wanted[:middle])
        yield from _batches(stream, wanted[middle:])


def _read_batch(
    file: Path, stream: ffmpeg.VideoStream, batch: list[int], select: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, frame) of those of a batch that can be decoded."""
    timestamps = stream.timestamps
    index_of = {timestamps[index]: index for index in batch} if timestamps else {}
    with ffmpeg.FrameDecoder(file, select) as decoder:
        for count, (timestamp, frame) in enumerate(decoder):
            index = index_of.pop(timestamp, None) if timestamps else batch[count]
            if index is not None:
                yield index, frame
            if not index_of and (timestamps or count + 1 == len(batch)):
                break
