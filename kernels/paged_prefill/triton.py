"""Prefill on GPU: flash attention over cache blocks, in Pallas-Triton.

The queries of a block and the query heads of a kv head make the rows of one matrix (row = query * G + head), cut into
tiles; a program serves one tile, up to the last key that the tile attends. Tiles of a block and kv head are neighbors
in the grid, so that all but the first find their keys in the L2 cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from .. import gpu, online_softmax, tile
from ..choose import refuse


def run(
    q: Float[Array, "B Q K G H"],
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B Q K G H"]:
    """See `paged_prefill`. block_size and H must be powers of two from 16 up, and Q * G a multiple of 16."""
    B, Q, K, G, H = q.shape
    block_size = k_cache.shape[1]
    rows = min(gpu.query_rows(H, q.dtype), Q * G & -(Q * G))  # the largest power of two that leaves no tile half empty
    if not (gpu.power_of_2(block_size) and gpu.power_of_2(H)) or min(block_size, H, rows) < gpu.TENSOR_CORE_ROWS:
        refuse(
            "paged_prefill",
            "triton",
            "page and head dim must be powers of two >= 16, Q * G a multiple of 16",
            q=q,
            k=k_cache,
        )
    return pl.pallas_call(
        functools.partial(
            _kernel, rows=rows, block=gpu.key_block(block_size, k_cache.dtype), causal=causal, scale=scale * gpu.LOG2E
        ),
        grid=(Q * G // rows, K, B),
        in_specs=[pl.no_block_spec] * 7,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=gpu.warps(rows, H), num_stages=2),
        interpret=interpret,
        name="paged_prefill",
    )(q, k_cache, v_cache, block_table, seq_index, q_start, context_lens)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_table_ref: Any,
    seq_index_ref: Any,
    q_start_ref: Any,
    context_lens_ref: Any,
    out_ref: Any,
    *,
    rows: int,
    block: int,
    causal: bool,
    scale: float,
) -> None:
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, Q, _, G, H = q_ref.shape
    block_size = k_ref.shape[1]
    row = i * rows + jnp.arange(rows, dtype=jnp.int32)
    j, g = lax.div(row, G), lax.rem(row, G)
    sequence, q_start = seq_index_ref[b], q_start_ref[b]
    context_len = jnp.where(q_start > -Q, context_lens_ref[sequence], 0)
    first_query, last_query = q_start + lax.div(i * rows, G), q_start + lax.div((i + 1) * rows - 1, G)
    visible_to_any = jnp.maximum(jnp.minimum(context_len, last_query + 1), 0) if causal else context_len
    visible_to_all = jnp.maximum(jnp.minimum(context_len, first_query + 1), 0) if causal else context_len
    query = q_ref[b, j, h, g, :]

    def chunk(c: Int[Array, ""], state: online_softmax.State, masked: bool) -> online_softmax.State:
        at = c * block
        block_id, keys = block_table_ref[sequence, lax.div(at, block_size)], pl.ds(lax.rem(at, block_size), block)
        x = tile.scores(query, k_ref[block_id, keys, h, :]) * scale
        if not masked:
            value = v_ref[block_id, keys, h, :]
        else:
            position = at + jnp.arange(block, dtype=jnp.int32)
            live = position < context_len
            value = plgpu.load(v_ref.at[block_id, keys, h, :], mask=live[:, None], other=0.0)
            visible = (position[None] <= (q_start + j)[:, None]) & live[None] if causal else live[None]
            x = jnp.where(visible, x, online_softmax.MASKED)
        return online_softmax.fold(state, x, lambda weights: tile.weigh(weights, value), exp=jnp.exp2)

    whole = lax.div(visible_to_all, block)
    state = online_softmax.start((rows,), H)
    state = lax.fori_loop(0, whole, functools.partial(chunk, masked=False), state)
    state = lax.fori_loop(
        whole, lax.div(visible_to_any + (block - 1), block), functools.partial(chunk, masked=True), state
    )
    # As an array, not as a slice: the interpreter stores through all slices or none.
    lane = jnp.arange(H, dtype=jnp.int32)[None]
    out_ref[b, j[:, None], h, g[:, None], lane] = online_softmax.finish(state).astype(out_ref.dtype)
