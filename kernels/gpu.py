"""Shared by the Pallas-Triton kernels: tile sizes and constants."""

import math
import warnings

import jax.numpy as jnp

# The Triton backend of Pallas is deprecated since jax 0.11; jax 0.12 still has it. jax warns when a program is lowered,
# far from our calls, so the filter is process-wide.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

LOG2E = math.log2(math.e)
"""Scores are also scaled by log2(e), so that exp2 replaces exp: one instruction instead of two."""

TENSOR_CORE_ROWS = 16
"""The fewest rows that a Triton dot takes."""


def is_power_of_2(n: int) -> bool:
    """Whether n is a power of two."""
    return n & (n - 1) == 0


def max_query_rows(head_dim: int, dtype: jnp.dtype) -> int:
    """The most query rows of a tile: registers and shared memory must hold its accumulator and its operands.

    Float32 products run unrolled, without tensor cores: more than 32 rows take ptxas 20 s and gain nothing.
    """
    if dtype == jnp.float32:
        return 32
    return 64 if head_dim > 128 else 128


def key_block_size(block_size: int, dtype: jnp.dtype) -> int:
    """Keys per iteration of a program. All lie in one cache block."""
    return min(block_size, 32 if dtype == jnp.float32 else 64)


def num_warps(rows: int, head_dim: int) -> int:
    """Warps per program whose accumulator is [rows, head_dim]."""
    return 8 if rows * head_dim >= 128 * 128 else 4
