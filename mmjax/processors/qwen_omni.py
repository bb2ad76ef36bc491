"""How the Omni families hear and see on one clock: sound in chunks, pictures, and videos with their sound track."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.audio_in_video import AudioInVideo, EmbedRun, Items
from mmjax.processors.base import ExpandedPrompt, MediaItem, PlaceholderSpan, ProcessorKwargs, expand_placeholders
from mmjax.processors.mel import LogMel
from mmjax.processors.mel_features import FEATURES, LENGTHS
from mmjax.processors.qwen_vl import QwenVLProcessor, area_bounds, frame_rate
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

UNKNOWN = Video(np.empty((0, 0, 0, 3), np.uint8), {})  # a clip of which nothing is known
WITH_SOUND = ("use_audio_in_video", "load_audio_from_video")


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
    """What the families have in common. A family says how it hears, how rows take turns, and its default frame rate.

    one_bos: the two tokens that open a video with sound share a position, and so do the two that close it. thinker: the
    part of config.json that is about understanding, which is all of it in a thinker's own.
    """

    mm_limits: Mapping[str, int | None] = {"image": None, "video": None, "audio": None}
    accepted_kwargs = QwenVLProcessor.accepted_kwargs | {"fps", "images_kwargs", "videos_kwargs", *WITH_SOUND}
    embed_fields: Mapping[str, tuple[str, ...]] = {**QwenVLProcessor.embed_fields, "audio": (FEATURES, LENGTHS)}
    fps: float
    shared_bos_position: bool

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.thinker = thinker = config.get("thinker_config", config)
        self.positions_per_second: float = thinker["position_id_per_seconds"]
        vision = thinker["vision_config"] | {"tokens_per_second": self.positions_per_second}
        super().__init__(thinker | {"vision_config": vision}, files, tokenizer)
        # the published processors set the area of videos themselves: the file is about images
        self.pixel_bounds["video"] = area_bounds(
            files.get("video_preprocessor_config.json", {}), self.default_bounds["video"]
        )
        key = "audio_token_id" if "audio_token_id" in thinker else "audio_token_index"
        self.placeholder_ids["audio"] = thinker[key]
        self.chunk_frames: int = 2 * thinker["audio_config"]["n_window"]  # mel frames
        self.audio_bos, self.audio_eos = thinker["audio_start_token_id"], thinker["audio_end_token_id"]
        nested = files.get("processor_config.json", {}).get("feature_extractor")
        prepare = nested or files["preprocessor_config.json"]
        self.sampling_rate = prepare["sampling_rate"]
        self.mel = LogMel(
            rate=prepare["sampling_rate"],
            window=prepare["n_fft"],
            hop=prepare["hop_length"],
            bins=prepare["feature_size"],
            samples=prepare["chunk_length"] * prepare["sampling_rate"],
        )

    def process_audio(self, audio: np.ndarray) -> MediaItem:
        """Mono float32 [n] at the model's rate -> an audio item."""
        raise NotImplementedError

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """float32 [bins, frames] -> an audio item."""
        raise NotImplementedError

    def split_chunks(self, mel: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [bins, frames] -> mel f32[chunks, frames, bins], length i32[chunks] in frames: the last may be short,
        and has zeros behind."""
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
        """Of the log-mel features."""
        return self.mel.bins

    def audio_embeds(self, samples: int) -> int:
        """Rows of a clip of so many samples; 0 or less when it is too short to be heard."""
        raise NotImplementedError

    def interleave_audio(self, clip: MediaItem, sound: MediaItem) -> list[EmbedRun]:
        """In which order the rows of a video and of its sound come."""
        raise NotImplementedError

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of an image (height, width), a silent video (frames, height, width), or audio (samples,)."""
        return (
            self.audio_embeds(size[0])
            if modality == "audio"
            else super().num_embeds(modality, size, _of_kind(modality, kwargs))
        )

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """See `PatchProcessor.item`; audio: see `hear`."""
        if modality == "audio":
            if self.audio_embeds(len(media)) < 1:
                raise RequestError(
                    f"The audio (len={len(media)}) is too short to be represented inside the model.", "audio_too_short"
                )
            return self.process_audio(media)
        own = _of_kind(modality, kwargs)
        return dataclasses.replace(super().process_item(modality, media, own), with_audio=_with_sound(modality, own))

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """See `PatchProcessor.outline`; a clip is on the clock like any other, and may have its sound."""
        own = _of_kind(modality, kwargs)
        item = super().item_for_embeds(modality, size, own)
        times = self.frame_times(UNKNOWN, item.grid[0], own) if modality == "video" else ()
        return dataclasses.replace(item, frame_times=times, with_audio=_with_sound(modality, own))

    def frame_times(self, video: Video, steps: int, kwargs: ProcessorKwargs) -> tuple[float, ...]:
        """Seconds at which each step begins: by `fps`, or else the family's frame rate. The published processors do not
        look at a clip's metadata, and neither does this one."""
        seconds = self.temporal_patch_size / frame_rate(UNKNOWN, kwargs, self.fps)
        return tuple(step * seconds for step in range(steps))

    def step_times(self, clip: MediaItem) -> tuple[float, ...]:
        """Seconds at which each step of a clip begins; one that does not say has the default frame rate."""
        return clip.frame_times or tuple(step * self.temporal_patch_size / self.fps for step in range(clip.grid[0]))

    def expand_prompt(self, token_ids: Sequence[int], items: Items) -> ExpandedPrompt:
        """One marker per row of each item; RequestError when placeholders and items do not match."""
        plain = self.placeholder_ids, self.placeholder_text
        if any(clip.with_audio for clip in items.get("video", ())):
            return AudioInVideo(*plain, self.audio_bos, self.audio_eos, self.interleave_audio).expand(token_ids, items)
        return expand_placeholders(token_ids, items, *plain)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Items
    ) -> tuple[np.ndarray, int]:
        """int32[3, T] (time, row, column) and the delta of later tokens.

        Text and sound advance all three together. Time goes by the clock, `ticks` to the second; a video and its sound
        start at the same position, and text goes on after the last of the turns.
        """
        groups: list[list[PlaceholderSpan]] = []
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
        done = free = 0
        for group in groups:
            out[:, done : group[0].start] = free - 1 + np.cumsum(steps[done : group[0].start])
            base = free = free + int(steps[done : group[0].start].sum())
            for span in group:
                block = base + self.span_positions(items[span.modality][span.item_index], span)
                done, free = span.start + span.length, int(block.max()) + 1
                out[:, span.start : done] = block
        out[:, done:] = free - 1 + np.cumsum(steps[done:])
        return out, free + int(steps[done:].sum()) - len(token_ids)

    def span_positions(self, item: MediaItem, span: PlaceholderSpan) -> np.ndarray:
        """int32[3, n]: where the span's rows are, counted from the item's first."""
        if item.modality == "audio":
            whole = np.broadcast_to(np.arange(item.num_embeds, dtype=np.int32), (3, item.num_embeds))
        else:
            whole = np.indices(item.grid, dtype=np.int32).reshape(3, -1)
            if item.grid[0] > 1:
                whole[0] = np.array(
                    [math.floor(s * self.positions_per_second) for s in self.step_times(item)], np.int32
                )[whole[0]]
        return whole[:, span.embed_offset : span.embed_offset + span.length]


def _with_sound(modality: str, kwargs: ProcessorKwargs) -> bool:
    return modality == "video" and any(kwargs.get(name) for name in WITH_SOUND)


def _of_kind(modality: str, kwargs: ProcessorKwargs) -> ProcessorKwargs:
    """What is asked for of every item, and of those of one kind."""
    return {**kwargs, **(kwargs.get(f"{modality}s_kwargs") or {})}
