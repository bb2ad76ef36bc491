"""Writing new keys and values into the paged pool, and what its integers mean."""

import jax
import jax.numpy as jnp

from .choose import kv_heads_first


def to_cache_dtype(rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Keys or values in a pool's dtype. An integer pool keeps the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    return rows.astype(dtype)


def cache_to_float32(kept: jax.Array) -> jax.Array:
    """What came out of a pool, as float32."""
    if kept.dtype == jnp.uint16:
        kept = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return kept.astype(jnp.float32)


def write_kv_cache(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array, slot_mapping: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put k, v [T, K, H] at `slot` [T] int32 of pools [pages, page, K, H]: slot = page id * page + offset in the page.

    On a platform of `kv_heads_first` the pools are [pages, K, page, H]. A slot that is negative or past the end is
    dropped; the others must differ from each other. In place where the pools are donated: a scatter on the token axis
    of token-major pages, which no accelerator answers with a copy of the pool; the CPU writes either form in place.
    """
    turned = kv_heads_first()
    block_size = k_cache.shape[2 if turned else 1]
    end = k_cache.shape[0] * block_size
    slot_mapping = jnp.where(slot_mapping < 0, end, slot_mapping)  # a negative index would count from the end

    def put(cache: jax.Array, rows: jax.Array) -> jax.Array:
        if turned:
            at = cache.at[slot_mapping // block_size, :, slot_mapping % block_size]
            return at.set(to_cache_dtype(rows, cache.dtype), mode="drop", unique_indices=True)
        flat = cache.reshape(end, *cache.shape[2:])
        return (
            flat.at[slot_mapping]
            .set(to_cache_dtype(rows, cache.dtype), mode="drop", unique_indices=True)
            .reshape(cache.shape)
        )

    return put(k_cache, k), put(v_cache, v)
