"""Products of few rows on GPU, in Pallas-Triton: the rows stay, the weight streams past them, through the tensor cores.

Triton copies the blocks to come into shared memory while the tensor cores work on this one. K is split until there are
programs for every multiprocessor; whoever reads the product adds the parts.

The tensor cores take 16 rows at least. Where there is but one, the parts of the residual that it is the sum of, or the
splits of the attention that it is merged from, go in as rows of their own, and their products are added: so no kernel
between two products has to make the row whole. The sum of its squares falls out of a product of the parts with
themselves.

int8 weights lie along K, as the tensor cores take bytes. They multiply bytes with bytes only, so each row goes in as
three rows of its digits to base 128, a fixed-point number of 21 bits below the row's largest in a block of K: more than
bfloat16 has. The products are exact. For a weight of 2048 x 2 x 11008 that took 17.5 us on an H200; converting the
bytes to bfloat16 took 30, and 31.5 where they lay along N and met the row on the CUDA cores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Shaped

from .. import online_softmax
from ..attn_states import AttnStates
from ..choose import raise_unsupported
from .types import MAX_INT8_ROWS, Product, ResidualParts, Tile

LARGEST = 2.0**20  # of a block's numbers as integers; three digits to base 128 hold twice as much
SMALLEST = 1e-30  # in place of a block's largest number, which may be zero

Carry = tuple[list[Float32[Array, "_ columns"]], Float32[Array, "..."]]
"""The sums of a tile, of gate and up if gated, and the squares of the row for its norm."""


def run(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Shaped[Array, "..."],
    scale: Float[Array, "*pair N"] | None = None,
    *,
    tile: Tile,
    eps: float,
    reserve: int,
    into: Float[Array, "parts N"] | None,
    interpret: bool = False,
) -> Product:
    """See `skinny_matmul`. bfloat16, or up to MAX_INT8_ROWS rows times int8; the tile must divide the weight and, of
    attention states, the heads."""
    int8, gated = scale is not None, weight.ndim == 3
    K, N = (weight.shape[-1], weight.shape[-2]) if int8 else (weight.shape[0], weight.shape[-1])
    inputs: dict[str, Any] = {"x": x}
    if isinstance(x, AttnStates):
        inputs = {"x": x.out[:, 0], "lse": x.lse[:, 0]}
    elif isinstance(x, ResidualParts):
        inputs = {"x": x.parts, "norm_weight": x.norm_weight}
    head_dim = K // x.lse.shape[2] if isinstance(x, AttnStates) else 0
    _check(x, inputs["x"], weight, (K, N), tile, head_dim, int8)
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
        grid=(1 if int8 else pl.cdiv(M, tile.block_m), columns + isinstance(x, ResidualParts), tile.split_k),
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
    x: Any,
    rows: Float[Array, "M K"],
    weight: Shaped[Array, "..."],
    size: tuple[int, int],
    tile: Tile,
    head_dim: int,
    int8: bool,
) -> None:
    why, (K, N) = "", size
    span = K // tile.split_k
    if rows.dtype != jnp.bfloat16 or weight.dtype != (jnp.int8 if int8 else jnp.bfloat16):
        why = "rows are bfloat16, and weights are too or int8 with a scale"
    elif int8 and rows.shape[0] > MAX_INT8_ROWS:
        why = f"int8 weights take at most {MAX_INT8_ROWS} rows"
    elif not tile.divides(K, N, equal_parts=not int8):
        why = f"{tile} does not divide the weight"
    elif weight.ndim == 3 and tile.split_k > 1:
        why = "a gated product needs whole sums over K"
    elif isinstance(x, AttnStates | ResidualParts) and not int8 and rows.shape[0] > tile.block_m:
        why = f"a row comes in at most {tile.block_m} parts"
    elif isinstance(x, AttnStates) and (
        x.out.shape[1] > 1 or head_dim % tile.block_k or (span % head_dim and not int8)
    ):
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
    blocks = K // tile.block_k
    first, last = _part_of(blocks, tile, s)
    at = jnp.arange(pl.next_power_of_2(pl.cdiv(blocks, tile.split_k) * tile.block_k), dtype=jnp.int32)
    k = first * tile.block_k + at
    live = k < last * tile.block_k
    parts = [plgpu.load(r["x"].at[jnp.int32(i), k], mask=live, other=0.0) for i in range(R)]
    total = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])
    plgpu.store(r["residual"].at[jnp.int32(0), k], total.astype(jnp.bfloat16), mask=live)
    if "sum_squares" in r:
        r["sum_squares"][s, 0] = jnp.sum(total * total)


def _part_of(blocks: int, tile: Tile, s: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first block of part s of K, and the first after it."""
    return lax.div(s * blocks, tile.split_k), lax.div((s + 1) * blocks, tile.split_k)


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
    """Columns of the digits: digit d of row m is column d * slots + m; the last digit is none."""
    weight, gated, normed = r["weight"], len(r["weight"].shape) == 3, "norm_weight" in r
    M, K = (1 if head_dim or normed else r["x"].shape[0]), r["x"].shape[1]
    blocks = K // tile.block_k
    first, last = _part_of(blocks, tile, s)
    column = n * tile.block_n + jnp.arange(tile.block_n, dtype=jnp.int32)
    lane = jnp.arange(tile.block_k, dtype=jnp.int32)
    slots = max(4, pl.next_power_of_2(M))
    at = jnp.arange(4 * slots, dtype=jnp.int32)
    digit, row = lax.div(at, slots), lax.rem(at, slots)
    place = jnp.where(digit == 0, 16384.0, jnp.where(digit == 1, 128.0, 1.0)) / LARGEST

    def load_rows(i: Int[Array, ""]) -> Float32[Array, "..."]:
        """The one row whole [block_k], or each column's row [4 * slots, block_k]. The last is loaded once too often."""
        i = jnp.minimum(i, last - 1)
        k = i * tile.block_k + lane
        if M == 1:
            return _sum_parts(r, k, lax.div(i * tile.block_k, head_dim) if head_dim else 0, head_dim)
        return plgpu.load(r["x"].at[jnp.minimum(row, M - 1)[:, None], k[None]]).astype(jnp.float32)

    def step(i: Int[Array, ""], carry: Any) -> Any:
        sums, squares, x = carry
        k = i * tile.block_k + lane
        sides = [(jnp.int32(side),) for side in range(2)] if gated else [()]
        loaded = [plgpu.load(weight.at[*side, column[:, None], k[None]]) for side in sides]
        ahead = load_rows(i + 1)
        if normed:
            squares = squares + x * x
            x = x * r["norm_weight"][k].astype(jnp.float32)
        largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST)
        digits, factor = _digits(x, largest, digit, row < M), place * largest
        sums = [
            total + _dot(block, digits.T, jnp.int32).astype(jnp.float32) * factor[None]
            for total, block in zip(sums, loaded, strict=True)
        ]
        return sums, squares, ahead

    zeros = [jnp.zeros((tile.block_n, 4 * slots), jnp.float32)] * (2 if gated else 1)
    carry = zeros, jnp.zeros(tile.block_k, jnp.float32), load_rows(first)
    totals, squares, _ = lax.fori_loop(first, last, step, carry)
    norm = lax.rsqrt(jnp.sum(squares) / K + eps) if normed and gated else jnp.float32(1)
    scales = [r["scale"][side, column] for side in range(2)] if gated else [r["scale"][column]]
    sums = []
    for total, scale in zip(totals, scales, strict=True):
        by_row = total.sum(1)[None] if M == 1 else total.reshape(tile.block_n, 4, slots).sum(1).T
        sums.append(by_row * (norm * scale.astype(jnp.float32))[None])
    rows = jnp.arange(1 if M == 1 else slots, dtype=jnp.int32)
    _store(r, sums, s, rows, column, (rows < M)[:, None])


def _digits(
    x: Float32[Array, "*rows block_k"],
    largest: Float32[Array, "*rows"],
    digit: Int[Array, "columns"],
    live: Bool[Array, "columns"],
) -> Int8[Array, "columns block_k"]:
    """The digits, highest first, of x / largest * LARGEST, rounded; 0 for columns that are not live."""
    fixed = x * (LARGEST / largest)[..., None]
    fixed = jnp.where(fixed < 0, fixed - 0.5, fixed + 0.5).astype(jnp.int32)
    low = ((fixed + 64) & 127) - 64
    above = (fixed - low) >> 7
    middle = ((above + 64) & 127) - 64
    high = (above - middle) >> 7
    if x.ndim == 1:
        low, middle, high = low[None], middle[None], high[None]
    at, live = digit[:, None], live[:, None]
    return jnp.where(
        live & (at == 0), high, jnp.where(live & (at == 1), middle, jnp.where(live & (at == 2), low, 0))
    ).astype(jnp.int8)


def _sum_parts(r: dict[str, Any], k: Int[Array, "block_k"], head: Any, head_dim: int) -> Float32[Array, "block_k"]:
    """The row whole, its splits of attention merged or its parts added."""
    parts = [jnp.int32(i) for i in range(r["x"].shape[0])]
    rows = [plgpu.load(r["x"].at[i, k]).astype(jnp.float32) for i in parts]
    if head_dim:
        lse = [r["lse"][i, head] for i in parts]
        top = functools.reduce(jnp.maximum, lse)
        weights = [jnp.exp2(x - top) for x in lse]
        total = functools.reduce(jnp.add, weights)
        rows = [row * (weight / total) for row, weight in zip(rows, weights, strict=True)]
    return functools.reduce(jnp.add, rows)


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


def _dot(
    a: Shaped[Array, "rows inner"], b: Shaped[Array, "inner columns"], dtype: DTypeLike = jnp.float32
) -> Shaped[Array, "rows columns"]:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
