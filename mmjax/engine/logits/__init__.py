"""Logits processors: they add a row of biases to the logits of a sequence, -inf for tokens that must not come."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np


class PendingRow(NamedTuple):
    """A row that another thread computes. is_slow: the row before it took so long that no step should wait for this."""

    row: Future[np.ndarray]
    is_slow: bool


class LogitsProcessor(Protocol):
    """Biases the logits of one sequence.

    dynamic: the bias depends on the tokens so far, so it is computed again for each token. first_timestamp: the id from
    which all tokens are timestamps; 0 if there are none.
    """

    @property
    def dynamic(self) -> bool: ...

    @property
    def first_timestamp(self) -> int: ...

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """f32[V] to add to the logits of the token after `output_ids`; callers must not write to it. None: no
        token is ever biased."""
        ...

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> PendingRow | None:
        """Begin to compute the row after `output_ids` on another thread. None: `bias_row` takes no time."""
        ...


class NoBias:
    """A `LogitsProcessor` that leaves the logits alone."""

    dynamic = False
    first_timestamp = 0

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """None: no token is ever biased."""
        return None

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """None: there is no row."""
        return None
