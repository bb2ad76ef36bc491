"""Segment attention on TPU, in Pallas-Mosaic: flash attention of a block of queries of one head over the keys of its
segments.

The number of key blocks is a value: that of the query block that attends most. The others' surplus steps copy nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from .. import online_softmax, tile, tpu
from ..choose import refuse
from .bounds import as_keys, bounds, unpad, whole_blocks

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
        refuse("segment_attention", "mosaic_tpu", "the TPU has no float16", q=q)
    block = BLOCK if q.shape[0] >= BLOCK else tpu.LANES
    padded, padded_ids = whole_blocks((q, k, v), segment_ids, block, segment_len)
    query, key, value = (x.swapaxes(0, 1) for x in padded)
    low, high, _ = bounds(padded_ids, block)
    first, last = lax.div(low, block), lax.div(high + (block - 1), block)
    steps = jnp.maximum(jnp.max(last - first), 1)

    def keys(i: Any, p: Any, first: Any, last: Any) -> Any:
        return jnp.maximum(jnp.minimum(first[i] + p, last[i] - 1), 0)

    queries = pl.BlockSpec((None, block, H), lambda n, i, p, *_: (n, i, 0))
    others = pl.BlockSpec((None, block, H), lambda n, i, p, *bounds: (n, keys(i, p, *bounds), 0))
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N, padded_ids.shape[0] // block, steps),
            in_specs=[
                queries,
                others,
                others,
                pl.BlockSpec((block, 1), lambda n, i, p, *_: (i, 0)),
                pl.BlockSpec((1, block), lambda n, i, p, *bounds: (0, keys(i, p, *bounds))),
            ],
            out_specs=queries,
            scratch_shapes=tpu.state((block,), H),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="segment_attention",
    )(first, last, query, key, value, padded_ids[:, None], as_keys(padded_ids, key_mask)[None])
    return unpad(out.swapaxes(0, 1), U, segment_len)


def _kernel(
    first_ref: Any,
    last_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    own_ref: Any,
    other_ref: Any,
    out_ref: Any,
    top: Any,
    total: Any,
    values: Any,
    *,
    scale: float,
) -> None:
    i, p = pl.program_id(1), pl.program_id(2)
    pl.when(p == 0)(lambda: tpu.start(top, total, values))

    @pl.when(first_ref[i] + p < last_ref[i])
    def fold() -> None:
        x = tile.scores(q_ref[...], k_ref[...]) * scale
        x = jnp.where(own_ref[...] == other_ref[...], x, online_softmax.MASKED)
        tpu.fold((), top, total, values, x, v_ref[...])

    @pl.when(p == pl.num_programs(2) - 1)
    def finish() -> None:
        out_ref[...] = tpu.finish(total, values).astype(out_ref.dtype)
