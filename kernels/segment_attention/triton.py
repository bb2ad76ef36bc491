"""Segment attention on GPU: flash attention in Pallas-Triton, each block of queries over the keys of its own
segments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from .. import gpu, online_softmax, tile
from .bounds import as_keys, bounds, unpad, whole_blocks


def run(
    q: Float[Array, "U N H"],
    k: Float[Array, "U N H"],
    v: Float[Array, "U N H"],
    segment_ids: Int[Array, "U"],
    *,
    scale: float,
    segment_len: int | None = None,
    key_mask: Bool[Array, "U"] | None = None,
    interpret: bool = False,
) -> Float[Array, "U N H"]:
    """See `segment_attention`. Head dims other than powers of two are padded in a copy."""
    U, N, H = q.shape
    width = max(gpu.TENSOR_CORE_ROWS, pl.next_power_of_2(H))
    queries = gpu.query_rows(width, q.dtype)
    padded, padded_ids = whole_blocks((q, k, v), segment_ids, queries, segment_len)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, width - H))) for x in padded)
    low, high, single = bounds(padded_ids, queries)
    key_ids = as_keys(padded_ids, key_mask)
    if key_mask is not None:  # only segments without masked keys may skip the mask
        masked = jnp.cumsum(jnp.pad(key_ids != padded_ids, (1, 0)), dtype=jnp.int32)
        single = jnp.where(masked[low] == masked[high], single, 0)
    block = pl.BlockSpec((queries, None, width), lambda i, n: (i, n, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, keys=gpu.key_block(queries, q.dtype), scale=scale * gpu.LOG2E),
        grid=(padded_ids.shape[0] // queries, N),
        in_specs=[block, *[pl.no_block_spec] * 3, *[pl.no_block_spec] * 4],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=gpu.warps(queries, width), num_stages=2),
        interpret=interpret,
        name="segment_attention",
    )(query, key, value, padded_ids, key_ids, low, high, single)
    return unpad(out[:, :, :H], U, segment_len)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    segment_ids_ref: Any,
    key_ids_ref: Any,
    low_ref: Any,
    high_ref: Any,
    single_ref: Any,
    out_ref: Any,
    *,
    keys: int,
    scale: float,
) -> None:
    i, n = pl.program_id(0), pl.program_id(1)
    queries = q_ref.shape[0]
    query = q_ref[...]
    own = segment_ids_ref[pl.ds(i * queries, queries)]
    low, high = low_ref[i], high_ref[i]

    def chunk(c: Int[Array, ""], state: online_softmax.State, masked: bool) -> online_softmax.State:
        rows = pl.ds(c * keys, keys)
        x = tile.scores(query, k_ref[rows, n, :]) * scale
        if masked:
            x = jnp.where(own[:, None] == key_ids_ref[rows][None], x, online_softmax.MASKED)
        value = v_ref[rows, n, :]
        return online_softmax.fold(state, x, lambda weights: tile.weigh(weights, value), exp=jnp.exp2)

    # Key blocks [whole, rest) lie inside the only segment of these queries and need no mask. The others are its ragged
    # ends, or all blocks where the queries are of several segments. One loop over the blocks before and after keeps the
    # program small.
    first, last = lax.div(low, keys), lax.div(high + (keys - 1), keys)
    whole = jnp.where(single_ref[i] != 0, jnp.minimum(lax.div(low + (keys - 1), keys), last), last)
    rest = jnp.maximum(whole, jnp.where(single_ref[i] != 0, lax.div(high, keys), last))

    def end(e: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        before = first + e
        return chunk(jnp.where(before < whole, before, before + (rest - whole)), state, masked=True)

    state = online_softmax.start((queries,), q_ref.shape[1])
    state = lax.fori_loop(whole, rest, functools.partial(chunk, masked=False), state)
    state = lax.fori_loop(0, (whole - first) + (last - rest), end, state)
    out_ref[...] = online_softmax.finish(state).astype(out_ref.dtype)
