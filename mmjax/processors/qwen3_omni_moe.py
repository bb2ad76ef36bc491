"""Qwen3-Omni: audio in chunks of a second, 13 embeddings each; a video and its sound are merged by time."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.audio_in_video import EmbedRun
from mmjax.processors.base import MediaItem
from mmjax.processors.qwen_omni import OmniProcessor
from mmjax.processors.qwen_vl import PixelBounds, position_coords
from mmjax.spec import conv_length
from mmjax.tokenizer.tokenizer import Tokenizer

NUM_CONVS = 3  # of stride 2, before the audio tower


class Processor(OmniProcessor):
    """See `mmjax.processors.base.Processor`. The pixel bounds of videos are the published processor's own defaults.

    Every clip is processed alone. (transformers pads clips that are passed together to the longest, which changes the
    last frame of the others, and the last steps of those shorter than a chunk.)
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
        self.window_chunks: int = self.thinker["audio_config"]["n_window_infer"] // self.chunk_frames
        self.position_grid = round(self.thinker["vision_config"]["num_position_embeddings"] ** 0.5)

    def add_features(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """With position_coords."""
        return features | {"position_coords": position_coords(features["patch_coords"], grid, self.position_grid)}

    def num_audio_embeds(self, samples: int) -> int:
        """Embeddings of a clip: an eighth of the frames, chunk by chunk; 0 where it is too short to be mirrored."""
        if samples <= self.mel.window // 2:
            return 0
        return self._mel_embeds(samples // self.mel.hop)

    def _mel_embeds(self, frames: int) -> int:
        chunks, rest = divmod(frames, self.chunk_frames)
        return chunks * conv_length(self.chunk_frames, NUM_CONVS) + conv_length(rest, NUM_CONVS)

    def process_audio(self, audio: np.ndarray) -> MediaItem:
        """See `from_mel`. Clips may be of any length."""
        return self.from_mel(self.mel.reflect_padded(audio))

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """The item of log-mel features float32 [bins, frames], as `audio_fields`."""
        frames, num_embeds = mel.shape[1], self._mel_embeds(mel.shape[1])
        features = self.split_chunks(mel)
        chunks = len(features["mel"])
        features |= {
            # a short last chunk is followed by silence, unless it is the only one
            "num_frames": np.full(chunks, frames if chunks == 1 else self.chunk_frames, np.int32),
            "window_ids": np.arange(chunks, dtype=np.int32) // self.window_chunks,
            "step_index": np.arange(num_embeds, dtype=np.int32),
        }
        return MediaItem("audio", features, chunks, num_embeds)

    def interleave(self, video: MediaItem, audio: MediaItem) -> list[EmbedRun]:
        """A step of the video, then the sound up to the next step; the rest of either comes last."""
        step_embeds = video.num_embeds // video.grid[0]
        runs: list[EmbedRun] = []
        done = 0
        for step, seconds in enumerate(self.step_times(video)):
            earlier = min(math.ceil(seconds * self.positions_per_second), audio.num_embeds)  # than this step
            if earlier > done:
                runs.append(("audio", done, earlier - done))
            done = max(done, earlier)
            if runs and runs[-1][0] == "video":
                runs[-1] = ("video", runs[-1][1], runs[-1][2] + step_embeds)
            else:
                runs.append(("video", step * step_embeds, step_embeds))
        return runs + [("audio", done, audio.num_embeds - done)] * (done < audio.num_embeds)
