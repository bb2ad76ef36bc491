"""Qwen3-VL: pictures as patches of a stretched table of positions; clips as frames, each with its time in words."""

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
from mmjax.processors.qwen_vl import PixelBounds, QwenVLProcessor, smart_resize
from mmjax.processors.resize import table_coords
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)

FPS = 2.0  # at which clips are sampled, and taken to be where nothing is known of them
FEWEST_FRAMES, MOST_FRAMES = 4, 768


@dataclasses.dataclass(frozen=True, eq=False)
class VideoItem(MediaItem):
    """A video. wrapped: whether a start and an end remain around all its frames."""

    wrapped: bool = False


class Processor(QwenVLProcessor):
    """See `mmjax.processors.base.Processor`. `times` of a clip: seconds, in the middle between a step's frames.

    keep_video_wrapper: leave the start and end tokens of the placeholder around a clip's frames, as transformers has
    done since 5.10. By default they are consumed, as when the models were made.
    """

    default_bounds: Mapping[str, PixelBounds] = {"image": (256 * 256, 4096 * 4096), "video": (64 * 64, 24 * 1024**2)}
    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps", "num_frames", "do_sample_frames", "keep_video_wrapper"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.tokenizer = tokenizer
        self.position_grid = round(config["vision_config"]["num_position_embeddings"] ** 0.5)
        self.start, self.end = config["vision_start_token_id"], config["vision_end_token_id"]

    def resized_size(self, modality: str, frames: int, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
        """The area of a clip counts all its frames, and none is smaller than a row."""
        factor = self.patch_size * self.merge_size
        if modality == "video":
            frames = max(frames, self.temporal_patch_size)
            if min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
        return smart_resize(height, width, factor, *bounds, frames)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """As `PatchProcessor.item`, with `table` f32[U, 2]; a clip is sampled first if its metadata asks for it."""
        if not isinstance(media, Video):
            return super().process_item(modality, media, kwargs)
        item = super().process_item(modality, sample_frames(media, kwargs), kwargs)
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        return VideoItem(**fields, wrapped=bool(kwargs.get("keep_video_wrapper", False)))

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Where each patch is in the table of positions."""
        return features | {"position_coords": table_coords(features["patch_coords"], grid, self.position_grid)}

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Seconds half-way between the first and the last frame of each step."""
        rate, indices = source_timing(video, kwargs)
        indices = [*indices, *indices[-1:] * (-len(indices) % self.temporal_patch_size)]
        return self._middles(np.asarray(indices, np.float64) / rate)

    def _middles(self, seconds: np.ndarray) -> tuple[float, ...]:
        firsts = seconds.reshape(-1, self.temporal_patch_size)
        return tuple(((firsts[:, 0] + firsts[:, -1]) / 2).tolist())

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One pad token per row of each image; for a clip the time and a start, pads and end of each of its frames."""
        image = {"image": self.placeholder_ids["image"]}
        expanded = expand_placeholders(token_ids, items, image, self.placeholder_text)
        token_ids, spans = expanded.token_ids, expanded.spans
        clips, pad = items.get("video", ()), self.placeholder_ids["video"]
        found = np.flatnonzero(np.asarray(token_ids, np.int64) == pad).tolist()
        if len(found) == sum(clip.num_embeds for clip in clips) and not self._bare(token_ids, found, clips):
            return ExpandedPrompt(token_ids, sorted(spans + self._runs(found, clips), key=lambda span: span.start))
        if len(found) != len(clips):
            raise placeholder_mismatch("video", len(clips), len(found), self.placeholder_text["video"])
        out: list[int] = []
        placed: list[PlaceholderSpan] = []
        done = 0
        for index, (at, clip) in enumerate(zip(found, clips, strict=True)):
            begin, rest = at, at + 1
            wrapped = token_ids[max(at - 1, 0) : at] == [self.start] and token_ids[at + 1 : at + 2] == [self.end]
            if wrapped and not getattr(clip, "wrapped", False):
                begin, rest = at - 1, at + 2
            moved = len(out) - done
            placed += [dataclasses.replace(s, start=s.start + moved) for s in spans if done <= s.start < begin]
            out += token_ids[done:begin]
            length = clip.num_embeds // clip.grid[0]
            for step, words in enumerate(self._stamps(clip)):
                out += [*words, self.start]
                placed.append(PlaceholderSpan(len(out), length, "video", index, step * length))
                out += [*[pad] * length, self.end]
            done = rest
        moved = len(out) - done
        placed += [dataclasses.replace(s, start=s.start + moved) for s in spans if s.start >= done]
        return ExpandedPrompt(out + token_ids[done:], placed)

    def _bare(self, tokens: Sequence[int], found: Sequence[int], clips: Sequence[MediaItem]) -> bool:
        """Whether the pads found are placeholders, where clips have but one row each: then no time is before them."""
        if len(found) != len(clips) or self.tokenizer is None or not clips:
            return False
        words = self._stamps(clips[0])[0]
        return list(tokens[max(found[0] - 1 - len(words), 0) : max(found[0] - 1, 0)]) != words

    def _runs(self, found: Sequence[int], clips: Sequence[MediaItem]) -> list[PlaceholderSpan]:
        """Spans of a prompt that comes expanded. RequestError where the runs of pads do not fit the frames."""
        spans, at = [], 0
        for index, clip in enumerate(clips):
            length = clip.num_embeds // clip.grid[0]
            for step in range(clip.grid[0]):
                run = found[at : at + length]
                if run[-1] - run[0] != length - 1:
                    raise placeholder_mismatch("video", len(clips), len(found), self.placeholder_text["video"])
                spans.append(PlaceholderSpan(run[0], length, "video", index, step * length))
                at += length
        return spans

    def _stamps(self, clip: MediaItem) -> list[list[int]]:
        """The time of each step in tokens."""
        if self.tokenizer is None:
            raise RequestError("Without a tokenizer a prompt with videos must come with their times.", "no_tokenizer")
        times = clip.frame_times or self._middles(np.arange(clip.grid[0] * self.temporal_patch_size) / FPS)
        return [self.tokenizer.encode(f"<{seconds:.1f} seconds>", add_special_tokens=False) for seconds in times]

    def span_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """Every frame of a clip counts like a picture by itself."""
        return np.indices((1, *item.grid[1:]), dtype=np.int32).reshape(3, -1)


def source_timing(video: Video, kwargs: ProcessorKwargs) -> tuple[float, list[int]]:
    """(frames per second of the source, index in it of each frame); `fps` counts where the clip itself says nothing."""
    known = video.metadata
    rate = known.get("fps") or kwargs.get("fps")
    if not rate:
        log.warning("a video came without metadata: its prompt will tell the time as if it had %g frames a second", FPS)
    indices = known.get("frames_indices")
    if indices is None or len(indices) != len(video.frames):
        indices = range(len(video.frames))
    return float(rate or FPS), [int(index) for index in indices]


def sample_frames(video: Video, kwargs: ProcessorKwargs) -> Video:
    """The clip's frames at `fps` a second, or `num_frames` of them, where it has all of the source's and says so."""
    if not kwargs.get("do_sample_frames", video.metadata.get("do_sample_frames", False)):
        return video
    if kwargs.get("num_frames") and kwargs.get("fps"):
        raise RequestError("mm_processor_kwargs: fps and num_frames exclude each other.", "bad_kwargs")
    total, (rate, indices) = len(video.frames), source_timing(video, {})
    wanted = kwargs.get("num_frames") or int(total / rate * kwargs.get("fps", FPS))
    count = min(max(wanted, FEWEST_FRAMES), MOST_FRAMES, total)
    kept = np.linspace(0, total - 1, count).round().astype(int)
    metadata = {**video.metadata, "fps": rate, "frames_indices": [indices[i] for i in kept]}
    return Video(video.frames[kept], metadata)
