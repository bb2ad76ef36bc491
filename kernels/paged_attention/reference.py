"""Attention over a cache of one array, in jnp: the reference of the TPU's kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ..kv_cache import pack_kv, unpack_kv
from ..paged_prefill import reference


def run(
    q: Float[Array, "B Q K G H"],
    kv_cache: Num[Array, "num_blocks K block_size lanes"],
    new_kv: tuple[Float[Array, "B Q K H"], Float[Array, "B Q K H"]] | None,
    block_table: Int[Array, "S P"],
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[Float[Array, "B Q K G H"], Num[Array, "num_blocks K block_size lanes"]]:
    """See `paged_attention`."""
    block_size = kv_cache.shape[2]
    if new_kv is not None:
        positions = q_start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
        is_key = (positions >= 0) & (positions < context_lens[seq_index][:, None])
        blocks = block_table[seq_index[:, None], positions.clip(0) // block_size]
        blocks = jnp.where(is_key, blocks, len(kv_cache))
        rows = kv_cache.at[blocks, :, positions % block_size]
        kv_cache = rows.set(pack_kv(*new_kv).astype(kv_cache.dtype), mode="drop")
    k, v = unpack_kv(kv_cache, q.shape[-1])
    batch = block_table, seq_index, q_start, context_lens
    return reference.run(q, k, v, *batch, causal=causal, scale=scale, window=window), kv_cache
