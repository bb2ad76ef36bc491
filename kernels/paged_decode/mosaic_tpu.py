"""Decode on TPU, in Pallas-Mosaic: a grid step reads a few cache blocks of one sequence, for all kv heads.

The number of grid steps is computed at run time, from the sequence that attends to the most blocks. The surplus steps
of the others name their last block again, which Pallas does not copy again.
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
"""Keys per grid step: enough bytes in flight to hide the latency of a copy."""
MAX_STEP_BLOCKS = 8
"""The loop over the blocks of a step is unrolled: with 16 blocks, compilation took a minute."""


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[1]
    if jnp.float16 in (q.dtype, k_cache.dtype):
        raise_unsupported("paged_decode", "mosaic_tpu", "the TPU has no float16", q=q, k=k_cache)
    blocks_per_step = max(1, min(STEP_KEYS // block_size, MAX_STEP_BLOCKS, block_table.shape[1]))
    padded_rows = tpu.round_up_to_tile(G, q.dtype)
    query = jnp.pad(q, ((0, 0), (0, 0), (0, padded_rows - G), (0, 0)))
    lengths = (
        context_lens if window is None else context_lens - _first_block(context_lens, window, block_size) * block_size
    )
    num_steps = jnp.maximum(
        lax.div(jnp.max(lengths) + (blocks_per_step * block_size - 1), blocks_per_step * block_size), 1
    )

    def cache_block(j: int) -> pl.BlockSpec:
        def index(
            s: Int[Array, ""], p: Int[Array, ""], block_table: Ref, context_lens: Ref
        ) -> tuple[Int[Array, ""], int, int, int]:
            last = jnp.maximum(lax.div(context_lens[s] + (block_size - 1), block_size) - 1, 0)
            block = _first_block(context_lens[s], window, block_size) + p * blocks_per_step + j
            return block_table[s, jnp.minimum(block, last)], 0, 0, 0

        return pl.BlockSpec((None, block_size, K, H), index)

    heads = pl.BlockSpec((None, K, padded_rows, H), lambda s, p, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, blocks_per_step=blocks_per_step, scale=scale, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(S, num_steps),
            in_specs=[heads, *[cache_block(j) for j in range(blocks_per_step)] * 2],
            out_specs=heads,
            scratch_shapes=tpu.softmax_scratch((K, padded_rows), H),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="paged_decode",
    )(block_table, context_lens, query, *[k_cache] * blocks_per_step, *[v_cache] * blocks_per_step)
    return out[:, :, :G]


def _first_block(context_len: Int[Array, "*S"], window: int | None, block_size: int) -> Int[Array, "*S"] | int:
    """The first block of a sequence that holds keys of its window."""
    return 0 if window is None else lax.div(jnp.maximum(context_len - window, 0), block_size)


def _kernel(
    block_table_ref: Ref,
    context_lens_ref: Ref,
    q_ref: Ref,
    *refs: Ref,
    blocks_per_step: int,
    scale: float,
    window: int | None,
) -> None:
    k_refs, v_refs = refs[:blocks_per_step], refs[blocks_per_step : 2 * blocks_per_step]
    out_ref, row_max, row_sum, acc = refs[2 * blocks_per_step :]
    s, p = pl.program_id(0), pl.program_id(1)
    block_size, K, _ = k_refs[0].shape
    context_len = context_lens_ref[s]
    first_block = _first_block(context_len, window, block_size)
    pl.when(p == 0)(lambda: tpu.init(row_max, row_sum, acc))
    for j in range(blocks_per_step):
        first = (first_block + p * blocks_per_step + j) * block_size

        def update(first: Int[Array, ""] = first, k_ref: Ref = k_refs[j], v_ref: Ref = v_refs[j]) -> None:
            in_context = first + lax.broadcasted_iota(jnp.int32, (block_size, 1), 0) < context_len
            key_pos = first + lax.broadcasted_iota(jnp.int32, (1, block_size), 1)
            visible = key_pos < context_len
            if window is not None:
                visible &= key_pos >= context_len - window
            for h in range(K):
                scores = jnp.where(visible, tile.qk_dot(q_ref[h], k_ref[:, h, :]) * scale, online_softmax.MASKED)
                value = v_ref[:, h, :]
                tpu.update((h,), row_max, row_sum, acc, scores, jnp.where(in_context, value, jnp.zeros_like(value)))

        pl.when(first < context_len)(update)

    @pl.when(p == pl.num_programs(1) - 1)
    def write_output() -> None:
        out_ref[...] = tpu.finalize(row_sum, acc).astype(out_ref.dtype)
