"""What a request forbids and prefers, as a row of biases added to its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class LogitsProcessor(Protocol):
    """The constraints of one sequence.

    dynamic: the bias depends on the tokens so far, so it is asked for before each one. first_timestamp: the id from
    which all tokens are timestamps; 0 where none is.
    """

    @property
    def dynamic(self) -> bool: ...

    @property
    def first_timestamp(self) -> int: ...

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """f32[V] to add to the logits of the token after `output_ids`; callers must not write to it. None: no token is
        ever biased."""
        ...


class NoConstraints:
    """A `LogitsProcessor` that leaves the logits alone."""

    dynamic = False
    first_timestamp = 0

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """None: no token is ever biased."""
        return None
