"""Cutting a packed encoder sequence into blocks, and which keys each block of queries attends."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MASKED_KEY = -2  # the segment id of a masked key, which no query has


def whole_blocks(
    arrays: tuple[Float[Array, "U N H"], ...], segment_ids: Int[Array, "U"], block: int, segment_len: int | None
) -> tuple[tuple[Float[Array, "padded N H"], ...], Int[Array, "padded"]]:
    """Pad arrays and segment_ids to whole blocks of `block` positions: at the end, or, with segment_len, at the end of
    every segment, so that no block holds two. `unpad` is the inverse."""
    length = segment_ids.shape[0]
    if segment_len is None:
        pad = -length % block
        segment_ids = jnp.pad(segment_ids, (0, pad), constant_values=-1)
        return tuple(jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in arrays), segment_ids
    count, pad = length // segment_len, -segment_len % block

    def pad_segments(x: Float[Array, "U N H"]) -> Float[Array, "padded N H"]:
        x = x.reshape(count, segment_len, *x.shape[1:])
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])

    segment_ids = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[:, None], (count, segment_len))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1).reshape(-1)
    return tuple(map(pad_segments, arrays)), segment_ids


def as_keys(segment_ids: Int[Array, "padded"], key_mask: Bool[Array, "U"] | None) -> Int[Array, "padded"]:
    """The segment of each position as a key, from the segment_ids of `whole_blocks` without segment_len.

    key_mask: as for `segment_attention`, of the positions before they were padded.
    """
    if key_mask is None:
        return segment_ids
    return jnp.where(jnp.pad(key_mask, (0, segment_ids.shape[0] - key_mask.shape[0])), segment_ids, MASKED_KEY)


def unpad(x: Float[Array, "padded N H"], length: int, segment_len: int | None) -> Float[Array, "U N H"]:
    """The inverse of `whole_blocks`; length: U."""
    if segment_len is None:
        return x[:length]
    return x.reshape(length // segment_len, -1, *x.shape[1:])[:, :segment_len].reshape(length, *x.shape[1:])


def bounds(
    segment_ids: Int[Array, "padded"], block: int
) -> tuple[Int[Array, "blocks"], Int[Array, "blocks"], Int[Array, "blocks"]]:
    """For each block of `block` positions, a divisor of their number: the positions [low, high) that its segments span,
    empty for a block of padding only; and whether (1 or 0) they are one segment. -> low, high, single."""
    length = segment_ids.shape[0]
    at = jnp.arange(length, dtype=jnp.int32)
    change = segment_ids[1:] != segment_ids[:-1]
    begins = lax.cummax(jnp.where(jnp.pad(change, (1, 0), constant_values=True), at, 0))
    ends = lax.cummin(jnp.where(jnp.pad(change, (0, 1), constant_values=True), at + 1, length), reverse=True)
    real = segment_ids >= 0
    low = jnp.where(real, begins, length).reshape(-1, block).min(1)
    high = jnp.where(real, ends, 0).reshape(-1, block).max(1)
    single = jnp.where(real, begins, 0).reshape(-1, block).max(1) == low
    return jnp.minimum(low, high), high, single.astype(jnp.int32)
