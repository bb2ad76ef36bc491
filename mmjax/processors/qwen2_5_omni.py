"""Qwen2.5-Omni: audio in chunks of two seconds, 25 embeddings a second; videos and their sound alternate as often."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.audio_in_video import EmbedRun
from mmjax.processors.base import MediaItem
from mmjax.processors.qwen_omni import OmniProcessor
from mmjax.processors.qwen_vl import PixelBounds, WindowedQwenVLProcessor
from mmjax.spec import conv_length
from mmjax.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Processor(OmniProcessor, WindowedQwenVLProcessor):
    """See `mmjax.processors.base.Processor`. The pixel bounds of videos are the published processor's own defaults."""

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
        # of a video, then of its sound, and so on
        self.positions_per_turn = int(self.positions_per_second * self.thinker["seconds_per_chunk"])

    def num_audio_embeds(self, samples: int) -> int:
        """Embeddings of a clip: one per two encoder steps of two frames each."""
        return self._mel_embeds(-(-min(samples, self.mel.samples) // self.mel.hop))

    def _mel_embeds(self, frames: int) -> int:
        return int(conv_length(frames)) // 2

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
        """The item of log-mel features float32 [bins, frames], as `audio_fields`."""
        num_embeds = self._mel_embeds(mel.shape[1])
        features = self.split_chunks(mel) | {"step_index": 2 * np.arange(num_embeds, dtype=np.int32)}
        return MediaItem("audio", features, len(features["mel"]), num_embeds)

    def interleave(self, video: MediaItem, audio: MediaItem) -> list[EmbedRun]:
        """A turn of the video, the same time of its sound, and so on."""
        step_embeds = video.num_embeds // video.grid[0]
        times = np.repeat([seconds * self.positions_per_second for seconds in self.step_times(video)], step_embeds)
        turns = {"video": self._turns(times), "audio": self._turns(np.arange(audio.num_embeds))}
        runs: list[EmbedRun] = []
        for turn in range(max(map(len, turns.values()))):
            for modality, bounds in turns.items():
                runs += [(modality, first, end - first) for first, end in bounds[turn : turn + 1]]
        return runs

    def _turns(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """The embeddings [first, end) of each turn. One whose position reaches the end of the current turn opens the
        next, which ends one turn later (as published, also where positions skip a whole turn)."""
        starts, end = [0], self.positions_per_turn
        for index, position in enumerate(positions.tolist()):
            if position >= end:
                starts.append(index)
                end += self.positions_per_turn
        return list(zip(starts, [*starts[1:], len(positions)], strict=True))
