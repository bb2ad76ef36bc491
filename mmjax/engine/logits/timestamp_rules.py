"""Transcripts with timestamps: timestamp tokens come in pairs around text, and never decrease.

The rules are those published with Whisper. The sampler applies one of them: if all timestamps together are likelier
than any other token, the next token is a timestamp; see `mmjax.engine.sampler`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.engine.logits.bias import LogitsBias
from mmjax.processors.base import TimestampTokens


class TimestampRules:
    """The `LogitsProcessor` of a transcript with timestamps. It adds the request's other biases."""

    dynamic = True

    def __init__(self, tokens: TimestampTokens, vocab_size: int, bias: LogitsBias) -> None:
        self._tokens, self._bias = tokens, bias
        self.first_timestamp = tokens.first_id
        is_text = np.zeros(vocab_size, bool)
        is_text[: tokens.first_id] = True
        is_text[tokens.no_timestamps_id] = False
        self._text_only = np.where(is_text, np.float32(0), np.float32(-np.inf))

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`."""
        tokens = self._tokens
        transcript = [*tokens.prefix_ids, *(int(token) for token in output_ids)]
        is_timestamp = [tokens.first_id <= token <= tokens.last_id for token in transcript]
        timestamps = [token for token, timed in zip(transcript, is_timestamp, strict=True) if timed]
        latest = timestamps[-1] if timestamps else tokens.first_id
        row = self._text_only.copy()
        if not transcript:  # the first token must be a timestamp
            row[: tokens.first_id] = -np.inf
            row[tokens.first_id : min(tokens.last_id, tokens.first_id + tokens.max_initial_index) + 1] = 0
        elif not is_timestamp[-1]:  # text of a segment, which must end later than it began
            row[latest + bool(timestamps) : tokens.last_id + 1] = 0
        elif not all(is_timestamp[-2:]):  # a segment has ended: the next one begins, or the transcript ends
            row[: tokens.first_id] = -np.inf
            row[tokens.eos_id] = 0
            row[latest : tokens.last_id + 1] = 0
        bias = self._bias.bias_row(output_ids)
        biased = row if bias is None else row + bias
        return biased if np.isfinite(biased).any() else row

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """None: `bias_row` takes no time."""
        return None
