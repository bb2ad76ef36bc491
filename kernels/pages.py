"""Writing new keys and values into the paged pool, and what its integers mean."""

import jax
import jax.numpy as jnp

from .choose import heads_first


def as_kept(rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Keys or values in a pool's dtype. An integer pool keeps the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    return rows.astype(dtype)


def as_float32(kept: jax.Array) -> jax.Array:
    """What came out of a pool, as float32."""
    if kept.dtype == jnp.uint16:
        kept = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return kept.astype(jnp.float32)


def write_pages(
    k_pool: jax.Array, v_pool: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put k, v [T, K, H] at `slot` [T] int32 of pools [pages, page, K, H]: slot = page id * page + offset in the page.

    On a platform of `heads_first` the pools are [pages, K, page, H]. A slot that is negative or past the end is
    dropped; the others must differ from each other. In place where the pools are donated: a scatter on the token axis
    of token-major pages, which no accelerator answers with a copy of the pool; the CPU writes either form in place.
    """
    turned = heads_first()
    page = k_pool.shape[2 if turned else 1]
    end = k_pool.shape[0] * page
    slot = jnp.where(slot < 0, end, slot)  # a negative index would count from the end

    def put(pool: jax.Array, rows: jax.Array) -> jax.Array:
        if turned:
            at = pool.at[slot // page, :, slot % page]
            return at.set(as_kept(rows, pool.dtype), mode="drop", unique_indices=True)
        flat = pool.reshape(end, *pool.shape[2:])
        return flat.at[slot].set(as_kept(rows, pool.dtype), mode="drop", unique_indices=True).reshape(pool.shape)

    return put(k_pool, k), put(v_pool, v)
