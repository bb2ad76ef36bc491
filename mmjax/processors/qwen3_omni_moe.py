"""Qwen3-Omni: sound in chunks of a second, 13 rows each; rows of a video and its sound are merged by their times."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.base import Item
from mmjax.processors.omni import OmniProcessor
from mmjax.processors.patches import Bounds
from mmjax.processors.soundtrack import Turn
from mmjax.processors.vision import stretched
from mmjax.text.tokenizer import Tokenizer


class Processor(OmniProcessor):
    """See `mmjax.processors.base.Processor`. The area of videos is that of the published processor's own defaults.

    Every clip is heard as if it were alone. (transformers pads what is passed together to the longest clip, which
    changes the last frame of the others, and the last steps of those shorter than a chunk.)
    """

    marker: Mapping[str, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"}
    placeholder: Mapping[str, str] = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
        "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
    }
    areas: Mapping[str, Bounds] = {"image": (56 * 56, 28 * 28 * 1280), "video": (128 * 32 * 32, 768 * 32 * 32)}
    fps = 1.0
    one_bos = False

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.window: int = self.thinker["audio_config"]["n_window_infer"] // self.chunk  # chunks
        self.side = round(self.thinker["vision_config"]["num_position_embeddings"] ** 0.5)

    def more(self, features: dict[str, np.ndarray], grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Where each patch is in the table of positions."""
        return features | {"table": stretched(features["place"], grid, self.side)}

    def heard(self, samples: int) -> int:
        """An eighth of the frames, chunk by chunk; none where there is too little to be mirrored at the end."""
        if samples <= self.mel.window // 2:
            return 0
        return self._rows(samples // self.mel.hop)

    def _rows(self, frames: int) -> int:
        chunks, rest = divmod(frames, self.chunk)
        return chunks * _eighth(self.chunk) + _eighth(rest)

    def hear(self, audio: np.ndarray) -> Item:
        """See `from_mel`. Clips may be of any length."""
        return self.from_mel(self.mel.alone(audio))

    def from_mel(self, mel: np.ndarray) -> Item:
        """float32 [bins, frames] -> as `chunked`; extent i32[chunks]: the frames that the convolutions see; window
        i32[chunks]; step i32[rows]."""
        frames, rows = mel.shape[1], self._rows(mel.shape[1])
        features = self.chunked(mel)
        units = len(features["mel"])
        features |= {
            # silence follows a last chunk that is short, unless it is the only one
            "extent": np.full(units, frames if units == 1 else self.chunk, np.int32),
            "window": np.arange(units, dtype=np.int32) // self.window,
            "step": np.arange(rows, dtype=np.int32),
        }
        return Item("audio", features, units, rows)

    def turns(self, clip: Item, sound: Item) -> list[Turn]:
        """All of the video's rows of one time, then the sound up to the next; what is left of either comes last."""
        layer = clip.rows // clip.grid[0]
        turns: list[Turn] = []
        done = 0
        for number, seconds in enumerate(self.clock(clip)):
            before = min(math.ceil(seconds * self.ticks), sound.rows)  # sound that is earlier than these
            if before > done:
                turns.append(("audio", done, before - done))
            done = max(done, before)
            if turns and turns[-1][0] == "video":
                turns[-1] = ("video", turns[-1][1], turns[-1][2] + layer)
            else:
                turns.append(("video", number * layer, layer))
        return turns + [("audio", done, sound.rows - done)] * (done < sound.rows)


def _eighth(frames: int) -> int:
    """Steps that three convolutions of stride 2 leave."""
    return -(-frames // 8)
