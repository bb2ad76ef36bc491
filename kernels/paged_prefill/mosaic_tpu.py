"""Prefill on TPU, in Pallas-Mosaic: flash attention of a block of queries, a few cache blocks of its sequence per grid
step.

As in decode, the number of grid steps is computed at run time, from the query block that attends to the most keys, and
surplus steps copy nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from .. import online_softmax, tile, tpu
from ..choose import raise_unsupported
from ..tile import Ref

STEP_KEYS = 256
MAX_STEP_BLOCKS = 8


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
    """See `paged_prefill`. Each kv head has a matrix of queries, whose row is query * G + head."""
    B, Q, K, G, H = q.shape
    block_size = k_cache.shape[1]
    if jnp.float16 in (q.dtype, k_cache.dtype):
        raise_unsupported("paged_prefill", "mosaic_tpu", "the TPU has no float16", q=q, k=k_cache)
    blocks_per_step = max(1, min(STEP_KEYS // block_size, MAX_STEP_BLOCKS, block_table.shape[1]))
    padded_rows = tpu.round_up_to_tile(Q * G, q.dtype)
    query = q.transpose(0, 2, 1, 3, 4).reshape(B, K, Q * G, H)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, padded_rows - Q * G), (0, 0)))
    block_lens = jnp.where(q_start > -Q, context_lens[seq_index], 0)
    end = jnp.clip(q_start + Q, 0, block_lens) if causal else block_lens
    spans = end if window is None else end - _first_block(q_start, window, block_size) * block_size
    num_steps = jnp.maximum(
        lax.div(jnp.max(spans) + (blocks_per_step * block_size - 1), blocks_per_step * block_size), 1
    )

    def cache_block(j: int) -> pl.BlockSpec:
        def index(
            b: Int[Array, ""], p: Int[Array, ""], block_table: Ref, seq_index: Ref, q_start: Ref, end: Ref
        ) -> tuple[Int[Array, ""], int, int, int]:
            last = jnp.maximum(lax.div(end[b] + (block_size - 1), block_size) - 1, 0)
            block = _first_block(q_start[b], window, block_size) + p * blocks_per_step + j
            return block_table[seq_index[b], jnp.minimum(block, last)], 0, 0, 0

        return pl.BlockSpec((None, block_size, K, H), index)

    heads = pl.BlockSpec((None, K, padded_rows, H), lambda b, p, *_: (b, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, blocks_per_step=blocks_per_step, group=G, causal=causal, scale=scale, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, num_steps),
            in_specs=[heads, *[cache_block(j) for j in range(blocks_per_step)] * 2],
            out_specs=heads,
            scratch_shapes=tpu.softmax_scratch((K, padded_rows), H),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
        ),
        interpret=interpret,
        name="paged_prefill",
    )(block_table, seq_index, q_start, end, query, *[k_cache] * blocks_per_step, *[v_cache] * blocks_per_step)
    return out[:, :, : Q * G].reshape(B, K, Q, G, H).transpose(0, 2, 1, 3, 4)


def _first_block(q_start: Int[Array, "*B"], window: int | None, block_size: int) -> Int[Array, "*B"] | int:
    """The first cache block that a query block attends to."""
    return 0 if window is None else lax.div(jnp.maximum(q_start - window + 1, 0), block_size)


def _kernel(
    block_table_ref: Ref,
    seq_index_ref: Ref,
    q_start_ref: Ref,
    end_ref: Ref,
    q_ref: Ref,
    *refs: Ref,
    blocks_per_step: int,
    group: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> None:
    k_refs, v_refs = refs[:blocks_per_step], refs[blocks_per_step : 2 * blocks_per_step]
    out_ref, row_max, row_sum, acc = refs[2 * blocks_per_step :]
    b, p = pl.program_id(0), pl.program_id(1)
    block_size, K, _ = k_refs[0].shape
    padded_rows = q_ref.shape[1]
    end, first_block = end_ref[b], _first_block(q_start_ref[b], window, block_size)
    pl.when(p == 0)(lambda: tpu.init(row_max, row_sum, acc))
    for j in range(blocks_per_step):
        first = (first_block + p * blocks_per_step + j) * block_size

        def update(first: Int[Array, ""] = first, k_ref: Ref = k_refs[j], v_ref: Ref = v_refs[j]) -> None:
            in_context = first + lax.broadcasted_iota(jnp.int32, (block_size, 1), 0) < end
            key_pos = first + lax.broadcasted_iota(jnp.int32, (padded_rows, block_size), 1)
            visible = key_pos < end
            if causal:
                query_pos = q_start_ref[b] + lax.div(
                    lax.broadcasted_iota(jnp.int32, (padded_rows, block_size), 0), group
                )
                visible &= key_pos <= query_pos
                if window is not None:
                    visible &= key_pos > query_pos - window
            for h in range(K):
                scores = jnp.where(visible, tile.qk_dot(q_ref[h], k_ref[:, h, :]) * scale, online_softmax.MASKED)
                value = v_ref[:, h, :]
                tpu.update((h,), row_max, row_sum, acc, scores, jnp.where(in_context, value, jnp.zeros_like(value)))

        pl.when(first < end)(update)

    @pl.when(p == pl.num_programs(1) - 1)
    def write_output() -> None:
        out_ref[...] = tpu.finalize(row_sum, acc).astype(out_ref.dtype)
