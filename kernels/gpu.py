"""What the Pallas-Triton kernels share."""

import math
import warnings

import jax.numpy as jnp

# The Triton backend of Pallas is deprecated since jax 0.11; jax 0.12 still has it. The warning is raised when a program
# is lowered, far from our calls, hence the process-wide filter.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

LOG2E = math.log2(math.e)
"""Scores are scaled by this too, so that exp2 replaces exp: one instruction instead of two."""

TENSOR_CORE_ROWS = 16
"""The least number of rows of a Triton dot."""


def power_of_2(n: int) -> bool:
    """Whether n is a power of two."""
    return n & (n - 1) == 0


def query_rows(head_dim: int, dtype: jnp.dtype) -> int:
    """The most query rows of a tile that registers and shared memory hold beside its operands.

    Float32 products run without tensor cores, unrolled: more than 32 rows cost ptxas 20 s and gain nothing.
    """
    if dtype == jnp.float32:
        return 32
    return 64 if head_dim > 128 else 128


def key_block(block_size: int, dtype: jnp.dtype) -> int:
    """Keys that a program takes at a time; they lie in one cache block."""
    return min(block_size, 32 if dtype == jnp.float32 else 64)


def warps(rows: int, head_dim: int) -> int:
    """Warps of a program whose accumulator is [rows, head_dim]."""
    return 8 if rows * head_dim >= 128 * 128 else 4
