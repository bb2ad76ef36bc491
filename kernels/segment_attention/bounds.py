"""Cutting packed units into blocks, and which units each block has to look at."""

import jax
import jax.numpy as jnp
from jax import lax

UNSEEN = -2  # a segment that no unit is of


def whole_blocks(
    arrays: tuple[jax.Array, ...], segment_ids: jax.Array, block: int, segment_len: int | None
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Pad arrays [U, N, H] and segment [U] to blocks of `block` units: at the tail, or, with `uniform=n`, at the end of
    every segment, so that no block holds units of two. `unpad` is the way back."""
    units = segment_ids.shape[0]
    if segment_len is None:
        pad = -units % block
        segment_ids = jnp.pad(segment_ids, (0, pad), constant_values=-1)
        return tuple(jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in arrays), segment_ids
    count, pad = units // segment_len, -segment_len % block

    def stretch(x: jax.Array) -> jax.Array:
        x = x.reshape(count, segment_len, *x.shape[1:])
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])

    segment_ids = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[:, None], (count, segment_len))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1).reshape(-1)
    return tuple(map(stretch, arrays)), segment_ids


def as_keys(segment_ids: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """The segment [U] of each unit as a key, given those of `whole_blocks` without `uniform`; `seen`, of the units
    before they were padded, as for `segment_attention`."""
    if key_mask is None:
        return segment_ids
    return jnp.where(jnp.pad(key_mask, (0, segment_ids.shape[0] - key_mask.shape[0])), segment_ids, UNSEEN)


def unpad(x: jax.Array, units: int, segment_len: int | None) -> jax.Array:
    """[padded units, N, H] -> [units, N, H], the inverse of `whole_blocks`."""
    if segment_len is None:
        return x[:units]
    return x.reshape(units // segment_len, -1, *x.shape[1:])[:, :segment_len].reshape(units, *x.shape[1:])


def bounds(segment_ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The units [low, high) that the segments of each block of `block` units span, empty for a block of padding only;
    and whether (1 or 0) they are one segment.

    segment [U] int32, U a multiple of `block` -> low, high, single [U // block] int32.
    """
    units = segment_ids.shape[0]
    at = jnp.arange(units, dtype=jnp.int32)
    change = segment_ids[1:] != segment_ids[:-1]
    begins = lax.cummax(jnp.where(jnp.pad(change, (1, 0), constant_values=True), at, 0))
    ends = lax.cummin(jnp.where(jnp.pad(change, (0, 1), constant_values=True), at + 1, units), reverse=True)
    real = segment_ids >= 0
    low = jnp.where(real, begins, units).reshape(-1, block).min(1)
    high = jnp.where(real, ends, 0).reshape(-1, block).max(1)
    single = jnp.where(real, begins, 0).reshape(-1, block).max(1) == low
    return jnp.minimum(low, high), high, single.astype(jnp.int32)
