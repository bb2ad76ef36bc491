"""Qwen3-VL: images as patches with interpolated positions; videos as frames, each with its time as text."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    expand_placeholders,
    placeholder_mismatch,
)
from mmjax.processors.qwen_vl import PixelBounds, QwenVLProcessor, position_coords, smart_resize
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)

DEFAULT_FPS = 2.0  # at which videos are sampled, and of videos without metadata
MIN_FRAMES, MAX_FRAMES = 4, 768  # bounds of the number that a rate gives; `num_frames` is taken as it is


@dataclasses.dataclass(frozen=True, eq=False)
class VideoItem(MediaItem):
    """A video. wrapped: whether the placeholder's start and end tokens remain around all its frames."""

    wrapped: bool = False


class Processor(QwenVLProcessor):
    """See `mmjax.processors.base.Processor`.

    keep_video_wrapper: leave the start and end tokens of the placeholder around a video's frames, as transformers has
    done since 5.10. By default they are replaced too, as when the models were trained.
    """

    default_bounds: Mapping[str, PixelBounds] = {"image": (256 * 256, 4096 * 4096), "video": (64 * 64, 24 * 1024**2)}
    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps", "num_frames", "do_sample_frames", "keep_video_wrapper"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.tokenizer = tokenizer
        self.position_grid = round(config["vision_config"]["num_position_embeddings"] ** 0.5)
        self.start_id, self.end_id = config["vision_start_token_id"], config["vision_end_token_id"]

    def resized_size(self, modality: str, frames: int, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
        """The area of a video counts all its frames, and no frame is smaller than an embedding."""
        factor = self.patch_size * self.merge_size
        if modality == "video":
            frames = max(frames, self.temporal_patch_size)
            if min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
        return smart_resize(height, width, factor, *bounds, frames)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """See `QwenVLProcessor.process_item`; a video is sampled first if its metadata says so."""
        if not isinstance(media, Video):
            return super().process_item(modality, media, kwargs)
        item = super().process_item(modality, sample_frames(media, kwargs), kwargs)
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        return VideoItem(**fields, wrapped=bool(kwargs.get("keep_video_wrapper", False)))

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """With position_coords."""
        return features | {"position_coords": position_coords(features["patch_coords"], grid, self.position_grid)}

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Seconds in the middle between the first and the last frame of each step."""
        rate, indices = source_timing(video, kwargs)
        indices = [*indices, *indices[-1:] * (-len(indices) % self.temporal_patch_size)]
        return self._middles(np.asarray(indices, np.float64) / rate)

    def _middles(self, seconds: np.ndarray) -> tuple[float, ...]:
        firsts = seconds.reshape(-1, self.temporal_patch_size)
        return tuple(((firsts[:, 0] + firsts[:, -1]) / 2).tolist())

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One pad token per embedding of each image; for each step of a video its time, a start, pads and an end."""
        image = {"image": self.placeholder_ids["image"]}
        expanded = expand_placeholders(token_ids, items, image, self.placeholder_text)
        token_ids, spans = expanded.token_ids, expanded.spans
        videos, pad = items.get("video", ()), self.placeholder_ids["video"]
        found = np.flatnonzero(np.asarray(token_ids, np.int64) == pad).tolist()
        if len(found) == sum(video.num_embeds for video in videos) and not self._unexpanded(token_ids, found, videos):
            video_spans = self._expanded_spans(found, videos)
            return ExpandedPrompt(token_ids, sorted(spans + video_spans, key=lambda span: span.start))
        if len(found) != len(videos):
            raise placeholder_mismatch("video", len(videos), len(found), self.placeholder_text["video"])
        out: list[int] = []
        out_spans: list[PlaceholderSpan] = []
        done = 0
        for index, (at, video) in enumerate(zip(found, videos, strict=True)):
            begin, end = at, at + 1
            wrapped = token_ids[max(at - 1, 0) : at] == [self.start_id] and token_ids[at + 1 : at + 2] == [self.end_id]
            if wrapped and not getattr(video, "wrapped", False):
                begin, end = at - 1, at + 2
            shift = len(out) - done
            out_spans += [dataclasses.replace(s, start=s.start + shift) for s in spans if done <= s.start < begin]
            out += token_ids[done:begin]
            length = video.num_embeds // video.grid[0]
            for step, time_ids in enumerate(self._time_tokens(video)):
                out += [*time_ids, self.start_id]
                out_spans.append(PlaceholderSpan(len(out), length, "video", index, step * length))
                out += [*[pad] * length, self.end_id]
            done = end
        shift = len(out) - done
        out_spans += [dataclasses.replace(s, start=s.start + shift) for s in spans if s.start >= done]
        return ExpandedPrompt(out + token_ids[done:], out_spans)

    def _unexpanded(self, tokens: Sequence[int], found: Sequence[int], videos: Sequence[MediaItem]) -> bool:
        """Whether the pads found are placeholders where each video has one embedding: then no time is before them."""
        if len(found) != len(videos) or self.tokenizer is None or not videos:
            return False
        time_ids = self._time_tokens(videos[0])[0]
        return list(tokens[max(found[0] - 1 - len(time_ids), 0) : max(found[0] - 1, 0)]) != time_ids

    def _expanded_spans(self, found: Sequence[int], videos: Sequence[MediaItem]) -> list[PlaceholderSpan]:
        """Spans of a prompt that comes expanded. RequestError where the runs of pads do not fit the frames."""
        spans, at = [], 0
        for index, video in enumerate(videos):
            length = video.num_embeds // video.grid[0]
            for step in range(video.grid[0]):
                run = found[at : at + length]
                if run[-1] - run[0] != length - 1:
                    raise placeholder_mismatch("video", len(videos), len(found), self.placeholder_text["video"])
                spans.append(PlaceholderSpan(run[0], length, "video", index, step * length))
                at += length
        return spans

    def _time_tokens(self, video: MediaItem) -> list[list[int]]:
        """The time of each step, as tokens."""
        if self.tokenizer is None:
            raise RequestError("Without a tokenizer a prompt with videos must come with their times.", "no_tokenizer")
        frames = np.arange(video.grid[0] * self.temporal_patch_size)
        times = video.frame_times or self._middles(frames / DEFAULT_FPS)
        return [self.tokenizer.encode(f"<{seconds:.1f} seconds>", add_special_tokens=False) for seconds in times]

    def span_rope_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """Every frame of a video has the positions of an image."""
        return np.indices((1, *item.grid[1:]), dtype=np.int32).reshape(3, -1)


def source_timing(video: Video, kwargs: ProcessorKwargs) -> tuple[float, list[int]]:
    """(frames per second of the source, index in it of each frame); by `fps` where the metadata does not say."""
    rate = video.metadata.get("fps") or kwargs.get("fps")
    if not rate:
        log.warning(
            "a video came without metadata: its prompt will tell the time as if it had %g frames a second", DEFAULT_FPS
        )
    indices = video.metadata.get("frames_indices")
    if indices is None or len(indices) != len(video.frames):
        indices = range(len(video.frames))
    return float(rate or DEFAULT_FPS), [int(index) for index in indices]


def sample_frames(video: Video, kwargs: ProcessorKwargs) -> Video:
    """The video at `fps` or with `num_frames` frames, if do_sample_frames says that it has all frames of the source.

    Like the published processor, more frames than the video has repeat some. RequestError for more than MAX_FRAMES of
    such."""
    if not kwargs.get("do_sample_frames", video.metadata.get("do_sample_frames", False)):
        return video
    if kwargs.get("num_frames") and kwargs.get("fps"):
        raise RequestError("mm_processor_kwargs: fps and num_frames exclude each other.", "bad_kwargs")
    total, (rate, indices) = len(video.frames), source_timing(video, {})
    count = kwargs.get("num_frames")
    if count is None:
        count = min(max(int(total / rate * kwargs.get("fps", DEFAULT_FPS)), MIN_FRAMES), MAX_FRAMES, total)
    elif count > max(total, MAX_FRAMES):
        raise RequestError(
            f"mm_processor_kwargs: num_frames is {count}, but the video has {total} frames. Lower it to at most "
            f"{max(total, MAX_FRAMES)}.",
            "bad_kwargs",
        )
    sampled = np.linspace(0, total - 1, count).round().astype(int)
    metadata = {**video.metadata, "fps": rate, "frames_indices": [indices[i] for i in sampled]}
    return Video(video.frames[sampled], metadata)
