"""Decode in jnp: the CPU's implementation.

Cache blocks are [K, block_size, H] here: see `kv_heads_first`. Measured on two cores of an EPYC, jax 0.10.2, 8
sequences of 1500 keys, K 6, G 1, H 64, blocks of 64 (blocks of 16 took 2.5 times as long): 2.7 ms in float32 and 1.5 ms
with a bfloat16 cache; in chunks of 64 keys 3.0 and 2.3 ms, of 256 keys 3.0 and 2.0 ms. A dot_general with batch
dimensions first was faster than one over block-diagonal queries, and faster than multiply-and-sum (10 times slower at G
1).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Num

from .. import online_softmax
from ..kv_cache import cache_to_float32

CHUNK_KEYS = 128
"""Keys per iteration."""


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks K block_size H"],
    v_cache: Num[Array, "num_blocks K block_size H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`. All sequences run through their keys together, chunk by chunk, up to the longest length; with
    a window, each from the block on in which its own begins."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[2]
    blocks_per_chunk = max(1, CHUNK_KEYS // block_size)
    chunk_keys = blocks_per_chunk * block_size
    block_table = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % blocks_per_chunk)))
    query = q.astype(jnp.float32) * scale
    low = jnp.zeros(S, jnp.int32) if window is None else jnp.maximum(context_lens - window, 0)
    first_block = low // block_size

    def chunk(c: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        at = c * blocks_per_chunk
        if window is None:
            ids = lax.dynamic_slice_in_dim(block_table, at, blocks_per_chunk, 1)
        else:
            index = (first_block + at)[:, None] + jnp.arange(blocks_per_chunk, dtype=jnp.int32)
            ids = jnp.take_along_axis(block_table, index, axis=1, mode="clip")
        key_pos = (first_block * block_size + c * chunk_keys)[:, None] + jnp.arange(chunk_keys, dtype=jnp.int32)
        visible = (key_pos >= low[:, None]) & (key_pos < context_lens[:, None])

        def gather(cache: Num[Array, "num_blocks K block_size H"]) -> Float32[Array, "S K chunk_keys H"]:
            blocks = jnp.take(cache, ids, axis=0, mode="clip")
            return cache_to_float32(blocks.swapaxes(1, 2).reshape(S, K, chunk_keys, H))

        scores = jnp.einsum("skgh,skjh->skgj", query, gather(k_cache))
        scores = jnp.where(visible[:, None, None], scores, online_softmax.MASKED)
        values = jnp.where(visible[:, None, :, None], gather(v_cache), 0.0)  # slots past the context may hold anything
        return online_softmax.update(state, scores, lambda weights: jnp.einsum("skgj,skjh->skgh", weights, values))

    num_chunks = lax.div(jnp.max(context_lens - first_block * block_size) + (chunk_keys - 1), chunk_keys)
    state = lax.fori_loop(0, num_chunks, chunk, online_softmax.init((S, K, G), H))
    return online_softmax.finalize(state).astype(q.dtype)
