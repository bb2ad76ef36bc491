"""Products of few rows on GPU, in Pallas-Triton: the rows stay, the weight streams past them, through the tensor cores.

Triton copies the blocks to come into shared memory while the tensor cores work on this one. K is split until there are
programs for every multiprocessor; whoever reads the product adds the parts.

The tensor cores take 16 rows at least. Where there is but one, the parts of the residual that it is the sum of, or the
splits of the attention that it is merged from, go in as rows of their own, and their products are added: so no kernel
between two products has to make the row whole. The sum of its squares falls out of a product of the parts with
themselves.

int8 weights meet one row only, on the CUDA cores. A tensor core takes numbers that follow each other along K in one
register, and the weights lie along N: bfloat16 is transposed on its way from shared memory, but bytes cannot be, and
are read and converted one by one: int8 took as long as bfloat16 on an H100 (2048 x 2 x 11008: 31 us, where the bytes
allow 15).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Shaped

from .. import online_softmax
from ..attn_states import AttnStates
from ..choose import raise_unsupported
from .types import Product, ResidualParts, Tile

Carry = tuple[list[Float32[Array, "_ columns"]], Float32[Array, "..."]]
"""The sums of a tile, of gate and up if gated, and the squares of the row for its norm."""


def run(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Shaped[Array, "K *pair N"],
    scale: Float[Array, "*pair N"] | None = None,
    *,
    tile: Tile,
    eps: float,
    reserve: int,
    into: Float[Array, "parts N"] | None,
    interpret: bool = False,
) -> Product:
    """See `skinny_matmul`. bfloat16, or one row times int8; the tile must divide the weight and, of attention states,
    the heads."""
    K, N, gated = weight.shape[0], weight.shape[-1], weight.ndim == 3
    inputs: dict[str, Any] = {"x": x}
    if isinstance(x, AttnStates):
        inputs = {"x": x.out[:, 0], "lse": x.lse[:, 0]}
    elif isinstance(x, ResidualParts):
        inputs = {"x": x.parts, "norm_weight": x.norm_weight}
    head_dim = K // x.lse.shape[2] if isinstance(x, AttnStates) else 0
    int8 = weight.dtype == jnp.int8 and scale is not None
    _check(x, inputs["x"], weight, tile, head_dim, int8)
    M = 1 if isinstance(x, AttnStates | ResidualParts) else inputs["x"].shape[0]
    inputs |= {"weight": weight, "scale": scale} if int8 else {"weight": weight}
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


def _check(
    x: Any, rows: Float[Array, "M K"], weight: Shaped[Array, "K *pair N"], tile: Tile, head_dim: int, int8: bool
) -> None:
    why, span = "", weight.shape[0] // tile.split_k
    if rows.dtype != jnp.bfloat16 or not (int8 or weight.dtype == jnp.bfloat16):
        why = "rows are bfloat16, and weights are too or int8 with a scale"
    elif int8 and not isinstance(x, AttnStates | ResidualParts) and rows.shape[0] > 1:
        why = "int8 weights take one row"
    elif weight.shape[0] % tile.split_k or weight.shape[-1] % tile.block_n or span % tile.block_k:
        why = f"{tile} does not divide the weight"
    elif weight.ndim == 3 and tile.split_k > 1:
        why = "a gated product needs whole sums over K"
    elif isinstance(x, AttnStates | ResidualParts) and rows.shape[0] > tile.block_m:
        why = f"a row comes in at most {tile.block_m} parts"
    elif isinstance(x, AttnStates) and (x.out.shape[1] > 1 or span % head_dim or head_dim % tile.block_k):
        why = f"states are of one row, and {tile} must take whole heads"
    if why:
        raise_unsupported("skinny_matmul", "triton", why, x=rows, weight=weight)


def _kernel(*refs: Any, names: tuple[str, ...], tile: Tile, columns: int, head_dim: int, eps: float) -> None:
    """Rows [m * block_m, ...), columns [n * block_n, ...) and part s of K; past the last column, the residual."""
    r = dict(zip(names, refs, strict=True))
    m, n, s = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    def multiply() -> None:
        if "scale" in r:
            _multiply_int8(r, tile, n, s, head_dim, eps)
        else:
            _multiply(r, tile, m, n, s, head_dim, eps)

    if "norm_weight" not in r:
        multiply()
        return
    pl.when(n < columns)(multiply)
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

    def step(i: Int[Array, ""], carry: Carry) -> Carry:
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


def _multiply_int8(r: dict[str, Any], tile: Tile, n: Any, s: Any, head_dim: int, eps: float) -> None:
    """A thread takes 16 columns of a row of the weight as they lie, and keeps a sum for each of its numbers in a block;
    the sums of a column are added at the end. Triton copies ahead for the tensor cores only, so num_stages blocks are
    asked for at once, before the first is used."""
    weight, gated, normed = r["weight"], len(r["weight"].shape) == 3, "norm_weight" in r
    K = r["x"].shape[1]
    trips = K // (tile.split_k * tile.block_k)
    column = n * tile.block_n + jnp.arange(tile.block_n, dtype=jnp.int32)
    lane = jnp.arange(tile.block_k, dtype=jnp.int32)

    def load(trip: Int[Array, ""]) -> tuple[Int[Array, "block_k"], list[Int8[Array, "block_k block_n"]]]:
        k = (s * trips + jnp.minimum(trip, trips - 1)) * tile.block_k + lane
        if gated:
            return k, [plgpu.load(weight.at[k[:, None], side, column[None]]) for side in range(2)]
        return k, [plgpu.load(weight.at[k[:, None], column[None]])]

    def head_of(trip: Int[Array, ""]) -> Any:
        at = (s * trips + jnp.minimum(trip, trips - 1)) * tile.block_k
        return lax.div(at, head_dim) if head_dim else 0

    def step(i: Int[Array, ""], carry: Carry) -> Carry:
        sums, squares = carry
        ahead = [i * tile.num_stages + j for j in range(tile.num_stages)]
        loaded = [load(trip) for trip in ahead]
        rows = [
            jnp.where(trip < trips, _sum_parts(r, k, head_of(trip), head_dim), 0.0)
            for trip, (k, _) in zip(ahead, loaded, strict=True)
        ]
        for x, (k, blocks) in zip(rows, loaded, strict=True):
            if normed:
                squares = squares + x * x
                x = x * r["norm_weight"][k].astype(jnp.float32)
            sums = [a + x[:, None] * _int8_to_float32(block) for a, block in zip(sums, blocks, strict=True)]
        return sums, squares

    zeros = [jnp.zeros((tile.block_k, tile.block_n), jnp.float32)] * (2 if gated else 1)
    carry = zeros, jnp.zeros(tile.block_k, jnp.float32)
    blocks, squares = lax.fori_loop(0, pl.cdiv(trips, tile.num_stages), step, carry)
    factor = lax.rsqrt(jnp.sum(squares) / K + eps) if normed and gated else jnp.float32(1)
    scales = [r["scale"][side, column] for side in range(2)] if gated else [r["scale"][column]]
    sums = [
        (block.sum(0) * factor * scale.astype(jnp.float32))[None] for block, scale in zip(blocks, scales, strict=True)
    ]
    _store(r, sums, s, jnp.zeros(1, jnp.int32), column, jnp.ones((1, 1), jnp.bool_))


def _sum_parts(r: dict[str, Any], k: Int[Array, "block_k"], head: Any, head_dim: int) -> Float32[Array, "block_k"]:
    """The row whole, its splits of attention merged or its parts added. Each thread loads what it needs:
    nothing waits for other threads."""
    parts = [jnp.int32(i) for i in range(r["x"].shape[0])]
    rows = [plgpu.load(r["x"].at[i, k]).astype(jnp.float32) for i in parts]
    if head_dim:
        lse = [r["lse"][i, head] for i in parts]
        top = functools.reduce(jnp.maximum, lse)
        weights = [jnp.exp2(x - top) for x in lse]
        total = functools.reduce(jnp.add, weights)
        rows = [row * (weight / total) for row, weight in zip(rows, weights, strict=True)]
    return functools.reduce(jnp.add, rows)


def _int8_to_float32(x: Int8[Array, "..."]) -> Float32[Array, "..."]:
    """Exact, in two cheap instructions after the byte is extended: added to the bits of 1.5 * 2^23, which is then taken
    away. The conversion of a byte runs at a quarter of their rate or less."""
    bits = x.astype(jnp.int32) + jnp.int32(0x4B400000)
    return lax.bitcast_convert_type(bits, jnp.float32) - jnp.float32(12582912.0)


def _store(
    r: dict[str, Any],
    sums: list[Float32[Array, "rows columns"]],
    s: Any,
    row: Int[Array, "rows"],
    at: Int[Array, "columns"],
    live: Bool[Array, "rows one"],
) -> None:
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
