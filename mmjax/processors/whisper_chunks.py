"""Clips of any length for Whisper's encoder: log-mel features in windows, and windows in pieces."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    expand_placeholders,
    linear_positions,
)
from mmjax.processors.embed_items import any_length_item
from mmjax.processors.mel import LogMel
from mmjax.tokenizer.tokenizer import Tokenizer

CHUNK_STEPS = 96  # steps of a piece, two mel frames each; mmjax.nn.audio.whisper takes them
BEFORE, BEHIND = 2, 1  # mel frames beyond a piece that its first and its last step see

Features = dict[str, np.ndarray]


def log_mel(files: Mapping[str, dict[str, Any]]) -> LogMel:
    """What preprocessor_config.json of a Whisper feature extractor describes."""
    prepare = files["preprocessor_config.json"]
    return LogMel(
        rate=prepare["sampling_rate"],
        window=prepare["n_fft"],
        hop=prepare["hop_length"],
        bins=prepare["feature_size"],
        samples=prepare["chunk_length"] * prepare["sampling_rate"],
    )


def encoder_steps(frames: int) -> int:
    """Steps that the encoder's convolutions leave of so many mel frames."""
    return (frames + 1) // 2


def split_window(mel: np.ndarray, heard: int, reach: int, window: int) -> Features:
    """A window of mel features float32 [bins, frames] in chunks: `WhisperEncoderConfig.padded_chunk_fields`.

    heard: steps that are sound. reach: steps that are wanted, at least those. window: its number within the clip.
    """
    bins, frames = mel.shape
    count = math.ceil(reach / CHUNK_STEPS)
    padded = np.zeros((BEFORE + max(frames, 2 * CHUNK_STEPS * count) + BEHIND, bins), np.float32)
    padded[BEFORE : BEFORE + frames] = mel.T
    first = np.arange(count, dtype=np.int32) * CHUNK_STEPS
    width = BEFORE + 2 * CHUNK_STEPS + BEHIND

    def share(steps: int) -> np.ndarray:
        part: np.ndarray = np.clip(steps - first, 0, CHUNK_STEPS)
        return part

    return {
        "mel": np.stack([padded[2 * at : 2 * at + width] for at in first]),
        "window_ids": np.full(count, window, np.int32),
        "first_step": first,
        "num_frames": np.maximum(frames - 2 * first, 0).astype(np.int32),
        "audio_steps": share(heard),
        "wanted_steps": share(reach),
    }


def concat_features(parts: list[Features]) -> Features:
    """The pieces of several windows, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class WhisperClipProcessor(Processor):
    """What the processors of such families have in common. A family says what an item is made of, and its marker."""

    mm_limits: Mapping[str, int | None] = {"audio": None}
    placeholder_token: Mapping[str, str]
    placeholder_text: Mapping[str, str]
    accepted_kwargs: frozenset[str] = frozenset()
    embed_fields: Mapping[str, tuple[str, ...]] = {"audio": ("audio_embeds",)}
    item_for_embeds = any_length_item

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.mel = log_mel(files)
        self.sampling_rate: int | None = self.mel.rate
        self.placeholder_ids = {"audio": config["audio_token_index"]}
        self.window_frames: int = 2 * config["audio_config"]["max_source_positions"]  # mel frames

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """One audio token per row of each clip; RequestError when placeholders and clips do not match."""
        return expand_placeholders(token_ids, items, self.placeholder_ids, self.placeholder_text)

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(token_ids))
