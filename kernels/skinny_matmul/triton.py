"""Products of few rows on GPU, in Pallas-Triton, on the tensor cores: the rows stay, the weight streams past them.

Triton copies the blocks to come into shared memory while the tensor cores work on this one. K is split until there are
programs for every multiprocessor; whoever reads the product adds the parts.

The tensor cores take 16 rows at least. Where there is but one, the parts of the residual that it is the sum of, or the
splits of the attention that it is merged from, go in as rows of their own, and their products are added: so no kernel
between two products has to make the row whole. The sum of its squares falls out of a product of the parts with
themselves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int

from .. import online_softmax
from ..attn_states import AttnStates
from ..choose import refuse
from .types import Product, ResidualParts, Tile


def run(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Float[Array, "K *pair N"],
    *,
    tile: Tile,
    eps: float,
    reserve: int,
    into: Float[Array, "parts N"] | None,
    interpret: bool = False,
) -> Product:
    """See `skinny_matmul`. bfloat16; the tile must divide the weight and, of attention states, the heads."""
    K, N, gated = weight.shape[0], weight.shape[-1], weight.ndim == 3
    inputs: dict[str, Any] = {"x": x}
    if isinstance(x, AttnStates):
        inputs = {"x": x.out[:, 0], "lse": x.lse[:, 0]}
    elif isinstance(x, ResidualParts):
        inputs = {"x": x.parts, "norm_weight": x.norm_weight}
    head_dim = K // x.lse.shape[2] if isinstance(x, AttnStates) else 0
    _check(x, inputs["x"], weight, tile, head_dim)
    M = inputs["x"].shape[0] if isinstance(x, Array) else 1
    inputs["weight"] = weight
    outputs = {"out": jax.ShapeDtypeStruct(*(((M, N), jnp.bfloat16) if gated else ((tile.split_k, M, N), jnp.float32)))}
    if into is not None:
        inputs["into"], outputs["out"] = into, jax.ShapeDtypeStruct(into.shape, into.dtype)
    if isinstance(x, ResidualParts):
        outputs["residual"] = jax.ShapeDtypeStruct((1 + reserve, K), jnp.bfloat16)
        if not gated:
            outputs["sum_squares"] = jax.ShapeDtypeStruct((tile.split_k, 1), jnp.float32)
    columns = N // tile.block_n
    done = pl.pallas_call(
        functools.partial(_kernel, names=(*inputs, *outputs), tile=tile, columns=columns, head_dim=head_dim, eps=eps),
        grid=(pl.cdiv(M, tile.block_m), columns + isinstance(x, ResidualParts), tile.split_k),
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=list(outputs.values()),
        input_output_aliases={} if into is None else {len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="skinny_matmul",
    )(*inputs.values())
    return Product(**dict(zip(outputs, done, strict=True)))


def _check(x: Any, rows: Float[Array, "M K"], weight: Float[Array, "K *pair N"], tile: Tile, head_dim: int) -> None:
    why, span = "", weight.shape[0] // tile.split_k
    if not rows.dtype == weight.dtype == jnp.bfloat16:
        why = "rows and weights are bfloat16"
    elif weight.shape[0] % tile.split_k or weight.shape[-1] % tile.block_n or span % tile.block_k:
        why = f"{tile} does not divide the weight"
    elif weight.ndim == 3 and tile.split_k > 1:
        why = "a gated product needs whole sums over K"
    elif not isinstance(x, Array) and rows.shape[0] > tile.block_m:
        why = f"a row comes in at most {tile.block_m} parts"
    elif isinstance(x, AttnStates) and (x.out.shape[1] > 1 or span % head_dim or head_dim % tile.block_k):
        why = f"states are of one row, and {tile} must take whole heads"
    if why:
        refuse("skinny_matmul", "triton", why, x=rows, weight=weight)


def _kernel(*refs: Any, names: tuple[str, ...], tile: Tile, columns: int, head_dim: int, eps: float) -> None:
    """Rows [m * block_m, ...), columns [n * block_n, ...) and part s of K; past the last column, the residual."""
    r = dict(zip(names, refs, strict=True))
    m, n, s = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if "norm_weight" not in r:
        _multiply(r, tile, m, n, s, head_dim, eps)
        return
    pl.when(n < columns)(lambda: _multiply(r, tile, m, n, s, head_dim, eps))
    pl.when(n == columns)(lambda: _sum_residual(r, tile, s))


def _sum_residual(r: dict[str, Any], tile: Tile, s: Int[Array, ""]) -> None:
    R, K = r["x"].shape
    span = K // tile.split_k
    at = jnp.arange(pl.next_power_of_2(span), dtype=jnp.int32)
    live, k = at < span, s * span + at
    parts = [plgpu.load(r["x"].at[jnp.int32(i), k], mask=live, other=0.0) for i in range(R)]
    total = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])
    plgpu.store(r["residual"].at[jnp.int32(0), k], total.astype(jnp.bfloat16), mask=live)
    if "sum_squares" in r:
        r["sum_squares"][s, 0] = jnp.sum(total * total)


def _multiply(r: dict[str, Any], tile: Tile, m: Any, n: Any, s: Any, head_dim: int, eps: float) -> None:
    weight, gated = r["weight"], len(r["weight"].shape) == 3
    M, K = r["x"].shape
    trips = K // (tile.split_k * tile.block_k)
    row = m * tile.block_m + jnp.arange(tile.block_m, dtype=jnp.int32)
    column = n * tile.block_n + jnp.arange(tile.block_n, dtype=jnp.int32)
    normed = "norm_weight" in r
    in_parts = bool(head_dim) or normed
    merging = _merge_weights(r, row, s, trips * tile.block_k // head_dim) if head_dim else None
    norm_here = normed and gated

    def step(i: Int[Array, ""], carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        sums, gram = carry
        k = (s * trips + i) * tile.block_k + jnp.arange(tile.block_k, dtype=jnp.int32)
        if gated:
            blocks = [plgpu.load(weight.at[k[:, None], side, column[None]]) for side in range(2)]
        else:
            blocks = [plgpu.load(weight.at[k[:, None], column[None]])]
        at = r["x"].at[jnp.minimum(row, M - 1)[:, None], k[None]]
        # Rows past the last repeat it, and are dropped at the end; parts past the last would be added, so are zero.
        x = plgpu.load(at, mask=(row < M)[:, None], other=0.0) if in_parts else plgpu.load(at)
        if merging is not None:
            own = jnp.arange(merging.shape[1], dtype=jnp.int32)[None] == lax.div(i * tile.block_k, head_dim)
            x = (x.astype(jnp.float32) * jnp.where(own, merging, 0.0).sum(1)[:, None]).astype(jnp.bfloat16)
        gram = gram + _dot(x, x.T) if norm_here else gram
        x = x * r["norm_weight"][k][None] if normed else x
        return [a + _dot(x, block) for a, block in zip(sums, blocks, strict=True)], gram

    zeros = jnp.zeros((tile.block_m, tile.block_n), jnp.float32)
    gram = jnp.zeros((tile.block_m, tile.block_m) if norm_here else (1, 1), jnp.float32)
    sums, gram = lax.fori_loop(0, trips, step, ([zeros] * (2 if gated else 1), gram))
    live = (row < M)[:, None]
    if in_parts:
        sums, row, live = [a.sum(0)[None] for a in sums], jnp.zeros(1, jnp.int32), jnp.ones((1, 1), jnp.bool_)
    if norm_here:
        factor = lax.rsqrt(jnp.sum(gram) / K + eps)
        sums = [a * factor for a in sums]
    _store(r, sums, s, row, column, live)


def _store(r: dict[str, Any], sums: list[Array], s: Any, row: Array, at: Array, live: Array) -> None:
    """The sums [rows, columns] of gate and up, or of part s of K."""
    if len(sums) == 2:
        gate, up = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in sums)
        out = (gate / (1.0 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
        plgpu.store(r["out"].at[row[:, None], at[None]], out, mask=live)
    elif "into" in r:
        plgpu.store(r["out"].at[row[:, None] + s + 1, at[None]], sums[0].astype(r["out"].dtype), mask=live)
    else:
        plgpu.store(r["out"].at[s, row[:, None], at[None]], sums[0], mask=live)


def _merge_weights(
    r: dict[str, Any], row: Int[Array, "rows"], s: Int[Array, ""], count: int
) -> Float32[Array, "rows heads"]:
    """f32[rows, heads]: the weight of each split of the keys, for each of the `count` heads in part s of K."""
    splits, heads = r["lse"].shape
    j = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    at = jnp.minimum(row, splits - 1)[:, None], jnp.minimum(s * count + j, heads - 1)[None]
    lse = plgpu.load(r["lse"].at[at], mask=(row < splits)[:, None], other=online_softmax.MASKED)
    weight = jnp.exp2(lse - lse.max(0)[None])
    return weight / weight.sum(0)[None]


def _dot(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Float32[Array, "rows columns"]:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
