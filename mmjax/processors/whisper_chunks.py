"""Clips of any length for Whisper's encoder: log-mel features in windows, and windows in chunks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.hf_config import audio_options, canonical
from mmjax.mel import LogMel
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    expand_placeholders,
    item_of_any_length,
    linear_positions,
)
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer

CHUNK_STEPS = 96  # encoder steps of a chunk, two mel frames each: 1.92 seconds
FRAMES_BEFORE, FRAMES_AFTER = 2, 1  # mel frames beyond a chunk that its first and its last step see

Features = dict[str, np.ndarray]


def chunk_fields(num_mel_bins: int) -> tuple[FeatureField, ...]:
    """One chunk of a window per input.

    mel: the chunk's frames, and those beyond it that its ends see. window_ids: its window. first_step: its first step
    in the window. num_frames: how many frames there are from the chunk's first one to the end of the window.
    audio_steps: how many of its steps are sound, which every step of the window attends to.
    """
    frames = FRAMES_BEFORE + 2 * CHUNK_STEPS + FRAMES_AFTER
    return (
        FeatureField("mel", (frames, num_mel_bins), "float32"),
        FeatureField("window_ids", pad=-1, is_segment_id=True),
        FeatureField("first_step"),
        FeatureField("num_frames"),
        FeatureField("audio_steps"),
    )


def split_window(mel: np.ndarray, audio_steps: int, output_steps: int, window: int) -> Features:
    """A window of mel features float32 [bins, frames] in chunks: `chunk_fields`, and output_steps of each chunk.

    audio_steps: steps that are sound. output_steps: steps that embeddings are made from, at least those. window: its
    number within the clip.
    """
    bins, frames = mel.shape
    count = math.ceil(output_steps / CHUNK_STEPS)
    padded = np.zeros((FRAMES_BEFORE + max(frames, 2 * CHUNK_STEPS * count) + FRAMES_AFTER, bins), np.float32)
    padded[FRAMES_BEFORE : FRAMES_BEFORE + frames] = mel.T
    first = np.arange(count, dtype=np.int32) * CHUNK_STEPS
    width = FRAMES_BEFORE + 2 * CHUNK_STEPS + FRAMES_AFTER

    def per_chunk(steps: int) -> np.ndarray:
        part: np.ndarray = np.clip(steps - first, 0, CHUNK_STEPS)
        return part

    return {
        "mel": np.stack([padded[2 * at : 2 * at + width] for at in first]),
        "window_ids": np.full(count, window, np.int32),
        "first_step": first,
        "num_frames": np.maximum(frames - 2 * first, 0).astype(np.int32),
        "audio_steps": per_chunk(audio_steps),
        "output_steps": per_chunk(output_steps),
    }


def concat_features(parts: list[Features]) -> Features:
    """The features of several windows, end to end."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class WhisperClipProcessor(Processor):
    """What the processors of such families share. A family says how it makes an item, and its placeholder."""

    mm_limits: Mapping[str, int | None] = {"audio": None}
    placeholder_token: Mapping[str, str]
    placeholder_text: Mapping[str, str]
    accepted_kwargs: frozenset[str] = frozenset()
    embed_fields: Mapping[str, tuple[str, ...]] = {"audio": ("audio_embeds",)}
    item_for_embeds = item_of_any_length

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        config = canonical(config)
        self.mel = LogMel.from_hf(audio_options(files))
        self.sampling_rate: int | None = self.mel.rate
        self.placeholder_ids = {"audio": config["audio_token_id"]}
        self.window_frames: int = 2 * config["audio_config"]["max_source_positions"]  # mel frames

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One audio token per embedding of each clip."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
