"""Qwen2.5-Omni: sound in chunks of two seconds, 25 rows a second; videos and their sound take turns as often."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.audio_in_video import EmbedRun
from mmjax.processors.base import MediaItem
from mmjax.processors.qwen_omni import OmniProcessor
from mmjax.processors.qwen_vl import PixelBounds, WindowedQwenVLProcessor
from mmjax.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Processor(OmniProcessor, WindowedQwenVLProcessor):
    """See `mmjax.processors.base.Processor`. The area of videos is that of the published processor's own defaults."""

    placeholder_token: Mapping[str, str] = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
    placeholder_text: Mapping[str, str] = {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    }
    default_bounds: Mapping[str, PixelBounds] = {
        "image": (56 * 56, 28 * 28 * 1280),
        "video": (128 * 28 * 28, 768 * 28 * 28),
    }
    fps = 2.0
    shared_bos_position = True

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.share = int(
            self.positions_per_second * self.thinker["seconds_per_chunk"]
        )  # positions that one turn covers

    def audio_embeds(self, samples: int) -> int:
        """Two convolution steps per row, two frames per step."""
        return self._rows(-(-min(samples, self.mel.samples) // self.mel.hop))

    def _rows(self, frames: int) -> int:
        return (frames + 1) // 2 // 2

    def process_audio(self, audio: np.ndarray) -> MediaItem:
        """See `from_mel`; longer audio than the window is cut."""
        if len(audio) > self.mel.samples:
            log.warning(
                "audio of %.1f s is cut to the model's window of %.1f s",
                len(audio) / self.mel.rate,
                self.mel.samples / self.mel.rate,
            )
        return self.from_mel(self.mel.zero_padded(audio))

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """float32 [bins, frames] -> as `chunked`, and step i32[rows]: the first of the two steps that make a row."""
        rows = self._rows(mel.shape[1])
        features = self.split_chunks(mel) | {"step_index": 2 * np.arange(rows, dtype=np.int32)}
        return MediaItem("audio", features, len(features["mel"]), rows)

    def interleave_audio(self, clip: MediaItem, sound: MediaItem) -> list[EmbedRun]:
        """A share of the video, the same share of its sound, and so on."""
        layer = clip.num_embeds // clip.grid[0]
        times = np.repeat([seconds * self.positions_per_second for seconds in self.step_times(clip)], layer)
        shares = {"video": self._shares(times), "audio": self._shares(np.arange(sound.num_embeds))}
        turns: list[EmbedRun] = []
        for number in range(max(map(len, shares.values()))):
            for modality, cuts in shares.items():
                turns += [(modality, first, end - first) for first, end in cuts[number : number + 1]]
        return turns

    def _shares(self, times: np.ndarray) -> list[tuple[int, int]]:
        """(first row, row after the last) of each share: a row whose time reaches the end of the current share opens
        the next one, whose end is one share later (as published, also where times leap over a whole share)."""
        cuts, end = [0], self.share
        for row, time in enumerate(times.tolist()):
            if time >= end:
                cuts.append(row)
                end += self.share
        return list(zip(cuts, [*cuts[1:], len(times)], strict=True))
