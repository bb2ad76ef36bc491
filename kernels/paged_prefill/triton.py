"""Prefill on GPU: flash attention over cache blocks, in Pallas-Triton.

The queries of a block and the query heads of a kv head are the rows of one matrix (row = query * G + head), cut into
tiles. A program computes one tile, up to the last key that any of its rows attends to. The tiles of a query block and
kv head are neighbors in the grid, so that all but the first find their keys in the L2 cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from .. import gpu, online_softmax, tile
from ..choose import raise_unsupported
from ..tile import Ref


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
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B Q K G H"]:
    """See `paged_prefill`. block_size and H must be powers of two from 16 up, and Q * G a multiple of 16."""
    B, Q, K, G, H = q.shape
    block_size = k_cache.shape[1]
    tile_rows = min(gpu.max_query_rows(H, q.dtype), Q * G & -(Q * G))  # divides Q * G: no tile is partly empty
    if (
        not (gpu.is_power_of_2(block_size) and gpu.is_power_of_2(H))
        or min(block_size, H, tile_rows) < gpu.TENSOR_CORE_ROWS
    ):
        raise_unsupported(
            "paged_prefill",
            "triton",
            "block_size and head dim must be powers of two >= 16, Q * G a multiple of 16",
            q=q,
            k=k_cache,
        )
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tile_rows=tile_rows,
            key_block=gpu.key_block_size(block_size, k_cache.dtype),
            causal=causal,
            scale=scale * gpu.LOG2E,
            window=window,
        ),
        grid=(Q * G // tile_rows, K, B),
        in_specs=[pl.no_block_spec] * 7,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=gpu.num_warps(tile_rows, H), num_stages=2),
        interpret=interpret,
        name="paged_prefill",
    )(q, k_cache, v_cache, block_table, seq_index, q_start, context_lens)


def _key_blocks(
    queries: tuple[Int[Array, ""], Int[Array, ""]],
    context_len: Int[Array, ""],
    key_block: int,
    causal: bool,
    window: int | None,
) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int, Int[Array, ""], Int[Array, ""]]:
    """(first, inner_first, inner_last, last): a tile, whose first and last query are at these positions, attends to the
    key blocks [first, last), and all its rows to all keys of [inner_first, inner_last)."""
    any_row_end, all_rows_end = context_len, context_len
    if causal:
        any_row_end, all_rows_end = (
            jnp.maximum(jnp.minimum(context_len, query + 1), 0) for query in (queries[1], queries[0])
        )
    inner_last, last = lax.div(all_rows_end, key_block), lax.div(any_row_end + (key_block - 1), key_block)
    if window is None:
        return 0, 0, inner_last, last
    first, inner_first = (jnp.maximum(query - window + 1, 0) for query in queries)
    inner_first = jnp.minimum(lax.div(inner_first + (key_block - 1), key_block), last)
    return lax.div(first, key_block), inner_first, jnp.maximum(inner_first, inner_last), last


def _kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    block_table_ref: Ref,
    seq_index_ref: Ref,
    q_start_ref: Ref,
    context_lens_ref: Ref,
    out_ref: Ref,
    *,
    tile_rows: int,
    key_block: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> None:
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, Q, _, G, H = q_ref.shape
    block_size = k_ref.shape[1]
    row = i * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
    j, g = lax.div(row, G), lax.rem(row, G)
    sequence, q_start = seq_index_ref[b], q_start_ref[b]
    context_len = jnp.where(q_start > -Q, context_lens_ref[sequence], 0)
    queries = q_start + lax.div(i * tile_rows, G), q_start + lax.div((i + 1) * tile_rows - 1, G)
    first, inner_first, inner_last, last = _key_blocks(queries, context_len, key_block, causal, window)
    query = q_ref[b, j, h, g, :]

    def chunk(c: Int[Array, ""], state: online_softmax.State, masked: bool) -> online_softmax.State:
        first_key = c * key_block
        block_id, keys = (
            block_table_ref[sequence, lax.div(first_key, block_size)],
            pl.ds(lax.rem(first_key, block_size), key_block),
        )
        scores = tile.qk_dot(query, k_ref[block_id, keys, h, :]) * scale
        if not masked:
            value = v_ref[block_id, keys, h, :]
        else:
            key_pos = first_key + jnp.arange(key_block, dtype=jnp.int32)
            in_context = key_pos < context_len
            value = plgpu.load(v_ref.at[block_id, keys, h, :], mask=in_context[:, None], other=0.0)
            visible = (key_pos[None] <= (q_start + j)[:, None]) & in_context[None] if causal else in_context[None]
            if window is not None:
                visible &= key_pos[None] > (q_start + j)[:, None] - window
            scores = jnp.where(visible, scores, online_softmax.MASKED)
        return online_softmax.update(state, scores, lambda weights: tile.pv_dot(weights, value), exp=jnp.exp2)

    def masked_chunk(e: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        index = first + e  # one loop over the blocks before and after those keeps the program small
        return chunk(jnp.where(index < inner_first, index, index + (inner_last - inner_first)), state, masked=True)

    state = online_softmax.init((tile_rows,), H)
    state = lax.fori_loop(inner_first, inner_last, functools.partial(chunk, masked=False), state)
    if window is None:
        state = lax.fori_loop(inner_last, last, functools.partial(chunk, masked=True), state)
    else:
        state = lax.fori_loop(0, (inner_first - first) + (last - inner_last), masked_chunk, state)
    # An array, not a slice: the interpreter of Pallas stores through slices only or through arrays only.
    lane = jnp.arange(H, dtype=jnp.int32)[None]
    out_ref[b, j[:, None], h, g[:, None], lane] = online_softmax.finalize(state).astype(out_ref.dtype)
