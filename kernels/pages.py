"""Writing new keys and values into the paged pool."""

import jax
import jax.numpy as jnp


def write_pages(
    k_pool: jax.Array, v_pool: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put k, v [T, K, H] at `slot` [T] int32 of pools [pages, page, K, H]: slot = page id * page + offset in the page.

    A slot that is negative or past the end is dropped; the others must differ from each other. In place where the pools
    are donated: a scatter on the token axis of token-major pages, which no platform answers with a copy of the pool.
    """
    end = k_pool.shape[0] * k_pool.shape[1]
    slot = jnp.where(slot < 0, end, slot)  # a negative index would count from the end

    def put(pool: jax.Array, rows: jax.Array) -> jax.Array:
        flat = pool.reshape(end, *pool.shape[2:])
        return flat.at[slot].set(rows.astype(pool.dtype), mode="drop", unique_indices=True).reshape(pool.shape)

    return put(k_pool, k), put(v_pool, v)
