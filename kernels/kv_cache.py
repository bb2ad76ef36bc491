"""Writing new keys and values into the paged KV cache, and the conversion to and from its dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Num

from .choose import kv_heads_first, kv_in_one_array, value_lane


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


def pack_kv(k: Float[Array, "*shape H"], v: Float[Array, "*shape H"]) -> Float[Array, "*shape lanes"]:
    """Keys and values side by side, as a cache of one array has them, with zeros between and after."""
    pad = [*[(0, 0)] * (k.ndim - 1), (0, value_lane(k.shape[-1]) - k.shape[-1])]
    return jnp.concatenate((jnp.pad(k, pad), jnp.pad(v, pad)), axis=-1)


def unpack_kv(kv: Num[Array, "*shape lanes"], head_dim: int) -> tuple[Num[Array, "*shape H"], Num[Array, "*shape H"]]:
    """The keys and the values of `pack_kv`."""
    first = value_lane(head_dim)
    return kv[..., :head_dim], kv[..., first : first + head_dim]


def write_kv_cache(
    k_cache: Num[Array, "num_blocks _ _ cache_H"],
    v_cache: Num[Array, "v_blocks _ _ cache_H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slot_mapping: Int[Array, "T"],
) -> tuple[Num[Array, "num_blocks _ _ cache_H"], Num[Array, "v_blocks _ _ cache_H"]]:
    """Write k, v at `slot_mapping` of caches [num_blocks, block_size, K, H]: slot = block id * block_size + offset.

    On a platform of `kv_heads_first` the caches are [num_blocks, K, block_size, H]; where `kv_in_one_array`, k_cache
    holds both, and v_cache is returned as it is. A slot that is negative or past the end is dropped; the others must
    differ from each other. Donated caches are written in place: accelerators do so for a scatter on the outer axis, the
    CPU for either layout.
    """
    if kv_in_one_array():
        return _write_rows(k_cache, pack_kv(k, v), slot_mapping), v_cache
    heads_first = kv_heads_first()
    block_size = k_cache.shape[2 if heads_first else 1]
    num_slots = k_cache.shape[0] * block_size
    slot_mapping = jnp.where(slot_mapping < 0, num_slots, slot_mapping)  # a negative index would count from the end

    def write(cache: Num[Array, "_ _ _ cache_H"], new: Float[Array, "T K H"]) -> Num[Array, "_ _ _ cache_H"]:
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


def _write_rows(
    cache: Num[Array, "num_blocks K block_size lanes"], new: Float[Array, "T K lanes"], slot_mapping: Int[Array, "T"]
) -> Num[Array, "num_blocks K block_size lanes"]:
    """As rows of [num_blocks * K * block_size, lanes]. Indexed by block and offset, a write of 1500 keys of 20 heads
    made XLA allocate twice the cache of 640 MiB on a v5e; by row, nothing."""
    K, block_size, lanes = cache.shape[1:]
    first = slot_mapping // block_size * (K * block_size) + slot_mapping % block_size
    row = first[:, None] + jnp.arange(K, dtype=jnp.int32) * block_size
    row = jnp.where(slot_mapping[:, None] < 0, cache.size // lanes, row).reshape(-1)
    rows = cache.reshape(-1, lanes).at[row]
    return rows.set(new.reshape(-1, lanes).astype(cache.dtype), mode="drop", unique_indices=True).reshape(cache.shape)
