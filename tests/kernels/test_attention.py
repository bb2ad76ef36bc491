"""Every implementation of every op on one table of cases, against attention written out in float64 NumPy."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from mmjax.kernels.choose import implementation
from mmjax.kernels.kv_cache import pack_kv
from mmjax.kernels.paged_attention import mosaic_tpu

from mmjax import kernels

PLATFORM = {"reference": "cpu", "triton": "gpu", "mosaic_tpu": "tpu"}
BLOCK_SIZE = 32
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Paged:
    """`queries[i]` = (seq_index, q_start) is block i of a prefill; decode has one query per sequence."""

    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    queries: tuple[tuple[int, int], ...] = ()
    dtype: Any = jnp.float32
    causal: bool = True
    window: int | None = None


DECODE = {
    "group_1": Paged((0, 1, 32, 33), kv_heads=2, group=1),
    "group_7": Paged((33, 1, 64), kv_heads=1, group=7),
    "head_dim_80": Paged((5, 31), head_dim=80),
    "head_dim_96": Paged((33, 2), head_dim=96, kv_heads=1),
    "head_dim_128": Paged((0, 47), head_dim=128),
    "head_dim_256": Paged((18,), kv_heads=1, head_dim=256),
    "bfloat16": Paged((3, 50), dtype=jnp.bfloat16),
    "window": Paged((0, 40, 210, 141), window=140, kv_heads=1),
}
PREFILL = {
    "whole_prompt": Paged((40, 9), queries=((0, 0), (0, 16), (0, 32), (1, 0)), group=1),
    "history_and_padding": Paged((64, 1, 30), queries=((0, 48), (1, 0), (2, 19), (0, -16)), group=7, kv_heads=1),
    "cross": Paged((37, 0, 64), queries=((0, 0), (2, 0), (2, 16), (1, 0), (0, -16)), causal=False),
    "head_dim_72": Paged((20,), queries=((0, 4),), head_dim=72),
    "head_dim_256": Paged((17,), queries=((0, 0), (0, 16)), head_dim=256, kv_heads=1),
    "bfloat16": Paged((50,), queries=((0, 34), (0, 18)), dtype=jnp.bfloat16),
    "window": Paged((230, 20), queries=((0, 200), (1, 4), (0, -16)), window=140, kv_heads=1),
}
QUERIES = 16


@dataclasses.dataclass(frozen=True)
class Segments:
    lengths: tuple[int, ...]
    tail: int = 0
    heads: int = 2
    head_dim: int = 64
    segment_len: int | None = None
    dtype: Any = jnp.float32
    masked: int = 0  # positions at the end of each segment that attend, and are not attended to


SEGMENTS = {
    "windows": Segments((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16) * 2),
    "images_and_padding": Segments((300, 64, 5, 260), tail=139, head_dim=80),
    "padding_blocks": Segments((3,), tail=509),
    "one_long": Segments((390,), head_dim=72, heads=1),
    "uniform": Segments((77,) * 3, segment_len=77),
    "uniform_wide": Segments((130,) * 2, segment_len=130, head_dim=128),
    "bfloat16": Segments((100, 28), dtype=jnp.bfloat16),
    "masked_keys": Segments((300, 20, 9, 130), tail=53, masked=7),
}


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """q [N, H], k and v [J, N, H] -> [N, H], float64."""
    scores = np.einsum("nh,jnh->nj", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nj,jnh->nh", weights / weights.sum(-1, keepdims=True), v)


def bound(dtype: Any) -> float:
    """Absolute error allowed: outputs are means of values of order one, rounded a few times to `dtype`."""
    return 8 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 2e-5


@dataclasses.dataclass(frozen=True)
class Cache:
    """Blocks in random order, and the keys [J, K, H] of each sequence. Slots of no sequence are NaN, and so are blocks
    before every window."""

    k: Array
    v: Array
    block_table: Array
    keys: list[Array]
    values: list[Array]


def make_cache(case: Paged, rng: np.random.Generator) -> Cache:
    width = 1 + max(-(-n // BLOCK_SIZE) for n in case.lengths)
    count = 1 + len(case.lengths) * width
    shape = (count, BLOCK_SIZE, case.kv_heads, case.head_dim)
    arrays = [np.full(shape, np.nan, np.float32) for _ in range(2)]
    ids = 1 + rng.permutation(count - 1).reshape(len(case.lengths), width)
    block_table = np.zeros((len(case.lengths), width), np.int32)
    rows: list[list[Array]] = [[], []]
    for s, n in enumerate(case.lengths):
        used = -(-n // BLOCK_SIZE)
        block_table[s, :used] = ids[s, :used]
        for array, own in zip(arrays, rows, strict=True):
            fresh = rounded(rng.standard_normal((n, *shape[2:])), case.dtype)
            own.append(fresh.astype(np.float64))
            for at in range(first_block(case, s) * BLOCK_SIZE, n):
                array[block_table[s, at // BLOCK_SIZE], at % BLOCK_SIZE] = fresh[at]
    return Cache(arrays[0], arrays[1], block_table, rows[0], rows[1])


def first_block(case: Paged, s: int) -> int:
    """The first block of a sequence that a query reads."""
    positions = [first for index, first in case.queries if index == s and first >= 0] or [case.lengths[s] - 1]
    return 0 if case.window is None else max(0, min(positions) - case.window + 1) // BLOCK_SIZE


def rounded(x: Array, dtype: Any) -> Array:
    """Float32 values that `dtype` holds exactly."""
    return x.astype(dtype).astype(np.float32)


def on_device(x: Any, dtype: Any = None) -> jax.Array:
    """As jnp.asarray, which would compile a program for every shape."""
    return jax.device_put(np.asarray(x, dtype))


IMPLEMENTATIONS = tuple(PLATFORM)
PAGED = ("reference", "triton")  # keys and values in two arrays


def program(op: str, impl: str, **static: object) -> Callable[..., jax.Array]:
    """The implementation, compiled; a kernel of another platform is interpreted."""
    interpret = {} if impl == "reference" else {"interpret": True}
    run = functools.partial(implementation(op, impl), **static, **interpret)
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # compiled once, run once


def pad_heads(x: Array, impl: str, dtype: Any) -> jax.Array:
    """To the cache's head dim, as the callers of the ops do."""
    extra = kernels.kv_cache_head_dim(x.shape[-1], PLATFORM[impl]) - x.shape[-1]
    return on_device(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]), dtype)


def laid_out(data: Cache, impl: str) -> tuple[Array, Array]:
    """The caches in the layout of the implementation's platform."""
    if not kernels.kv_heads_first(PLATFORM[impl]):
        return data.k, data.v
    return data.k.swapaxes(1, 2), data.v.swapaxes(1, 2)


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode(case: Paged, impl: str) -> None:
    rng = np.random.default_rng(0)
    data, scale = make_cache(case, rng), case.head_dim**-0.5
    q = rounded(rng.standard_normal((len(case.lengths), case.kv_heads, case.group, case.head_dim)), case.dtype)
    run = program("paged_decode", impl, scale=scale, window=case.window)
    arrays = (pad_heads(x, impl, case.dtype) for x in (q, *laid_out(data, impl)))
    out = run(*arrays, on_device(data.block_table), on_device(case.lengths, np.int32))
    assert out.dtype == case.dtype
    got = np.asarray(out, np.float64)[..., : case.head_dim]
    assert np.isfinite(got).all()
    for s, n in enumerate(case.lengths):
        for g in range(case.group if n else 0):
            keys = slice(max(0, n - (case.window or n)), n)
            want = attend(q[s, :, g].astype(np.float64), data.keys[s][keys], data.values[s][keys], scale)
            np.testing.assert_allclose(got[s, :, g], want, atol=bound(case.dtype), rtol=0)


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL.keys())
def test_prefill(case: Paged, impl: str) -> None:
    rng = np.random.default_rng(1)
    data, scale = make_cache(case, rng), case.head_dim**-0.5
    q = rounded(rng.standard_normal((len(case.queries), QUERIES, case.kv_heads, case.group, case.head_dim)), case.dtype)
    seq_index, q_start = (on_device(x, np.int32) for x in zip(*case.queries, strict=True))
    run = program("paged_prefill", impl, scale=scale, causal=case.causal, window=case.window)
    arrays = (pad_heads(x, impl, case.dtype) for x in (q, *laid_out(data, impl)))
    out = run(*arrays, on_device(data.block_table), seq_index, q_start, on_device(case.lengths, np.int32))
    assert out.dtype == case.dtype
    assert_attends(case, data, q, out)


def assert_attends(case: Paged, data: Cache, q: Array, out: jax.Array) -> None:
    """`out` is what the queries [B, Q, K, G, H] of the case attend to."""
    got, scale = np.asarray(out, np.float64)[..., : case.head_dim], case.head_dim**-0.5
    assert np.isfinite(got).all()
    for b, (s, first) in enumerate(case.queries):
        for j in range(q.shape[1]):
            position, context_lens = first + j, case.lengths[s]
            end = min(position + 1, context_lens) if case.causal else context_lens
            if first < 0 or end == 0 or (case.causal and position >= context_lens):
                continue
            keys = slice(max(0, end - (case.window or end)), end)
            for g in range(case.group):
                want = attend(q[b, j, :, g].astype(np.float64), data.keys[s][keys], data.values[s][keys], scale)
                np.testing.assert_allclose(got[b, j, :, g], want, atol=bound(case.dtype), rtol=0)


def in_order(case: Paged) -> Paged:
    """The query blocks in order of position; of a decode, the newest token of each sequence."""
    newest = tuple((s, n - 1) for s, n in enumerate(case.lengths))
    return dataclasses.replace(case, queries=tuple(sorted(case.queries, key=lambda x: (x[1] < 0, x))) or newest)


ONE_ARRAY = {
    **{f"decode_{name}": (in_order(case), 1) for name, case in DECODE.items()},
    **{f"prefill_{name}": (in_order(case), QUERIES) for name, case in PREFILL.items()},
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of paged_attention: its arrays, and the cache that it must return."""

    q: Array
    arrays: tuple[Any, ...]
    cache: jax.Array
    data: Cache


def make_step(case: Paged, queries: int) -> Step:
    """The keys of the queries are not in the cache yet, unless they attend to an encoder's."""
    rng = np.random.default_rng(1)
    data = make_cache(case, rng)
    q = rng.standard_normal((len(case.queries), queries, case.kv_heads, case.group, case.head_dim))
    new = rng.standard_normal((2, *q.shape[:3], case.head_dim))  # rows past a sequence's end are not written
    before = [data.k.copy(), data.v.copy()]
    for b, (s, first) in enumerate(case.queries):
        for position in range(max(first, 0), min(first + queries, case.lengths[s])) if case.causal else ():
            at = data.block_table[s, position // BLOCK_SIZE], position % BLOCK_SIZE
            new[0, b, position - first], new[1, b, position - first] = data.keys[s][position], data.values[s][position]
            before[0][at] = before[1][at] = np.nan
            data.k[at], data.v[at] = data.keys[s][position], data.values[s][position]
    cache, full = (
        pack_kv(*(jnp.asarray(x.swapaxes(1, 2), case.dtype) for x in pair)) for pair in (before, (data.k, data.v))
    )
    new_kv = tuple(jnp.asarray(x, case.dtype) for x in new) if case.causal else None
    vectors = (jnp.asarray(x, jnp.int32) for x in (*zip(*case.queries, strict=True), case.lengths))
    q = rounded(q, case.dtype)
    arrays = (jnp.asarray(q, case.dtype), cache, new_kv, jnp.asarray(data.block_table), *vectors)
    return Step(q, arrays, full, data)


BY_REFERENCE = ("decode_group_7", "prefill_history_and_padding", "prefill_cross")
ONE_ARRAY_RUNS = [("mosaic_tpu", name) for name in ONE_ARRAY] + [("reference", name) for name in BY_REFERENCE]


@pytest.mark.parametrize(("impl", "name"), ONE_ARRAY_RUNS)
def test_keys_and_values_in_one_array(impl: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, queries = ONE_ARRAY[name]
    long = max(case.lengths) > 200  # chunks of several steps and of less than one
    monkeypatch.setattr(mosaic_tpu, "CHUNK_KEYS", 4 * 64 if long else 64)
    monkeypatch.setattr(mosaic_tpu, "STEP_KEYS", 128)
    step = make_step(case, queries)
    run = program("paged_attention", impl, scale=case.head_dim**-0.5, causal=case.causal, window=case.window)
    out, cache = run(*step.arrays)
    assert out.dtype == case.dtype
    assert_attends(case, step.data, step.q, out)
    np.testing.assert_array_equal(rounded(cache, jnp.float32), rounded(step.cache, jnp.float32))


@pytest.mark.parametrize(
    ("case", "queries"),
    [
        (in_order(Paged((0, 40, 1, 300, 33, 0), window=100, kv_heads=1)), 1),
        (Paged((70, 20, 0, 33), queries=((0, 32), (0, 48), (0, 64), (1, 4), (3, 32), (2, -16)), group=1), QUERIES),
    ],
    ids=["decode_window", "mixed_step"],
)
def test_copies_the_live_bytes(case: Paged, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads each block that a query block attends to once, and writes the tiles of the new keys."""
    started: Counter[tuple[int, ...]] = Counter()

    class Counted:
        """A copy that is counted when it starts."""

        def __init__(self, src: Any, dst: Any, semaphore: Any) -> None:
            self.copy, self.shape = pltpu.make_async_copy(src, dst, semaphore), src.shape
            self.wait = self.copy.wait

        def start(self) -> None:
            jax.debug.callback(lambda: started.update([self.shape]))
            self.copy.start()

    monkeypatch.setattr(mosaic_tpu, "copy", Counted)
    monkeypatch.setattr(mosaic_tpu, "CHUNK_KEYS", 64)
    step = make_step(case, queries)
    run = program("paged_attention", "mosaic_tpu", scale=0.1, causal=True, window=case.window)
    jax.block_until_ready(run(*step.arrays))
    jax.effects_barrier()
    blocks, tiles = 0, 0
    for s, first in case.queries:
        last = min(first + queries, case.lengths[s]) - 1
        if first >= 0 and last >= 0:
            lowest = max(0, first + 1 - case.window) if case.window else 0
            blocks += last // BLOCK_SIZE - lowest // BLOCK_SIZE + 1
            tiles += last // 16 - first // 16 + 1
    lanes = step.cache.shape[3]
    assert started == {(case.kv_heads, BLOCK_SIZE, lanes): blocks, (case.kv_heads, 16, lanes): tiles}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_segments(case: Segments, impl: str) -> None:
    rng = np.random.default_rng(2)
    length, scale = sum(case.lengths) + case.tail, case.head_dim**-0.5
    q, k, v = (rounded(rng.standard_normal((length, case.heads, case.head_dim)), case.dtype) for _ in range(3))
    ids = 3 + np.arange(len(case.lengths))  # any numbers do, as long as neighbors differ
    segment_ids = np.concatenate([np.repeat(ids, case.lengths), np.full(case.tail, -1)]).astype(np.int32)
    run = program("segment_attention", impl, scale=scale, segment_len=case.segment_len)
    arrays = [*(on_device(x, case.dtype) for x in (q, k, v)), on_device(segment_ids)]
    if case.masked:
        key_mask = np.concatenate([np.arange(n) < n - case.masked for n in case.lengths] + [np.ones(case.tail, bool)])
        out = run(*arrays, key_mask=on_device(key_mask))
    else:
        out = run(*arrays)
    assert out.dtype == case.dtype
    got = np.asarray(out, np.float64)
    assert got.shape == q.shape
    assert np.isfinite(got).all()
    at = 0
    for n in case.lengths:
        here = slice(at, at + n)
        keys = slice(at, at + n - case.masked)
        scores = np.einsum("qnh,knh->nqk", q[here], k[keys], dtype=np.float64) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v[keys], dtype=np.float64)
        np.testing.assert_allclose(got[here], want, atol=bound(case.dtype), rtol=0)
        at += n
