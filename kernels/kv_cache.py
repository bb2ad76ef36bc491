"""Writing new keys and values into the paged KV cache, and the conversion to and from its dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Num

from .choose import kv_heads_first


def to_cache_dtype(x: Float[Array, "*shape"], dtype: jax.typing.DTypeLike) -> Num[Array, "*shape"]:
    """Keys or values in the dtype of the cache. An integer cache holds the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def cache_to_float32(cached: Num[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Keys or values read from a cache, as float32."""
    if cached.dtype == jnp.uint16:
        cached = jax.lax.bitcast_convert_type(cached, jnp.bfloat16)
    return cached.astype(jnp.float32)


def write_kv_cache(
    k_cache: Num[Array, "num_blocks _ _ H"],
    v_cache: Num[Array, "num_blocks _ _ H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slot_mapping: Int[Array, "T"],
) -> tuple[Num[Array, "num_blocks _ _ H"], Num[Array, "num_blocks _ _ H"]]:
    """Write k, v at `slot_mapping` of caches [num_blocks, block_size, K, H]: slot = block id * block_size + offset.

    On a platform of `kv_heads_first` the caches are [num_blocks, K, block_size, H]. A slot that is negative or past the
    end is dropped; the others must differ from each other. Donated caches are written in place: accelerators do so for
    a scatter on the token axis of token-major blocks, the CPU for either layout.
    """
    heads_first = kv_heads_first()
    block_size = k_cache.shape[2 if heads_first else 1]
    num_slots = k_cache.shape[0] * block_size
    slot_mapping = jnp.where(slot_mapping < 0, num_slots, slot_mapping)  # a negative index would count from the end

    def write(cache: Num[Array, "num_blocks _ _ H"], new: Float[Array, "T K H"]) -> Num[Array, "num_blocks _ _ H"]:
        if heads_first:
            slots = cache.at[slot_mapping // block_size, :, slot_mapping % block_size]
            return slots.set(to_cache_dtype(new, cache.dtype), mode="drop", unique_indices=True)
        flat = cache.reshape(num_slots, *cache.shape[2:])
        return (
            flat.at[slot_mapping]
            .set(to_cache_dtype(new, cache.dtype), mode="drop", unique_indices=True)
            .reshape(cache.shape)
        )

    return write(k_cache, k), write(v_cache, v)
