"""Audio that comes as log-mel features, which the encoder has yet to read: `input_audio_features` of the Omni families.

Clips lie side by side, [bins, frames of all], with `audio_feature_lengths`, or come one by one, padded or not.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.processors.base import MediaItem, Processor
from mmjax.types import RequestError

FEATURES, LENGTHS = "input_audio_features", "audio_feature_lengths"


def split_clips(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each clip. RequestError when features and lengths do not match."""
    given, lengths = fields[FEATURES], _lengths(fields[LENGTHS])
    if isinstance(given, (list, tuple)) or (is_array(given) and given.ndim == 3):
        parts = list(given)
    elif is_array(given) and given.ndim == 2 and given.shape[1] >= sum(lengths):
        ends = np.cumsum(lengths).tolist()
        parts = [given[:, end - length : end] for end, length in zip(ends, lengths, strict=True)]
    else:
        parts = []
    if len(parts) != len(lengths):
        raise RequestError(
            f"`{FEATURES}` must be (bins, frames of all clips) or one (bins, frames) per clip, as many as "
            f"`{LENGTHS}` {lengths} says.",
            "bad_embeds",
        )
    return [{FEATURES: part, LENGTHS: length} for part, length in zip(parts, lengths, strict=True)]


def media_item(processor: Processor, index: int, fields: Mapping[str, Any]) -> MediaItem:
    """One clip, checked."""
    given, (length, *_) = fields[FEATURES], _lengths(fields[LENGTHS])
    fits = is_array(given) and given.ndim == 2 and given.shape[0] == processor.num_mel_bins and given.shape[1] >= length
    if not fits:
        shape = tuple(given.shape) if is_array(given) else type(given).__name__
        raise RequestError(
            f"`{FEATURES}` of audio item {index} must be an array ({processor.num_mel_bins} bins, at least "
            f"{length} frames), "
            f"got {shape}.",
            "bad_embeds",
        )
    mel = to_numpy(given)[:, :length].astype(np.float32)
    if not np.isfinite(mel).all():
        raise RequestError(f"`{FEATURES}` of audio item {index} contains NaN or infinite values.", "bad_embeds")
    made = processor.from_mel(mel)
    if made.num_embeds < 1:
        raise RequestError(f"Audio item {index} is too short to be heard: {length} frames.", "audio_too_short")
    return made


def _lengths(given: Any) -> list[int]:
    try:
        lengths = np.atleast_1d(to_numpy(given) if is_array(given) else np.asarray(given))
    except (TypeError, ValueError) as error:
        raise RequestError(f"`{LENGTHS}` must be integers, one per clip.", "bad_embeds") from error
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1 or not lengths.size or (lengths < 1).any():
        raise RequestError(f"`{LENGTHS}` must be positive integers, one per clip.", "bad_embeds")
    return [int(length) for length in lengths]
