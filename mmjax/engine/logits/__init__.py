"""What a request forbids and prefers, as a row of numbers added to its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class LogitsProcessor(Protocol):
    """The constraints of one sequence.

    dynamic: the row changes as tokens come, so it is asked for before each one. first_timestamp: the first timestamp
    token, all from it on being such; 0 = no token is one.
    """

    @property
    def dynamic(self) -> bool: ...

    @property
    def first_timestamp(self) -> int: ...

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """f32[V] to add to the logits of the token after `output_ids`, not to be written to; None = nothing ever."""
        ...
