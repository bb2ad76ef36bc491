"""Ultravox: clips of any length in windows of the encoder, eight of its steps to a token.

The first window is as long as its sound; those after it are filled up with zeros. Rows of a window that the sound does
not fill hold steps after its end, which hear it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.base import Encode, MediaItem, ProcessorKwargs
from mmjax.processors.whisper_chunks import (
    CHUNK_STEPS,
    Features,
    WhisperClipProcessor,
    concat_features,
    encoder_steps,
    split_window,
)
from mmjax.tokenizer.tokenizer import Tokenizer


class Processor(WhisperClipProcessor):
    """See `mmjax.processors.base.Processor`."""

    placeholder_token: Mapping[str, str] = {"audio": "<|audio|>"}
    placeholder_text: Mapping[str, str] = placeholder_token

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.stack_factor: int = config["stack_factor"]

    def tokenize(self, text: str, encode: Encode) -> list[int]:
        """The text as it stands: prompts come from the template, which has begun them already."""
        return encode(text, add_special_tokens=False)

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of audio (samples,)."""
        whole, rest = divmod(-(-size[0] // self.mel.hop), self.window_frames)
        return whole * self._rows(self.window_frames) + self._rows(rest)

    def _rows(self, frames: int) -> int:
        return -(-encoder_steps(frames) // self.stack_factor)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """Mono float32 [n] at the model's rate -> pieces of its windows; step i32[rows], the first of a row's steps,
        and kept i32[rows], how many there are."""
        hop = self.mel.hop
        mel = self.mel.reflect_padded(np.pad(media, (0, -len(media) % hop)))
        parts = [self._window(mel, start) for start in range(0, mel.shape[1], self.window_frames)]
        units = np.cumsum([0, *(len(part["first_step"]) for part in parts)])
        rows = []
        for part, first in zip(parts, units, strict=False):
            steps = int(part["wanted_steps"].sum())
            at = np.arange(0, steps, self.stack_factor, dtype=np.int32)
            rows.append(
                {"step_index": at + int(first) * CHUNK_STEPS, "num_steps": np.minimum(steps - at, self.stack_factor)}
            )
        picks = concat_features(rows)
        return MediaItem(
            modality, concat_features(parts) | picks, num_inputs=int(units[-1]), num_embeds=len(picks["step_index"])
        )

    def _window(self, mel: np.ndarray, start: int) -> Features:
        """The pieces of the window that begins at a frame of the clip."""
        part = mel[:, start : start + self.window_frames]
        heard = encoder_steps(part.shape[1])
        if not start:
            return split_window(part, heard, heard, 0)
        reach = min(-(-heard // self.stack_factor) * self.stack_factor, self.window_frames // 2)
        part = np.pad(part, ((0, 0), (0, self.window_frames - part.shape[1])))
        return split_window(part, heard, reach, start // self.window_frames)
