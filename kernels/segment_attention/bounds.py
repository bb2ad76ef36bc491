"""Cutting a packed encoder sequence into blocks, and finding the keys that each block of queries attends to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MASKED_KEY = -2  # the segment id of a masked key, which no query has


def pad_to_blocks(
    arrays: tuple[Float[Array, "U N H"], ...], segment_ids: Int[Array, "U"], block: int, segment_len: int | None
) -> tuple[tuple[Float[Array, "padded N H"], ...], Int[Array, "padded"]]:
    """Pad arrays and segment_ids to whole blocks of `block` positions: at the end, or, given segment_len, at the end of
    every segment, so that each block is of one segment. Padding has segment id -1. `unpad` is the inverse."""
    length = segment_ids.shape[0]
    if segment_len is None:
        pad = -length % block
        segment_ids = jnp.pad(segment_ids, (0, pad), constant_values=-1)
        return tuple(jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in arrays), segment_ids
    num_segments, pad = length // segment_len, -segment_len % block

    def pad_segments(x: Float[Array, "U N H"]) -> Float[Array, "padded N H"]:
        x = x.reshape(num_segments, segment_len, *x.shape[1:])
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])

    segment_ids = jnp.broadcast_to(jnp.arange(num_segments, dtype=jnp.int32)[:, None], (num_segments, segment_len))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1).reshape(-1)
    return tuple(map(pad_segments, arrays)), segment_ids


def key_segment_ids(segment_ids: Int[Array, "padded"], key_mask: Bool[Array, "U"] | None) -> Int[Array, "padded"]:
    """The segment id of each position as a key: MASKED_KEY where key_mask is False.

    segment_ids: from `pad_to_blocks` without segment_len. key_mask: of `segment_attention`, without padding.
    """
    if key_mask is None:
        return segment_ids
    return jnp.where(jnp.pad(key_mask, (0, segment_ids.shape[0] - key_mask.shape[0])), segment_ids, MASKED_KEY)


def unpad(x: Float[Array, "padded N H"], length: int, segment_len: int | None) -> Float[Array, "U N H"]:
    """The inverse of `pad_to_blocks`; length: U."""
    if segment_len is None:
        return x[:length]
    return x.reshape(length // segment_len, -1, *x.shape[1:])[:, :segment_len].reshape(length, *x.shape[1:])


def key_bounds(
    segment_ids: Int[Array, "padded"], block: int
) -> tuple[Int[Array, "blocks"], Int[Array, "blocks"], Int[Array, "blocks"]]:
    """(low, high, single) of each block of `block` positions. Their number must be a multiple of `block`.

    The segments of the block span the positions [low, high), which are none for a block of padding. single: 1 if they
    are one segment, else 0.
    """
    length = segment_ids.shape[0]
    positions = jnp.arange(length, dtype=jnp.int32)
    differs = segment_ids[1:] != segment_ids[:-1]
    segment_start = lax.cummax(jnp.where(jnp.pad(differs, (1, 0), constant_values=True), positions, 0))
    segment_end = lax.cummin(
        jnp.where(jnp.pad(differs, (0, 1), constant_values=True), positions + 1, length), reverse=True
    )
    is_real = segment_ids >= 0
    low = jnp.where(is_real, segment_start, length).reshape(-1, block).min(1)
    high = jnp.where(is_real, segment_end, 0).reshape(-1, block).max(1)
    single = jnp.where(is_real, segment_start, 0).reshape(-1, block).max(1) == low
    return jnp.minimum(low, high), high, single.astype(jnp.int32)
