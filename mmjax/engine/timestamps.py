"""Transcripts with times: timestamp tokens stand in pairs around what is said, and never run backwards.

The rules are those that Whisper was published with. One of them, that a time comes next where all times together are
likelier than any other token, is the sampler's; see `mmjax.engine.sample`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.engine.constraints import Constraints
from mmjax.processors.base import Timestamps


class Timed:
    """The constraints of an answer with timestamps, on top of the request's others. See `Constraints`.

    `stamp`: the first of the timestamp tokens.
    """

    dynamic = True

    def __init__(self, rules: Timestamps, vocab: int, others: Constraints) -> None:
        self._rules, self._others = rules, others
        self.stamp = rules.first
        words = np.zeros(vocab, bool)
        words[: rules.first] = True
        words[rules.never] = False
        self._words = np.where(words, np.float32(0), np.float32(-np.inf))

    def row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`."""
        rules = self._rules
        said = [*rules.said, *(int(token) for token in output_ids)]
        stamped = [rules.first <= token <= rules.last for token in said]
        latest = next((token for token in reversed(said) if rules.first <= token <= rules.last), rules.first)
        row = self._words.copy()
        if not said:  # a time opens the transcript
            row[: rules.first] = -np.inf
            row[rules.first : min(rules.last, rules.first + rules.latest) + 1] = 0
        elif not stamped[-1]:  # what has been said took time
            row[latest + any(stamped) : rules.last + 1] = 0
        elif not all(stamped[-2:]):  # what was closed is followed by the next, or by nothing
            row[: rules.first] = -np.inf
            row[rules.end] = 0
            row[latest : rules.last + 1] = 0
        others = self._others.row(output_ids)
        both = row if others is None else row + others
        return both if np.isfinite(both).any() else row
