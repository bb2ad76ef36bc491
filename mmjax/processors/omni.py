"""How the Omni families hear and see on one clock: sound in chunks, pictures, and videos with their sound track."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.multimodal.video import Video
from mmjax.processors.base import Expanded, Item, Kwargs, Span, expand_placeholders
from mmjax.processors.listened import FEATURES, LENGTHS
from mmjax.processors.mel import LogMel
from mmjax.processors.patches import PatchProcessor, area_bounds
from mmjax.processors.soundtrack import Items, Soundtracks, Turn
from mmjax.processors.windows import frame_rate
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

UNKNOWN = Video(np.empty((0, 0, 0, 3), np.uint8), {})  # a clip of which nothing is known
WITH_SOUND = ("use_audio_in_video", "load_audio_from_video")


class OmniProcessor(PatchProcessor):
    """What the families have in common. A family says how it hears, how rows take turns, and its default frame rate.

    one_bos: the two tokens that open a video with sound share a position, and so do the two that close it. thinker: the
    part of config.json that is about understanding, which is all of it in a thinker's own.
    """

    kinds: Mapping[str, int | None] = {"image": None, "video": None, "audio": None}
    accepts = PatchProcessor.accepts | {"fps", "images_kwargs", "videos_kwargs", *WITH_SOUND}
    embeds: Mapping[str, tuple[str, ...]] = {**PatchProcessor.embeds, "audio": (FEATURES, LENGTHS)}
    fps: float
    one_bos: bool

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.thinker = thinker = config.get("thinker_config", config)
        self.ticks: float = thinker["position_id_per_seconds"]
        vision = thinker["vision_config"] | {"tokens_per_second": self.ticks}
        super().__init__(thinker | {"vision_config": vision}, files, tokenizer)
        # the published processors set the area of videos themselves: the file is about images
        self.bounds["video"] = area_bounds(files.get("video_preprocessor_config.json", {}), self.areas["video"])
        key = "audio_token_id" if "audio_token_id" in thinker else "audio_token_index"
        self.markers["audio"] = thinker[key]
        self.chunk: int = 2 * thinker["audio_config"]["n_window"]  # mel frames
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

    def hear(self, audio: np.ndarray) -> Item:
        """Mono float32 [n] at the model's rate -> an audio item."""
        raise NotImplementedError

    def from_mel(self, mel: np.ndarray) -> Item:
        """float32 [bins, frames] -> an audio item."""
        raise NotImplementedError

    def chunked(self, mel: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [bins, frames] -> mel f32[chunks, frames, bins], length i32[chunks] in frames: the last may be short,
        and has zeros behind."""
        frames = mel.shape[1]
        starts = np.arange(0, frames, self.chunk, dtype=np.int32)
        padded = np.zeros((len(starts) * self.chunk, len(mel)), np.float32)
        padded[:frames] = mel.T
        return {
            "mel": padded.reshape(len(starts), self.chunk, -1),
            "length": np.minimum(self.chunk, frames - starts),
        }

    @property
    def bins(self) -> int:
        """Of the log-mel features."""
        return self.mel.bins

    def heard(self, samples: int) -> int:
        """Rows of a clip of so many samples; 0 or less when it is too short to be heard."""
        raise NotImplementedError

    def turns(self, clip: Item, sound: Item) -> list[Turn]:
        """In which order the rows of a video and of its sound come."""
        raise NotImplementedError

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """Tokens of an image (height, width), a silent video (frames, height, width), or audio (samples,)."""
        return self.heard(size[0]) if kind == "audio" else super().item_rows(kind, size, _of_kind(kind, kwargs))

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
        """See `PatchProcessor.item`; audio: see `hear`."""
        if kind == "audio":
            if self.heard(len(media)) < 1:
                raise RequestError(
                    f"The audio (len={len(media)}) is too short to be represented inside the model.", "audio_too_short"
                )
            return self.hear(media)
        own = _of_kind(kind, kwargs)
        return dataclasses.replace(super().item(kind, media, own), sound=_with_sound(kind, own))

    def outline(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> Item:
        """See `PatchProcessor.outline`; a clip is on the clock like any other, and may have its sound."""
        own = _of_kind(kind, kwargs)
        item = super().outline(kind, size, own)
        times = self.times(UNKNOWN, item.grid[0], own) if kind == "video" else ()
        return dataclasses.replace(item, times=times, sound=_with_sound(kind, own))

    def times(self, video: Video, steps: int, kwargs: Kwargs) -> tuple[float, ...]:
        """Seconds at which each step begins: by `fps`, or else the family's frame rate. The published processors do not
        look at a clip's metadata, and neither does this one."""
        seconds = self.frames / frame_rate(UNKNOWN, kwargs, self.fps)
        return tuple(step * seconds for step in range(steps))

    def clock(self, clip: Item) -> tuple[float, ...]:
        """Seconds at which each step of a clip begins; one that does not say has the default frame rate."""
        return clip.times or tuple(step * self.frames / self.fps for step in range(clip.grid[0]))

    def expand(self, tokens: Sequence[int], items: Items) -> Expanded:
        """One marker per row of each item; RequestError when placeholders and items do not match."""
        plain = self.markers, self.placeholder
        if any(clip.sound for clip in items.get("video", ())):
            return Soundtracks(*plain, self.audio_bos, self.audio_eos, self.turns).expand(tokens, items)
        return expand_placeholders(tokens, items, *plain)

    def positions(self, tokens: Sequence[int], spans: Sequence[Span], items: Items) -> tuple[np.ndarray, int]:
        """int32[3, T] (time, row, column) and the delta of later tokens.

        Text and sound advance all three together. Time goes by the clock, `ticks` to the second; a video and its sound
        start at the same position, and text goes on after the last of the turns.
        """
        groups: list[list[Span]] = []
        for span in spans:
            before = groups[-1] if groups else []
            joined = before and before[-1].start + before[-1].length == span.start
            if joined and items[before[0].kind][before[0].index].sound:
                before.append(span)
            else:
                groups.append([span])
        steps = np.ones(len(tokens), np.int32)
        for group in groups:
            if self.one_bos and items[group[0].kind][group[0].index].sound:
                steps[max(group[0].start - 1, 1) : group[0].start] = 0
                steps[group[-1].start + group[-1].length + 1 :][:1] = 0
        out = np.empty((3, len(tokens)), np.int32)
        done = free = 0
        for group in groups:
            out[:, done : group[0].start] = free - 1 + np.cumsum(steps[done : group[0].start])
            base = free = free + int(steps[done : group[0].start].sum())
            for span in group:
                block = base + self.block(items[span.kind][span.index], span)
                done, free = span.start + span.length, int(block.max()) + 1
                out[:, span.start : done] = block
        out[:, done:] = free - 1 + np.cumsum(steps[done:])
        return out, free + int(steps[done:].sum()) - len(tokens)

    def block(self, item: Item, span: Span) -> np.ndarray:
        """int32[3, n]: where the span's rows are, counted from the item's first."""
        if item.kind == "audio":
            whole = np.broadcast_to(np.arange(item.rows, dtype=np.int32), (3, item.rows))
        else:
            whole = np.indices(item.grid, dtype=np.int32).reshape(3, -1)
            if item.grid[0] > 1:
                whole[0] = np.array([math.floor(s * self.ticks) for s in self.clock(item)], np.int32)[whole[0]]
        return whole[:, span.first : span.first + span.length]


def _with_sound(kind: str, kwargs: Kwargs) -> bool:
    return kind == "video" and any(kwargs.get(name) for name in WITH_SOUND)


def _of_kind(kind: str, kwargs: Kwargs) -> Kwargs:
    """What is asked for of every item, and of those of one kind."""
    return {**kwargs, **(kwargs.get(f"{kind}s_kwargs") or {})}
