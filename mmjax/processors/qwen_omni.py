"""Media of the Omni families on one time axis: audio in chunks, images, and videos with their sound track."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.hf_config import VIDEO_PREPROCESSOR, audio_options, canonical
from mmjax.mel import LogMel
from mmjax.multimodal.video import Video
from mmjax.processors.audio_in_video import AudioInVideoExpander, EmbedRun, Items
from mmjax.processors.base import ExpandedPrompt, MediaItem, PlaceholderSpan, ProcessorKwargs, expand_placeholders
from mmjax.processors.mel_features import FEATURES, LENGTHS
from mmjax.processors.qwen_vl import QwenVLProcessor, area_bounds, frame_rate
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

NO_METADATA = Video(np.empty((0, 0, 0, 3), np.uint8), {})
WITH_AUDIO_KWARGS = ("use_audio_in_video", "load_audio_from_video")


def audio_fields(
    chunk_frames: int, num_mel_bins: int, chunk_steps: int, *, windows: bool = False
) -> tuple[FeatureField, ...]:
    """One chunk of mel frames per input, of which the encoder makes `chunk_steps` steps.

    audio_frames: how many of its frames are sound. step_index: an embedding's step, or the first of the two whose mean
    it is. windows: for towers whose chunks attend within windows of several; window_ids: the chunk's window;
    num_frames: the frames that its convolutions see, silence behind the sound included.
    """
    fields = [
        FeatureField("mel", (chunk_frames, num_mel_bins), "float32"),
        FeatureField("audio_frames"),
        FeatureField("step_index", axis="embeds", index_stride=chunk_steps),
    ]
    if windows:
        fields.append(FeatureField("num_frames"))
        fields.append(FeatureField("window_ids", pad=-1, is_segment_id=True))
    return tuple(fields)


class OmniProcessor(QwenVLProcessor):
    """What the families share. A family says how it processes audio, how it interleaves a video and its sound, and its
    default frame rate.

    shared_bos_position: the two tokens that open a video with sound share a position, and so do the two that close it.
    thinker: the thinker's part of config.json, which is all of it in a checkpoint of the thinker alone.
    """

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None, "audio": None}
    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps", "images_kwargs", "videos_kwargs", *WITH_AUDIO_KWARGS}
    embed_fields: Mapping[str, tuple[str, ...]] = {**QwenVLProcessor.embed_fields, "audio": (FEATURES, LENGTHS)}
    fps: float
    shared_bos_position: bool

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        config = canonical(config)
        self.thinker = thinker = config.get("thinker_config", config)
        self.positions_per_second: float = thinker["position_id_per_seconds"]
        vision = thinker["vision_config"] | {"tokens_per_second": self.positions_per_second}
        super().__init__(thinker | {"vision_config": vision}, files, tokenizer)
        # The published processors have bounds of their own for videos: preprocessor_config.json is about images, and
        # what transformers 5 saves as their video_processor is a copy of it, which their processors override too.
        self.pixel_bounds["video"] = area_bounds(files.get(VIDEO_PREPROCESSOR, {}), self.default_bounds["video"])
        self.placeholder_ids["audio"] = thinker["audio_token_id"]
        self.chunk_frames: int = 2 * thinker["audio_config"]["n_window"]  # mel frames
        self.audio_bos_id, self.audio_eos_id = thinker["audio_start_token_id"], thinker["audio_end_token_id"]
        prepare = audio_options(files)
        self.sampling_rate = prepare["sampling_rate"]
        self.mel = LogMel.from_hf(prepare)

    def process_audio(self, audio: np.ndarray) -> MediaItem:
        """The item of mono float32 [samples] at the model's rate."""
        raise NotImplementedError

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """The item of log-mel features float32 [bins, frames], as `audio_fields`."""
        raise NotImplementedError

    def split_chunks(self, mel: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [bins, frames] as mel and audio_frames of `audio_fields`. The last chunk may be short, and is padded
        with zeros."""
        frames = mel.shape[1]
        starts = np.arange(0, frames, self.chunk_frames, dtype=np.int32)
        padded = np.zeros((len(starts) * self.chunk_frames, len(mel)), np.float32)
        padded[:frames] = mel.T
        return {
            "mel": padded.reshape(len(starts), self.chunk_frames, -1),
            "audio_frames": np.minimum(self.chunk_frames, frames - starts),
        }

    @property
    def num_mel_bins(self) -> int:
        """Numbers in a mel frame."""
        return self.mel.bins

    def num_audio_embeds(self, samples: int) -> int:
        """Embeddings of a clip; 0 or less when it is too short."""
        raise NotImplementedError

    def interleave(self, video: MediaItem, audio: MediaItem) -> list[EmbedRun]:
        """The order of the embeddings of a video and its sound."""
        raise NotImplementedError

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width), a video (frames, height, width) without sound, or audio (samples,)."""
        if modality == "audio":
            return self.num_audio_embeds(size[0])
        return super().num_embeds(modality, size, _kwargs_of(modality, kwargs))

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """Images and videos: see `QwenVLProcessor.process_item`; audio: see `process_audio`."""
        if modality == "audio":
            if self.num_audio_embeds(len(media)) < 1:
                raise RequestError(
                    f"The audio (len={len(media)}) is too short to be represented inside the model.", "audio_too_short"
                )
            return self.process_audio(media)
        own = _kwargs_of(modality, kwargs)
        return dataclasses.replace(super().process_item(modality, media, own), with_audio=_with_audio(modality, own))

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """See `QwenVLProcessor.item_for_embeds`; a video has times like any other, and may have its sound."""
        own = _kwargs_of(modality, kwargs)
        item = super().item_for_embeds(modality, size, own)
        times = self.frame_times(NO_METADATA, item.grid[0], own) if modality == "video" else ()
        return dataclasses.replace(item, frame_times=times, with_audio=_with_audio(modality, own))

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Seconds at which the steps begin, by `fps` or else at the family's frame rate. Like the published processors,
        this ignores the video's metadata."""
        seconds = self.temporal_patch_size / frame_rate(NO_METADATA, kwargs, self.fps)
        return tuple(step * seconds for step in range(steps))

    def step_times(self, video: MediaItem) -> tuple[float, ...]:
        """Seconds at which the steps of a video begin, at the default frame rate where they are unknown."""
        return video.frame_times or tuple(step * self.temporal_patch_size / self.fps for step in range(video.grid[0]))

    def expand_prompt(self, token_ids: Sequence[int], items: Items) -> ExpandedPrompt:
        """A token per embedding of each item; those of videos with sound are interleaved with their sound's."""
        placeholders = self.placeholder_ids, self.placeholder_text
        if any(video.with_audio for video in items.get("video", ())):
            expander = AudioInVideoExpander(*placeholders, self.audio_bos_id, self.audio_eos_id, self.interleave)
            return expander.expand(token_ids, items)
        return expand_placeholders(token_ids, items, *placeholders)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Items
    ) -> tuple[np.ndarray, int]:
        """(int32 [3, T], delta) of (time, row, column).

        Text and audio advance all three axes together. The first axis follows time, `positions_per_second`; a video and
        its sound start at the same position, and text continues after the last of both.
        """
        groups: list[list[PlaceholderSpan]] = []  # the spans of a video and its sound are one group
        for span in spans:
            before = groups[-1] if groups else []
            joined = before and before[-1].start + before[-1].length == span.start
            if joined and items[before[0].modality][before[0].item_index].with_audio:
                before.append(span)
            else:
                groups.append([span])
        steps = np.ones(len(token_ids), np.int32)
        for group in groups:
            if self.shared_bos_position and items[group[0].modality][group[0].item_index].with_audio:
                steps[max(group[0].start - 1, 1) : group[0].start] = 0
                steps[group[-1].start + group[-1].length + 1 :][:1] = 0
        out = np.empty((3, len(token_ids)), np.int32)
        done = next_position = 0
        for group in groups:
            out[:, done : group[0].start] = next_position - 1 + np.cumsum(steps[done : group[0].start])
            base = next_position = next_position + int(steps[done : group[0].start].sum())
            for span in group:
                block = base + self.span_rope_positions(items[span.modality][span.item_index], span)
                done, next_position = span.start + span.length, int(block.max()) + 1
                out[:, span.start : done] = block
        out[:, done:] = next_position - 1 + np.cumsum(steps[done:])
        return out, next_position + int(steps[done:].sum()) - len(token_ids)

    def span_rope_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """int32 [3, length]: positions of the span's embeddings, relative to the item's first."""
        if item.modality == "audio":
            whole = np.broadcast_to(np.arange(item.num_embeds, dtype=np.int32), (3, item.num_embeds))
        else:
            whole = np.indices(item.grid, dtype=np.int32).reshape(3, -1)
            if item.grid[0] > 1:
                whole[0] = np.array(
                    [math.floor(s * self.positions_per_second) for s in self.step_times(item)], np.int32
                )[whole[0]]
        return whole[:, span.embed_offset : span.embed_offset + span.length]


def _with_audio(modality: str, kwargs: ProcessorKwargs) -> bool:
    return modality == "video" and any(kwargs.get(name) for name in WITH_AUDIO_KWARGS)


def _kwargs_of(modality: str, kwargs: ProcessorKwargs) -> ProcessorKwargs:
    """The kwargs of items of a modality: those of all items, overridden by `images_kwargs` or `videos_kwargs`."""
    return {**kwargs, **(kwargs.get(f"{modality}s_kwargs") or {})}
