"""Segment attention on TPU, in Pallas-Mosaic: flash attention of a block of queries of one head over the keys of its
segments.

The number of grid steps is computed at run time, from the query block that attends to the most keys. The surplus steps
of the others copy nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from .. import online_softmax, tile, tpu
from ..choose import raise_unsupported
from ..tile import Ref
from .bounds import key_bounds, key_segment_ids, pad_to_blocks, unpad

BLOCK = 256


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
    """See `segment_attention`."""
    U, N, H = q.shape
    if q.dtype == jnp.float16:
        raise_unsupported("segment_attention", "mosaic_tpu", "the TPU has no float16", q=q)
    block = BLOCK if q.shape[0] >= BLOCK else tpu.LANES
    padded, query_ids = pad_to_blocks((q, k, v), segment_ids, block, segment_len)
    query, key, value = (x.swapaxes(0, 1) for x in padded)
    low, high, _ = key_bounds(query_ids, block)
    first, last = lax.div(low, block), lax.div(high + (block - 1), block)
    num_steps = jnp.maximum(jnp.max(last - first), 1)

    def key_block_index(i: Int[Array, ""], p: Int[Array, ""], first: Ref, last: Ref) -> Int[Array, ""]:
        return jnp.maximum(jnp.minimum(first[i] + p, last[i] - 1), 0)

    query_spec = pl.BlockSpec((None, block, H), lambda n, i, p, *_: (n, i, 0))
    key_spec = pl.BlockSpec((None, block, H), lambda n, i, p, *key_range: (n, key_block_index(i, p, *key_range), 0))
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N, query_ids.shape[0] // block, num_steps),
            in_specs=[
                query_spec,
                key_spec,
                key_spec,
                pl.BlockSpec((block, 1), lambda n, i, p, *_: (i, 0)),
                pl.BlockSpec((1, block), lambda n, i, p, *key_range: (0, key_block_index(i, p, *key_range))),
            ],
            out_specs=query_spec,
            scratch_shapes=tpu.softmax_scratch((block,), H),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="segment_attention",
    )(first, last, query, key, value, query_ids[:, None], key_segment_ids(query_ids, key_mask)[None])
    return unpad(out.swapaxes(0, 1), U, segment_len)


def _kernel(
    first_ref: Ref,
    last_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    query_ids_ref: Ref,
    key_ids_ref: Ref,
    out_ref: Ref,
    row_max: Ref,
    row_sum: Ref,
    acc: Ref,
    *,
    scale: float,
) -> None:
    i, p = pl.program_id(1), pl.program_id(2)
    pl.when(p == 0)(lambda: tpu.init(row_max, row_sum, acc))

    @pl.when(first_ref[i] + p < last_ref[i])
    def update() -> None:
        scores = tile.qk_dot(q_ref[...], k_ref[...]) * scale
        scores = jnp.where(query_ids_ref[...] == key_ids_ref[...], scores, online_softmax.MASKED)
        tpu.update((), row_max, row_sum, acc, scores, v_ref[...])

    @pl.when(p == pl.num_programs(2) - 1)
    def write_output() -> None:
        out_ref[...] = tpu.finalize(row_sum, acc).astype(out_ref.dtype)
