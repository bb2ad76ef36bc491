"""What the Pallas-Triton kernels share."""

import math
import warnings

# Pallas' Triton backend is deprecated since jax 0.11, to be removed at some later time; jax 0.12 still has it. The warning is
# raised when a program is lowered, far from our calls, hence the process-wide filter.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

LOG2E = math.log2(math.e)
"""Scores are scaled by this too, and exp2 takes the place of exp: one instruction instead of two."""

TENSOR_CORE_ROWS = 16
"""The least number of rows of a Triton dot."""


def power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def key_block(page: int) -> int:
    """Keys a program takes at a time: they lie in one page."""
    return min(page, 64)
