"""Qwen3-Omni: sound in chunks of a second, 13 rows each; rows of a video and its sound are merged by their times."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.audio_in_video import EmbedRun
from mmjax.processors.base import MediaItem
from mmjax.processors.qwen_omni import OmniProcessor
from mmjax.processors.qwen_vl import PixelBounds
from mmjax.processors.resize import table_coords
from mmjax.spec import conv_length
from mmjax.tokenizer.tokenizer import Tokenizer

NUM_CONVS = 3  # of stride 2, before the audio tower


class Processor(OmniProcessor):
    """See `mmjax.processors.base.Processor`. The area of videos is that of the published processor's own defaults.

    Every clip is heard as if it were alone. (transformers pads what is passed together to the longest clip, which
    changes the last frame of the others, and the last steps of those shorter than a chunk.)
    """

    placeholder_token: Mapping[str, str] = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "audio": "<|audio_pad|>",
    }
    placeholder_text: Mapping[str, str] = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
        "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
    }
    default_bounds: Mapping[str, PixelBounds] = {
        "image": (56 * 56, 28 * 28 * 1280),
        "video": (128 * 32 * 32, 768 * 32 * 32),
    }
    fps = 1.0
    shared_bos_position = False

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.window_chunks: int = self.thinker["audio_config"]["n_window_infer"] // self.chunk_frames  # chunks
        self.position_grid = round(self.thinker["vision_config"]["num_position_embeddings"] ** 0.5)

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Where each patch is in the table of positions."""
        return features | {"position_coords": table_coords(features["patch_coords"], grid, self.position_grid)}

    def audio_embeds(self, samples: int) -> int:
        """An eighth of the frames, chunk by chunk; none where there is too little to be mirrored at the end."""
        if samples <= self.mel.window // 2:
            return 0
        return self._rows(samples // self.mel.hop)

    def _rows(self, frames: int) -> int:
        chunks, rest = divmod(frames, self.chunk_frames)
        return chunks * conv_length(self.chunk_frames, NUM_CONVS) + conv_length(rest, NUM_CONVS)

    def process_audio(self, audio: np.ndarray) -> MediaItem:
        """See `from_mel`. Clips may be of any length."""
        return self.from_mel(self.mel.reflect_padded(audio))

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """float32 [bins, frames] -> as `chunked`; extent i32[chunks]: the frames that the convolutions see; window
        i32[chunks]; step i32[rows]."""
        frames, rows = mel.shape[1], self._rows(mel.shape[1])
        features = self.split_chunks(mel)
        units = len(features["mel"])
        features |= {
            # silence follows a last chunk that is short, unless it is the only one
            "num_frames": np.full(units, frames if units == 1 else self.chunk_frames, np.int32),
            "window_ids": np.arange(units, dtype=np.int32) // self.window_chunks,
            "step_index": np.arange(rows, dtype=np.int32),
        }
        return MediaItem("audio", features, units, rows)

    def interleave_audio(self, clip: MediaItem, sound: MediaItem) -> list[EmbedRun]:
        """All of the video's rows of one time, then the sound up to the next; what is left of either comes last."""
        layer = clip.num_embeds // clip.grid[0]
        turns: list[EmbedRun] = []
        done = 0
        for number, seconds in enumerate(self.step_times(clip)):
            before = min(
                math.ceil(seconds * self.positions_per_second), sound.num_embeds
            )  # sound that is earlier than these
            if before > done:
                turns.append(("audio", done, before - done))
            done = max(done, before)
            if turns and turns[-1][0] == "video":
                turns[-1] = ("video", turns[-1][1], turns[-1][2] + layer)
            else:
                turns.append(("video", number * layer, layer))
        return turns + [("audio", done, sound.num_embeds - done)] * (done < sound.num_embeds)
