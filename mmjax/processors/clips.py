"""Clips of any length for Whisper's encoder: log-mel features in windows, and windows in pieces."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import Expanded, Item, Span, expand_placeholders, linear_positions
from mmjax.processors.mel import LogMel
from mmjax.processors.outlines import rows_outline
from mmjax.text.tokenizer import Tokenizer

PIECE = 96  # steps of a piece, two mel frames each; mmjax.nn.audio takes them
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


def steps_of(frames: int) -> int:
    """Steps that the encoder's convolutions leave of so many mel frames."""
    return (frames + 1) // 2


def cut(mel: np.ndarray, heard: int, reach: int, window: int) -> Features:
    """A window of mel features float32 [bins, frames] in pieces: what `mmjax.nn.audio.AudioConfig.reaching` lists.

    heard: steps that are sound. reach: steps that are wanted, at least those. window: its number within the clip.
    """
    bins, frames = mel.shape
    count = math.ceil(reach / PIECE)
    padded = np.zeros((BEFORE + max(frames, 2 * PIECE * count) + BEHIND, bins), np.float32)
    padded[BEFORE : BEFORE + frames] = mel.T
    first = np.arange(count, dtype=np.int32) * PIECE
    width = BEFORE + 2 * PIECE + BEHIND

    def share(steps: int) -> np.ndarray:
        part: np.ndarray = np.clip(steps - first, 0, PIECE)
        return part

    return {
        "mel": np.stack([padded[2 * at : 2 * at + width] for at in first]),
        "window": np.full(count, window, np.int32),
        "start": first,
        "extent": np.maximum(frames - 2 * first, 0).astype(np.int32),
        "heard": share(heard),
        "reach": share(reach),
    }


def joined(parts: list[Features]) -> Features:
    """The pieces of several windows, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class ClipProcessor:
    """What the processors of such families have in common. A family says what an item is made of, and its marker."""

    kinds: Mapping[str, int | None] = {"audio": None}
    marker: Mapping[str, str]
    placeholder: Mapping[str, str]
    accepts: frozenset[str] = frozenset()
    embeds: Mapping[str, tuple[str, ...]] = {"audio": ("audio_embeds",)}
    outline = rows_outline

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.mel = log_mel(files)
        self.sampling_rate: int | None = self.mel.rate
        self.markers = {"audio": config["audio_token_index"]}
        self.window: int = 2 * config["audio_config"]["max_source_positions"]  # mel frames

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded:
        """One audio token per row of each clip; RequestError when placeholders and clips do not match."""
        return expand_placeholders(tokens, items, self.markers, self.placeholder)

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions."""
        return linear_positions(len(tokens))
