"""Transcripts with times: timestamp tokens stand in pairs around what is said, and never run backwards.

The rules are those that Whisper was published with. One of them, that a time comes next where all times together are
likelier than any other token, is the sampler's; see `mmjax.engine.sampler`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.engine.logits.bias import LogitsBias
from mmjax.processors.base import TimestampTokens


class TimestampRules:
    """The constraints of an answer with timestamps, on top of the request's others. See `Constraints`.

    `stamp`: the first of the timestamp tokens.
    """

    dynamic = True

    def __init__(self, rules: TimestampTokens, vocab: int, others: LogitsBias) -> None:
        self._rules, self._others = rules, others
        self.first_timestamp = rules.first_id
        words = np.zeros(vocab, bool)
        words[: rules.first_id] = True
        words[rules.no_timestamps_id] = False
        self._words = np.where(words, np.float32(0), np.float32(-np.inf))

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`."""
        rules = self._rules
        said = [*rules.prefix_ids, *(int(token) for token in output_ids)]
        stamped = [rules.first_id <= token <= rules.last_id for token in said]
        latest = next((token for token in reversed(said) if rules.first_id <= token <= rules.last_id), rules.first_id)
        row = self._words.copy()
        if not said:  # a time opens the transcript
            row[: rules.first_id] = -np.inf
            row[rules.first_id : min(rules.last_id, rules.first_id + rules.max_initial_index) + 1] = 0
        elif not stamped[-1]:  # what has been said took time
            row[latest + any(stamped) : rules.last_id + 1] = 0
        elif not all(stamped[-2:]):  # what was closed is followed by the next, or by nothing
            row[: rules.first_id] = -np.inf
            row[rules.eos_id] = 0
            row[latest : rules.last_id + 1] = 0
        others = self._others.bias_row(output_ids)
        both = row if others is None else row + others
        return both if np.isfinite(both).any() else row
