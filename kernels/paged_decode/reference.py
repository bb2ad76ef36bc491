"""Decode in jnp: the CPU's implementation.

Blocks are [K, block_size, H] here: see `kv_heads_first`. On two cores of an EPYC, jax 0.10.2, 8 sequences of 1500 keys,
K 6, G 1, H 64, blocks of 64 (with blocks of 16 it took 2.5 times as long): 2.7 ms in float32, 1.5 ms with a bfloat16
cache; in chunks of 64 keys 3.0 and 2.3, of 256 keys 3.0 and 2.0. A dot_general with batch dimensions first was faster
than one over block-diagonal queries, and than multiply-and-sum (10 times slower at G 1).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Num

from .. import online_softmax
from ..kv_cache import cache_to_float32

CHUNK = 128
"""Keys per iteration."""


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks K block_size H"],
    v_cache: Num[Array, "num_blocks K block_size H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`. All sequences go through their keys together, chunk by chunk, up to the longest length."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[2]
    step = max(1, CHUNK // block_size)
    keys = step * block_size
    block_table = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % step)))
    query = q.astype(jnp.float32) * scale

    def chunk(c: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        ids = lax.dynamic_slice_in_dim(block_table, c * step, step, 1)
        live = (c * keys + jnp.arange(keys, dtype=jnp.int32))[None] < context_lens[:, None]

        def gather(cache: Num[Array, "num_blocks K block_size H"]) -> Float32[Array, "S K keys H"]:
            blocks = jnp.take(cache, ids, axis=0, mode="clip")
            return cache_to_float32(blocks.swapaxes(1, 2).reshape(S, K, keys, H))

        scores = jnp.einsum("skgh,skjh->skgj", query, gather(k_cache))
        scores = jnp.where(live[:, None, None], scores, online_softmax.MASKED)
        values = jnp.where(live[:, None, :, None], gather(v_cache), 0.0)  # a block may still hold anything there
        return online_softmax.fold(state, scores, lambda weights: jnp.einsum("skgj,skjh->skgh", weights, values))

    chunks = lax.div(jnp.max(context_lens) + (keys - 1), keys)
    state = lax.fori_loop(0, chunks, chunk, online_softmax.start((S, K, G), H))
    return online_softmax.finish(state).astype(q.dtype)
