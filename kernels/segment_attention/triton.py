"""Segment attention on GPU: flash attention in Pallas-Triton, each block of queries over the keys of its segments."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from .. import gpu, online_softmax, tile
from ..tile import Ref
from .bounds import key_bounds, key_segment_ids, pad_to_blocks, unpad


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
    """See `segment_attention`.

    Lanes beyond a head dim that is no power of two are masked here. For Qwen2.5-VL's tower (16 heads of 80, ten images
    in 16384 patches) on an H200 that took windows from 342 to 142 us and whole images from 969 to 584 us, together with
    4 warps in place of 8: before, q, k, v and the output were copied from or to 128 lanes.
    """
    U, N, H = q.shape
    padded_dim = max(gpu.TENSOR_CORE_ROWS, pl.next_power_of_2(H))
    block_rows = gpu.max_query_rows(padded_dim, q.dtype)
    (query, key, value), query_ids = pad_to_blocks((q, k, v), segment_ids, block_rows, segment_len)
    low, high, single = key_bounds(query_ids, block_rows)
    key_ids = key_segment_ids(query_ids, key_mask)
    if key_mask is not None:  # blocks with a masked key among their keys need the mask
        masked_before = jnp.cumsum(jnp.pad(key_ids != query_ids, (1, 0)), dtype=jnp.int32)
        single = jnp.where(masked_before[low] == masked_before[high], single, 0)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            block_rows=block_rows,
            key_block=gpu.key_block_size(block_rows, q.dtype),
            padded_dim=padded_dim,
            scale=scale * gpu.LOG2E,
        ),
        grid=(query_ids.shape[0] // block_rows, N),
        in_specs=[pl.no_block_spec] * 8,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="segment_attention",
    )(query, key, value, query_ids, key_ids, low, high, single)
    return unpad(out, U, segment_len)


def _kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    query_ids_ref: Ref,
    key_ids_ref: Ref,
    low_ref: Ref,
    high_ref: Ref,
    single_ref: Ref,
    out_ref: Ref,
    *,
    block_rows: int,
    key_block: int,
    padded_dim: int,
    scale: float,
) -> None:
    i, n = pl.program_id(0), pl.program_id(1)
    head_dim, lane = q_ref.shape[2], jnp.arange(padded_dim, dtype=jnp.int32)[None]

    def load(ref: Ref, first: Int[Array, ""], rows: int) -> Float[Array, "rows padded_H"]:
        at = ref.at[(first + jnp.arange(rows, dtype=jnp.int32))[:, None], n, lane]
        return plgpu.load(at) if padded_dim == head_dim else plgpu.load(at, mask=lane < head_dim, other=0.0)

    query = load(q_ref, i * block_rows, block_rows)
    ids = query_ids_ref[pl.ds(i * block_rows, block_rows)]
    low, high = low_ref[i], high_ref[i]

    def chunk(c: Int[Array, ""], state: online_softmax.State, masked: bool) -> online_softmax.State:
        scores = tile.qk_dot(query, load(k_ref, c * key_block, key_block)) * scale
        if masked:
            keys = pl.ds(c * key_block, key_block)
            scores = jnp.where(ids[:, None] == key_ids_ref[keys][None], scores, online_softmax.MASKED)
        value = load(v_ref, c * key_block, key_block)
        return online_softmax.update(state, scores, lambda weights: tile.pv_dot(weights, value), exp=jnp.exp2)

    # If all queries are of one segment, its interior key blocks [inner_first, inner_last) need no mask. One loop runs
    # over the blocks before and after them, which keeps the program small.
    first, last = lax.div(low, key_block), lax.div(high + (key_block - 1), key_block)
    inner_first = jnp.where(single_ref[i] != 0, jnp.minimum(lax.div(low + (key_block - 1), key_block), last), last)
    inner_last = jnp.maximum(inner_first, jnp.where(single_ref[i] != 0, lax.div(high, key_block), last))

    def masked_chunk(e: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        index = first + e
        return chunk(jnp.where(index < inner_first, index, index + (inner_last - inner_first)), state, masked=True)

    state = online_softmax.init((block_rows,), padded_dim)
    state = lax.fori_loop(inner_first, inner_last, functools.partial(chunk, masked=False), state)
    state = lax.fori_loop(0, (inner_first - first) + (last - inner_last), masked_chunk, state)
    row = (i * block_rows + jnp.arange(block_rows, dtype=jnp.int32))[:, None]
    mask = None if padded_dim == head_dim else jnp.broadcast_to(lane < head_dim, (block_rows, padded_dim))
    plgpu.store(out_ref.at[row, n, lane], online_softmax.finalize(state).astype(out_ref.dtype), mask=mask)
