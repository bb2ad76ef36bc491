"""Ultravox: clips of any length in windows of the encoder, eight of its steps to a token.

The first window is as long as its sound; later ones are padded with zeros. The last embedding of a window that is not
filled also has steps after the end of the sound, which attend to it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.processors.base import Encode, MediaItem, ProcessorKwargs
from mmjax.processors.whisper_chunks import (
    CHUNK_STEPS,
    Features,
    WhisperClipProcessor,
    chunk_fields,
    concat_features,
    split_window,
)
from mmjax.spec import FeatureField, conv_length
from mmjax.tokenizer.tokenizer import Tokenizer


def audio_fields(num_mel_bins: int) -> tuple[FeatureField, ...]:
    """Chunks of a window. output_steps: how many of its steps embeddings are made from, which may be more than are
    audio. step_index, num_steps: the first of the steps that are stacked into an embedding, and how many there are."""
    return (
        *chunk_fields(num_mel_bins),
        FeatureField("output_steps"),
        FeatureField("step_index", axis="embeds", index_stride=CHUNK_STEPS),
        FeatureField("num_steps", axis="embeds"),
    )


class Processor(WhisperClipProcessor):
    """See `mmjax.processors.base.Processor`."""

    placeholder_token: Mapping[str, str] = {"audio": "<|audio|>"}
    placeholder_text: Mapping[str, str] = placeholder_token

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.stack_factor: int = config["stack_factor"]

    def tokenize(self, text: str, encode: Encode) -> list[int]:
        """Without special tokens at its start: prompts come from the chat template, which adds them."""
        return encode(text, add_special_tokens=False)

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of audio (samples,)."""
        whole, rest = divmod(-(-size[0] // self.mel.hop), self.window_frames)
        return whole * self._window_embeds(self.window_frames) + self._window_embeds(rest)

    def _window_embeds(self, frames: int) -> int:
        return -(-conv_length(frames) // self.stack_factor)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """A clip, as `audio_fields`."""
        hop = self.mel.hop
        mel = self.mel.reflect_padded(np.pad(media, (0, -len(media) % hop)))
        windows = [self._window(mel, start) for start in range(0, mel.shape[1], self.window_frames)]
        first_chunk = np.cumsum([0, *(len(window["first_step"]) for window in windows)])
        embeds = []
        for window, first in zip(windows, first_chunk, strict=False):
            steps = int(window["output_steps"].sum())
            at = np.arange(0, steps, self.stack_factor, dtype=np.int32)
            embeds.append(
                {"step_index": at + int(first) * CHUNK_STEPS, "num_steps": np.minimum(steps - at, self.stack_factor)}
            )
        features = concat_features(windows) | concat_features(embeds)
        return MediaItem(modality, features, int(first_chunk[-1]), num_embeds=len(features["step_index"]))

    def _window(self, mel: np.ndarray, start: int) -> Features:
        """The chunks of the window that begins at frame `start` of the clip."""
        frames = mel[:, start : start + self.window_frames]
        steps = conv_length(frames.shape[1])
        if not start:
            return split_window(frames, steps, steps, 0)
        wanted = min(-(-steps // self.stack_factor) * self.stack_factor, self.window_frames // 2)
        padded = np.pad(frames, ((0, 0), (0, self.window_frames - frames.shape[1])))
        return split_window(padded, steps, wanted, start // self.window_frames)
