"""A prompt that wants vectors instead of an answer: what the engine keeps of it until they are there."""

from __future__ import annotations

import numpy as np

from mmjax.engine.sequence import Sequence


class PoolingState:
    """The hidden states of a prompt's last token, or with `whole` of every token, as the device hands them over.

    Beside `Answer`, for engines that pool.
    """

    def __init__(self, seq: Sequence, *, whole: bool) -> None:
        self.seq = seq
        self.all_tokens = whole
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._parts: list[np.ndarray] = []

    def append(self, rows: np.ndarray) -> None:
        """The next tokens' f32[n, D]."""
        self._parts.append(rows)

    def finish(self, reason: str, stop: int | str | None) -> None:
        """All of the prompt has run, or none of it will."""
        self.finish_reason, self.stop_reason = reason, stop

    @property
    def hidden(self) -> np.ndarray:
        """f32[T, D], T = 1 unless `whole`."""
        return np.concatenate(self._parts)
