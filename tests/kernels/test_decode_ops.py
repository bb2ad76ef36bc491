"""The ops of a fused decode step, every implementation on one table of cases, against float64 NumPy."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mmjax.kernels import AttnStates, QKVEpilogue, ResidualParts, Tile
from mmjax.kernels.choose import implementation
from mmjax.kernels.fused_decode import triton as fused_triton

from mmjax import kernels

Array = np.ndarray[Any, Any]
IMPLEMENTATIONS = ("reference", "triton")
EPS = 1e-6
BF16 = 2.0**-8


def program(op: str, impl: str, **static: object) -> Callable[..., Any]:
    """The implementation, compiled; the GPU's is interpreted."""
    interpret = {} if impl == "reference" else {"interpret": True}
    run = functools.partial(implementation(op, impl), **static, **interpret)
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # compiled once, run once


# NumPy converts, cuts and sums arrays, and device_put makes them jax's: every op of jax.numpy, jnp.asarray too, is one
# more program to compile for every shape.


def bfloat16(x: Array) -> jax.Array:
    return jax.device_put(np.asarray(x).astype(jnp.bfloat16))


def exact(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.device_put(np.zeros(shape, dtype))


def assert_close(got: Any, want: Array, eps: float = 4 * BF16) -> None:
    """Errors in units of the largest number expected: sums of products cancel."""
    assert got.shape == want.shape
    np.testing.assert_allclose(exact(got), want, atol=eps * np.abs(want).max(), rtol=0)


def normal(seed: int, *shape: int) -> jax.Array:
    return bfloat16(np.random.default_rng(seed).standard_normal(shape))


def rms(x: Array) -> Array:
    return np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


# -- skinny_matmul ---------------------------------------------------------------------------------------------------

WIDTH, HEAD_DIM = 256, 64
PLAIN = {
    "one_row": (1, Tile(64, 32, 2)),
    "split": (1, Tile(32, 64, 2, split_k=4)),
    "rows": (5, Tile(64, 64, 2, split_k=2)),
    "blocks_of_rows": (37, Tile(64, 64, 2, split_k=2, block_m=16)),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())
def test_product(case: tuple[int, Tile], impl: str) -> None:
    rows, tile = case
    x, weight = normal(0, rows, WIDTH), normal(1, WIDTH, 128)
    out = program("skinny_matmul", impl, tile=tile, eps=0.0, reserve=0, into=None)(x, weight).out
    assert out.dtype == jnp.float32 and out.shape[0] == tile.split_k
    span = WIDTH // tile.split_k
    want = [exact(x)[:, i : i + span] @ exact(weight)[i : i + span] for i in range(0, WIDTH, span)]
    assert_close(out, np.stack(want), 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 21])
def test_gated_product(rows: int, impl: str) -> None:
    x, weight = normal(0, rows, WIDTH), normal(1, WIDTH, 2, 128)
    run = program("skinny_matmul", impl, tile=Tile(64, 64, 2), eps=0.0, reserve=0, into=None)
    out = run(x, weight).out
    assert out.dtype == jnp.bfloat16
    gate, up = (exact(x) @ exact(weight)[:, side] for side in range(2))
    assert_close(out, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_product_of_a_residual_in_parts(gated: bool, impl: str) -> None:
    parts, norm_weight = normal(0, 9, WIDTH), normal(2, WIDTH)
    weight = normal(1, WIDTH, 2, 128) if gated else normal(1, WIDTH, 128)
    tile = Tile(64, 64, 2, split_k=1 if gated else 4)
    run = program("skinny_matmul", impl, tile=tile, eps=EPS, reserve=3, into=None)
    out, residual, sum_squares = run(ResidualParts(parts, norm_weight), weight)
    total = exact(parts).sum(0, keepdims=True)
    assert residual.shape == (4, WIDTH)
    assert_close(exact(residual)[:1], total, BF16)
    scaled = total * exact(norm_weight)
    if gated:
        gate, up = (scaled / rms(total) @ exact(weight)[:, side] for side in range(2))
        assert_close(out, gate / (1 + np.exp(-gate)) * up)
        return
    assert_close(exact(out).sum(0), scaled @ exact(weight), 8 * BF16)
    assert_close(sum_squares, (total.reshape(4, -1) ** 2).sum(1, keepdims=True), BF16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_product_of_attention_in_splits_into_residual_parts(impl: str) -> None:
    states = attn_states(4, 1)
    weight, residual = normal(1, WIDTH, 128), normal(2, 3, 128)
    run = program("skinny_matmul", impl, tile=Tile(64, 64, 2, split_k=2), eps=0.0, reserve=0)
    out = run(states, weight, into=residual).out
    assert out.dtype == jnp.bfloat16 and (exact(out)[0] == exact(residual)[0]).all()
    assert_close(exact(out)[1:].sum(0, keepdims=True), merged(states) @ exact(weight), 8 * BF16)


def int8(*shape: int) -> tuple[jax.Array, jax.Array, Array]:
    """An int8 weight [N, K] or [2, F, K], the scale of each of its columns, and what both stand for, [K, ...]."""
    rng = np.random.default_rng(7)
    values = jax.device_put(rng.integers(-127, 128, shape).astype(np.int8))
    scale = bfloat16(rng.uniform(0.005, 0.02, shape[:-1]))
    return values, scale, np.moveaxis(exact(values) * exact(scale)[..., None], -1, 0)


INT8 = {
    "one_row": (1, Tile(64, 64, 2, split_k=2)),
    "unequal_parts": (1, Tile(32, 64, 4, split_k=3)),
    "rows": (5, Tile(64, 32, 2, split_k=2)),
    "most_rows": (16, Tile(64, 64, 2)),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", INT8.values(), ids=INT8.keys())
def test_int8_product(case: tuple[int, Tile], impl: str) -> None:
    """Rows with numbers 2^12 times as large as others, and rows of zeros."""
    (rows, tile), (weight, scale, want) = case, int8(128, WIDTH)
    x = bfloat16(exact(normal(0, rows, WIDTH)) * np.exp2(np.arange(WIDTH) % 13)).at[3:4].set(0)
    out = program("skinny_matmul", impl, tile=tile, eps=0.0, reserve=0, into=None)(x, weight, scale).out
    assert out.dtype == jnp.float32 and out.shape[0] == tile.split_k
    blocks = WIDTH // tile.block_k
    edges = [i * blocks // tile.split_k * tile.block_k for i in range(tile.split_k + 1)]
    parts = [exact(x)[:, a:b] @ want[a:b] for a, b in itertools.pairwise(edges)]
    assert_close(out, np.stack(parts), 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gated_int8_product_of_rows(impl: str) -> None:
    x, (weight, scale, want) = normal(0, 6, WIDTH), int8(2, 128, WIDTH)
    run = program("skinny_matmul", impl, tile=Tile(64, 64, 2), eps=0.0, reserve=0, into=None)
    gate, up = (exact(x) @ want[:, side] for side in range(2))
    assert_close(run(x, weight, scale).out, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_int8_product_of_a_residual_in_parts(gated: bool, impl: str) -> None:
    parts, norm_weight = normal(0, 9, WIDTH), normal(2, WIDTH)
    weight, scale, want = int8(2, 128, WIDTH) if gated else int8(128, WIDTH)
    tile = Tile(64, 32, 3, split_k=1 if gated else 4)
    run = program("skinny_matmul", impl, tile=tile, eps=EPS, reserve=3, into=None)
    out, residual, sum_squares = run(ResidualParts(parts, norm_weight), weight, scale)
    total = exact(parts).sum(0, keepdims=True)
    assert_close(exact(residual)[:1], total, BF16)
    scaled = total * exact(norm_weight)
    if gated:
        gate, up = (scaled / rms(total) @ want[:, side] for side in range(2))
        assert_close(out, gate / (1 + np.exp(-gate)) * up)
        return
    assert_close(exact(out).sum(0), scaled @ want, 1e-5)
    assert_close(sum_squares, (total.reshape(4, -1) ** 2).sum(1, keepdims=True), BF16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_int8_product_of_attention_in_splits_into_residual_parts(impl: str) -> None:
    states, residual, (weight, scale, want) = attn_states(4, 1), normal(2, 3, 128), int8(128, WIDTH)
    run = program("skinny_matmul", impl, tile=Tile(64, 64, 2, split_k=2), eps=0.0, reserve=0)
    out = run(states, weight, scale, into=residual).out
    assert (exact(out)[0] == exact(residual)[0]).all()
    assert_close(exact(out)[1:].sum(0, keepdims=True), merged(states) @ want, 8 * BF16)


def test_int8_product_refuses_more_rows() -> None:
    weight, scale, _ = int8(128, WIDTH)
    with pytest.raises(NotImplementedError, match="int8 weights take at most 16 rows"):
        kernels.skinny_matmul(normal(0, 17, WIDTH), weight, scale, tile=Tile(64, 64, 2), impl="triton")
    assert kernels.tile_for(17, (WIDTH, 128), int8=True) is None


REFUSED = {
    "float32": ((1, 256), (256, 128), Tile(64, 64, 2), jnp.float32),
    "columns": ((1, 256), (256, 96), Tile(64, 64, 2), jnp.bfloat16),
    "depth": ((1, 192), (192, 64), Tile(64, 64, 2, split_k=2), jnp.bfloat16),
    "gated_split": ((1, 256), (256, 2, 64), Tile(64, 64, 2, split_k=2), jnp.bfloat16),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_product_refuses(case: tuple[tuple[int, ...], tuple[int, ...], Tile, Any]) -> None:
    rows, shape, tile, dtype = case
    with pytest.raises(NotImplementedError, match="skinny_matmul: triton does not serve"):
        kernels.skinny_matmul(zeros(rows, dtype), zeros(shape, dtype), tile=tile, impl="triton")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("shape", [(2048, 2560), (2048, 2048), (2048, 2, 11008), (11008, 2048), (896, 1152), (72, 40)])
def test_tiles_divide_what_they_are_for(rows: int, shape: tuple[int, ...], int8: bool) -> None:
    head_dim = 128 if shape == (2048, 2048) and rows == 1 else 0
    tile = kernels.tile_for(rows, shape, head_dim=head_dim, int8=int8)
    if shape == (72, 40):
        assert tile is None
    if tile is not None:
        assert shape[-1] % tile.block_n == 0 and shape[0] % tile.block_k == 0
        assert int8 or shape[0] % (tile.split_k * tile.block_k) == 0
        assert tile.split_k == 1 or len(shape) == 2
    if int8:
        assert (tile is not None) == (rows <= 16 and shape != (72, 40)), tile


# -- merge_attn_states, add_rms_norm ---------------------------------------------------------------------------------


def attn_states(splits: int, rows: int) -> AttnStates:
    lse = np.random.default_rng(5).standard_normal((splits, rows, WIDTH // HEAD_DIM)) * 4
    lse[-1] = -1e30  # a split without keys
    return AttnStates(normal(4, splits, rows, WIDTH), jax.device_put(lse.astype(np.float32)))


def merged(states: AttnStates) -> Array:
    weight = np.exp2(exact(states.lse) - exact(states.lse).max(0))
    heads = exact(states.out).reshape(*weight.shape, -1) * (weight / weight.sum(0))[..., None]
    return heads.sum(0).reshape(states.out.shape[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_merge(impl: str) -> None:
    states = attn_states(4, 3)
    out = program("merge_attn_states", impl)(states)
    assert out.dtype == jnp.bfloat16
    assert_close(out, merged(states), BF16)


def test_merge_refuses() -> None:
    with pytest.raises(NotImplementedError, match="merge_attn_states: triton"):
        kernels.merge_attn_states(AttnStates(zeros((3, 1, 64)), zeros((3, 1, 1))), impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("parts", [0, 4])
def test_sum_and_norm(parts: int, impl: str) -> None:
    x, weight = normal(0, 3, 200), normal(2, 200)
    y = normal(1, 3, 200) if not parts else np.asarray(normal(1, parts, 3, 200)).astype(np.float32)
    total, normed = program("add_rms_norm", impl, eps=EPS)(x, y, weight)
    want = exact(x) + (exact(y).sum(0) if parts else exact(y))
    assert total.dtype == normed.dtype == jnp.bfloat16
    assert_close(total, want, BF16)
    assert_close(normed, want / rms(want) * exact(weight), 2 * BF16)


# -- fused_decode ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """context_lens counts the new key. parts: of a product that is still to be summed, and divided by the root of its
    mean square."""

    context_lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    parts: int = 0
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None


BLOCK_SIZE, LAYERS, HIDDEN = 16, 2, 96
STEPS = {
    "first_keys": Step((1, 2)),
    "block_ends": Step((16, 17, 33)),
    "padding": Step((0, 5)),
    "group_7": Step((21,), kv_heads=1, group=7),
    "bias": Step((40, 3), bias=True),
    "qk_norm": Step((9,), qk_norm=True),
    "sums": Step((30, 1), parts=4, bias=True, qk_norm=True),
    "splits": Step((300,), kv_heads=1),
    "head_dim_128": Step((50,), head_dim=128, group=1),
    "window": Step((90, 3, 40), window=40),
    "window_of_one": Step((33, 2), window=1, kv_heads=1),
}


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_fused_decode(case: Step, impl: str) -> None:
    rng, S, K, G, H = np.random.default_rng(3), len(case.context_lens), case.kv_heads, case.group, case.head_dim
    width = 1 + max(case.context_lens) // BLOCK_SIZE
    blocks = 1 + S * width
    table = 1 + rng.permutation(S * width).reshape(S, width).astype(np.int32)
    shape = (LAYERS * blocks, BLOCK_SIZE, K, H)
    cache = [np.full(shape, np.nan) for _ in range(2)]  # what no sequence owns
    keys: list[list[Array]] = [[], []]
    for s, n in enumerate(case.context_lens):
        at = np.arange(max(n - 1, 0))
        read = at >= max(0, n - (case.window or n)) // BLOCK_SIZE * BLOCK_SIZE  # blocks before the window stay NaN
        for array, known in zip(cache, keys, strict=True):
            known.append(exact(bfloat16(rng.standard_normal((len(at), K, H)))))
            array[blocks + table[s, at[read] // BLOCK_SIZE], at[read] % BLOCK_SIZE] = known[s][read]
    qkv = np.asarray(normal(6, max(case.parts, 1), S, K, G + 2, H))
    qkv = jax.device_put(qkv.astype(np.float32) if case.parts else qkv[0])
    angles = rng.uniform(0, 6, (S, H // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    squares = rng.uniform(50, 100, (4, S)).astype(np.float32) if case.parts else None
    bias = normal(7, K, G + 2, H) if case.bias else None
    norms = (normal(8, H), normal(9, H)) if case.qk_norm else (None, None)
    epilogue = QKVEpilogue(cos, sin, squares, bias, *norms, hidden_size=HIDDEN, eps=EPS)
    last = np.asarray(case.context_lens) - 1
    slots = np.where(last >= 0, table[np.arange(S), last.clip(0) // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE, -1)

    pools = [bfloat16(array.swapaxes(1, 2) if impl == "reference" else array) for array in cache]
    vectors = [jax.device_put(np.asarray(x, np.int32)) for x in (table, case.context_lens, slots, blocks)]
    out, *pools = program("fused_decode", impl, scale=H**-0.5, window=case.window)(qkv, epilogue, *pools, *vectors)
    if isinstance(out, AttnStates):
        assert S * K < fused_triton.PROGRAMS
        out = kernels.merge_attn_states(out, impl="reference")
    assert out.shape == (S, K * G * H) and np.isfinite(exact(out)).all()
    k, v = (exact(pool).swapaxes(1, 2) if impl == "reference" else exact(pool) for pool in pools)

    x = exact(qkv).sum(0) if case.parts else exact(qkv)
    if squares is not None:
        x = x / np.sqrt(squares.astype(np.float64).sum(0) / HIDDEN + EPS)[:, None, None, None]
    x = x + (exact(bias) if bias is not None else 0)
    query, key, value = x[:, :, :G], x[:, :, G], x[:, :, G + 1]
    if case.qk_norm:
        query, key = query / rms(query) * exact(norms[0]), key / rms(key) * exact(norms[1])
    query, key = rotated(query, cos[:, None, None], sin[:, None, None]), rotated(key, cos[:, None], sin[:, None])
    for s, n in enumerate(case.context_lens):
        if not n:
            continue
        where = blocks + slots[s] // BLOCK_SIZE, slots[s] % BLOCK_SIZE
        assert_close(k[where], key[s])
        assert_close(v[where], value[s])
        seen = slice(max(0, n - (case.window or n)), None)
        all_keys = np.concatenate([keys[0][s], k[where][None]])[seen]
        all_values = np.concatenate([keys[1][s], v[where][None]])[seen]
        scores = np.einsum("kgh,jkh->kgj", query[s], all_keys) * H**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("kgj,jkh->kgh", weights / weights.sum(-1, keepdims=True), all_values)
        assert_close(exact(out)[s], want.reshape(-1), 6 * BF16)
    written = np.zeros(shape[:2], bool)
    written[blocks + slots[slots >= 0] // BLOCK_SIZE, slots[slots >= 0] % BLOCK_SIZE] = True
    for before, after in zip(cache, (k, v), strict=True):
        np.testing.assert_array_equal(after[~written], before[~written])


def test_keys_are_split_until_there_is_work_for_every_multiprocessor() -> None:
    assert fused_triton.kv_splits(2, 4096) == 16
    assert fused_triton.kv_splits(2, 64) == 1
    assert fused_triton.kv_splits(32, 4096) == 4
    assert fused_triton.kv_splits(512, 4096) == 1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"), [(jnp.float32, 64, 16), (jnp.bfloat16, 80, 16), (jnp.bfloat16, 64, 48)]
)
def test_fused_decode_refuses(dtype: Any, head_dim: int, block_size: int) -> None:
    qkv, cache = zeros((1, 2, 4, head_dim), dtype), zeros((2, block_size, 2, head_dim), dtype)
    angles, one = zeros((1, head_dim // 2)), jax.device_put(np.ones(1, np.int32))
    with pytest.raises(NotImplementedError, match="fused_decode: triton does not serve"):
        kernels.fused_decode(
            qkv, QKVEpilogue(angles, angles), cache, cache, one[None], one, one, one[0], scale=1.0, impl="triton"
        )
