"""Which units a block of units has to look at."""

import jax
import jax.numpy as jnp
from jax import lax


def bounds(segment: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The units [low, high) that the segments of each block of `block` units span; empty for a block of padding only.

    segment [U] int32, U a multiple of `block` -> low, high [U // block] int32.
    """
    units = segment.shape[0]
    at = jnp.arange(units, dtype=jnp.int32)
    change = segment[1:] != segment[:-1]
    begins = lax.cummax(jnp.where(jnp.pad(change, (1, 0), constant_values=True), at, 0))
    ends = lax.cummin(jnp.where(jnp.pad(change, (0, 1), constant_values=True), at + 1, units), reverse=True)
    real = segment >= 0
    low = jnp.where(real, begins, units).reshape(-1, block).min(1)
    high = jnp.where(real, ends, 0).reshape(-1, block).max(1)
    return jnp.minimum(low, high), high
