"""Decode on TPU, in Pallas-Mosaic: a grid step takes a few cache blocks of one sequence, all kv heads at once, straight
from the cache.

The number of steps is a value, not a shape: it follows from the longest sequence. A shorter sequence's surplus steps
name its last block again, which is not copied a second time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from .. import online_softmax, tile, tpu
from ..choose import refuse

STEP_KEYS = 256
"""Keys of a grid step: enough bytes in flight to hide the latency of a copy."""
MAX_STEP_BLOCKS = 8
"""Each block is unrolled: 16 took a minute to compile."""


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[1]
    if jnp.float16 in (q.dtype, k_cache.dtype):
        refuse("paged_decode", "mosaic_tpu", "the TPU has no float16", q=q, k=k_cache)
    count = max(1, min(STEP_KEYS // block_size, MAX_STEP_BLOCKS, block_table.shape[1]))
    rows = tpu.sublanes(G, q.dtype)
    query = jnp.pad(q, ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    steps = jnp.maximum(lax.div(jnp.max(context_lens) + (count * block_size - 1), count * block_size), 1)

    def cache_block(j: int) -> pl.BlockSpec:
        def index(s: Any, p: Any, block_table: Any, context_lens: Any) -> tuple[Any, ...]:
            last = jnp.maximum(lax.div(context_lens[s] + (block_size - 1), block_size) - 1, 0)
            return block_table[s, jnp.minimum(p * count + j, last)], 0, 0, 0

        return pl.BlockSpec((None, block_size, K, H), index)

    heads = pl.BlockSpec((None, K, rows, H), lambda s, p, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, count=count, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(S, steps),
            in_specs=[heads, *[cache_block(j) for j in range(count)] * 2],
            out_specs=heads,
            scratch_shapes=tpu.state((K, rows), H),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="paged_decode",
    )(block_table, context_lens, query, *[k_cache] * count, *[v_cache] * count)
    return out[:, :, :G]


def _kernel(block_table_ref: Any, context_lens_ref: Any, q_ref: Any, *refs: Any, count: int, scale: float) -> None:
    k_refs, v_refs = refs[:count], refs[count : 2 * count]
    out_ref, top, total, values = refs[2 * count :]
    s, p = pl.program_id(0), pl.program_id(1)
    block_size, K, _ = k_refs[0].shape
    context_len = context_lens_ref[s]
    pl.when(p == 0)(lambda: tpu.start(top, total, values))
    for j in range(count):
        first = (p * count + j) * block_size

        def fold(first: Any = first, k_ref: Any = k_refs[j], v_ref: Any = v_refs[j]) -> None:
            live = first + lax.broadcasted_iota(jnp.int32, (block_size, 1), 0) < context_len
            visible = first + lax.broadcasted_iota(jnp.int32, (1, block_size), 1) < context_len
            for h in range(K):
                x = jnp.where(visible, tile.scores(q_ref[h], k_ref[:, h, :]) * scale, online_softmax.MASKED)
                value = v_ref[:, h, :]
                tpu.fold((h,), top, total, values, x, jnp.where(live, value, jnp.zeros_like(value)))

        pl.when(first < context_len)(fold)

    @pl.when(p == pl.num_programs(1) - 1)
    def finish() -> None:
        out_ref[...] = tpu.finish(total, values).astype(out_ref.dtype)
