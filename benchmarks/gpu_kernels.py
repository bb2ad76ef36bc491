"""The GPU kernels on a GPU: right, and how fast.

    python3 benchmarks/gpu_kernels.py [decode] [prefill] [segments] [pages]

Needs jax with CUDA and NumPy, no installation of mmjax. Each kernel is compared with the reference in float32 on the
same inputs (error relative to the largest output, bounded by the dtype), then timed: the median of several runs of a
program of 32 calls, each on another layer of the pool. The reference's time is that of one call, host included. Exits 1
if a kernel is wrong.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = 8
"""Layers of a pool, read in turn: together more than the 50 MB of the L2 cache, except where a batch is tiny."""
REPEATS = 32
BANDWIDTH = 3.0e12
"""Bytes per second: about what a copy reaches on an H100."""
PAGE = 64


def kernels() -> Any:
    """The package, installed or not: without an installation, the folder at the repository's root."""
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "mmjax_kernels", root / "kernels" / "__init__.py", submodule_search_locations=[str(root / "kernels")]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mmjax_kernels"] = module
    spec.loader.exec_module(module)
    return module


ops = kernels()
wrong: list[str] = []


def median_seconds(function: Callable[..., Any], arguments: tuple[Any, ...], runs: int) -> float:
    """Median time of a call that has been compiled, in seconds."""
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def repeated(function: Callable[..., Any], advance: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """REPEATS calls in one program, each with the query that the last returned: what a kernel costs inside a model."""

    def run(q: Any, *others: Any) -> Any:
        return jax.lax.fori_loop(0, REPEATS, lambda i, q: function(q, *advance(i, *others)).astype(q.dtype), q)

    return jax.jit(run)


def report(
    name: str,
    rows: dict[str, Callable[..., Any]],
    arguments: tuple[Any, ...],
    moved: float,
    flops: float,
    advance: Callable[..., tuple[Any, ...]] = lambda _, *others: others,
) -> None:
    """Check every row against rows["reference"] in float32, then time it. `moved` and `flops` are what the work
    needs."""
    exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arguments]
    with jax.default_matmul_precision("highest"):
        want = np.asarray(jax.jit(rows["reference"])(*exact), np.float32)
    del exact
    dtype = arguments[0].dtype
    bound = 2e-4 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    print(name, flush=True)
    for label, function in rows.items():
        try:
            compiled = jax.jit(function)
            got = np.asarray(compiled(*arguments).astype(jnp.float32))
            error = float(np.abs(got - want).max() / np.abs(want).max())
            if label == "reference":  # up to a second a call
                spent = median_seconds(compiled, arguments, 3)
            else:
                program = repeated(function, advance)
                jax.block_until_ready(program(*arguments))
                spent = median_seconds(program, arguments, 9) / REPEATS
        except Exception as failure:  # a row that cannot run is a result too
            print(f"    {label:10} FAILED {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            wrong.append(f"{name}: {label}")
            continue
        verdict = "ok" if error <= bound else f"WRONG, bound {bound:.1e}"
        if verdict != "ok":
            wrong.append(f"{name}: {label}")
        print(
            f"    {label:10} {spent * 1e6:9.1f} us  {moved / spent / BANDWIDTH:6.1%} of 3 TB/s"
            f"  {flops / spent / 1e12:6.1f} TFLOP/s  error {error:.1e} {verdict}",
            flush=True,
        )


def next_layer(layer_pages: int) -> Callable[..., tuple[Any, ...]]:
    """`advance` for paged ops: call i reads another layer's pages, as in a model, and not what lies in the L2 cache."""
    return lambda i, k, v, block_table, *others: (k, v, block_table + i % LAYERS * layer_pages, *others)


def pool(rng: np.random.Generator, lengths: np.ndarray[Any, Any], K: int, H: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Pools of LAYERS layers with room for the sequences, pages in random order, and the table of the first layer."""
    width = -(-int(lengths.max()) // PAGE)
    count = 1 + int((-(-lengths // PAGE)).sum())
    ids, block_table, at = 1 + rng.permutation(count - 1), np.zeros((len(lengths), width), np.int32), 0
    for s, n in enumerate(-(-lengths // PAGE)):
        block_table[s, :n], at = ids[at : at + n], at + n
    keys = jax.random.split(jax.random.key(0), 2)
    k, v = (jax.random.normal(key, (LAYERS * count, PAGE, K, H), dtype) for key in keys)
    return k, v, jnp.asarray(block_table)


def decode() -> None:
    rng = np.random.default_rng(0)
    for S, K, G, H, low, high, dtype in (
        (1, 2, 8, 128, 512, 512, jnp.bfloat16),
        (1, 2, 8, 128, 8192, 8192, jnp.bfloat16),
        (16, 2, 6, 128, 1024, 1024, jnp.bfloat16),
        (16, 2, 7, 64, 64, 1024, jnp.bfloat16),
        (128, 2, 8, 128, 512, 512, jnp.bfloat16),
        (128, 2, 8, 128, 64, 4096, jnp.bfloat16),
        (32, 8, 4, 128, 2048, 2048, jnp.bfloat16),
        (64, 20, 1, 64, 1500, 1500, jnp.float16),
        (16, 32, 1, 128, 1024, 1024, jnp.float16),
        (8, 2, 4, 256, 1024, 1024, jnp.bfloat16),
        (4, 2, 4, 128, 500, 1000, jnp.float32),
    ):
        lengths = rng.integers(low, high + 1, S)
        k, v, block_table = pool(rng, lengths, K, H, dtype)
        q = jax.random.normal(jax.random.key(1), (S, K, G, H), dtype)
        arguments = (q, k, v, block_table, jnp.asarray(lengths, jnp.int32))
        rows = {
            impl: lambda *a, impl=impl, H=H: ops.paged_decode(*a, scale=H**-0.5, impl=impl)
            for impl in ("triton", "reference")
        }
        keys = float(lengths.sum()) * K * H
        name = f"decode S{S} K{K} G{G} H{H} lengths {low}..{high} {jnp.dtype(dtype).name}"
        moved = 2 * keys * jnp.dtype(dtype).itemsize
        report(name, rows, arguments, moved, 4 * keys * G, next_layer(k.shape[0] // LAYERS))


def prefill() -> None:
    rng, Q = np.random.default_rng(1), ops.q_block_size("gpu")
    for S, new, past, K, G, H, causal, dtype in (
        (16, 512, 0, 2, 8, 128, True, jnp.bfloat16),
        (1, 2048, 0, 2, 8, 128, True, jnp.bfloat16),
        (1, 2048, 6144, 8, 4, 128, True, jnp.bfloat16),
        (4, 1024, 0, 2, 7, 64, True, jnp.bfloat16),
        (2, 1024, 0, 32, 1, 128, True, jnp.float16),
        (16, 64, 1500, 20, 1, 64, False, jnp.float16),
        (1, 512, 512, 2, 4, 256, True, jnp.bfloat16),
        (2, 128, 100, 2, 2, 64, True, jnp.float32),
    ):
        lengths = np.full(S, (new if causal else 0) + past)
        seq_index = np.repeat(np.arange(S), new // Q).astype(np.int32)
        q_start = np.tile((past if causal else 0) + np.arange(0, new, Q), S).astype(np.int32)
        k, v, block_table = pool(rng, lengths, K, H, dtype)
        q = jax.random.normal(jax.random.key(1), (len(seq_index), Q, K, G, H), dtype)
        arguments = (q, k, v, block_table, *(jnp.asarray(x, jnp.int32) for x in (seq_index, q_start, lengths)))
        rows = {
            impl: lambda *a, impl=impl, H=H, causal=causal: ops.paged_prefill(
                *a, scale=H**-0.5, causal=causal, impl=impl
            )
            for impl in ("triton", "reference")
        }
        pairs = S * (new * past + (new * (new + 1) / 2 if causal else 0))
        moved = float(2 * lengths.sum() * K * H + 2 * len(seq_index) * Q * K * G * H) * jnp.dtype(dtype).itemsize
        name = f"prefill {S}x{new}+{past} K{K} G{G} H{H} causal={causal} {jnp.dtype(dtype).name}"
        report(name, rows, arguments, moved, 4 * pairs * K * G * H, next_layer(k.shape[0] // LAYERS))


def segments() -> None:
    rng = np.random.default_rng(2)
    for lengths, N, H, segment_len, dtype in (
        ([1500] * 8, 6, 64, True, jnp.bfloat16),
        ([1500] * 8, 20, 64, True, jnp.float16),
        ([577] * 16, 16, 64, True, jnp.bfloat16),
        ([729] * 8, 16, 72, True, jnp.bfloat16),
        ([1024, 256, 1564, 700, 552], 16, 80, False, jnp.bfloat16),
        ([64] * 64, 16, 80, False, jnp.bfloat16),
        ([16384], 16, 80, False, jnp.bfloat16),
        ([100, 300, 112], 4, 80, False, jnp.float32),
    ):
        U, n = sum(lengths), lengths[0] if segment_len else None
        segment_ids = jnp.asarray(np.repeat(rng.permutation(len(lengths)), lengths), jnp.int32)
        qkv = (jax.random.normal(key, (U, N, H), dtype) for key in jax.random.split(jax.random.key(1), 3))
        arguments = (*qkv, segment_ids)

        def attend(*a: Any, impl: str, n: int | None = n, H: int = H) -> Any:
            return ops.segment_attention(*a, scale=H**-0.5, segment_len=n, impl=impl)

        impls = ["triton", "reference"] + (["cudnn"] if segment_len else [])
        rows = {impl: lambda *a, impl=impl, attend=attend: attend(*a, impl=impl) for impl in impls}
        moved, flops = 4.0 * U * N * H * jnp.dtype(dtype).itemsize, 4.0 * sum(x * x for x in lengths) * N * H
        shown = f"{len(lengths)}x{lengths[0]}" if len(set(lengths)) == 1 else "+".join(map(str, lengths))
        report(f"segments {shown} N{N} H{H} {jnp.dtype(dtype).name}", rows, arguments, moved, flops)


def block_table() -> None:
    """A kernel reading a pool of more than 4 GiB at its far end, and a write into it that must not copy it."""
    count, K, H = 40960, 8, 128
    k = jnp.ones((count, PAGE, K, H), jnp.bfloat16)
    v = jnp.zeros((count, PAGE, K, H), jnp.bfloat16)
    rows = jax.random.normal(jax.random.key(0), (64, K, H), jnp.bfloat16)
    write = jax.jit(ops.write_kv_cache, donate_argnums=(0, 1))
    slot = (count - 1) * PAGE + jnp.arange(64, dtype=jnp.int32)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        k, v = jax.block_until_ready(write(k, v, rows, rows, slot))
        times.append(time.perf_counter() - begun)
    print(f"write of 64 tokens to pools of {k.nbytes / 2**30:.1f} GiB: {np.median(times) * 1e6:.0f} us")
    table, context_lens = jnp.full((1, 1), count - 1, jnp.int32), jnp.full((1,), 64, jnp.int32)
    q = jax.random.normal(jax.random.key(1), (1, K, 2, H), jnp.bfloat16)
    got = ops.paged_decode(q, k, v, table, context_lens, scale=H**-0.5, impl="triton")
    small = ops.paged_decode(q, k[-1:], v[-1:], table * 0, context_lens, scale=H**-0.5, impl="triton")
    same = bool((got == small).all())
    print(f"decode at its far end: {'ok' if same else 'WRONG'}")
    if not same:
        wrong.append("pool of more than 4 GiB")


if __name__ == "__main__":
    print(jax.__version__, jax.devices()[0].device_kind)
    parts = {"decode": decode, "prefill": prefill, "segments": segments, "pages": block_table}
    for part in sys.argv[1:] or parts:
        begun = time.perf_counter()
        parts[part]()
        print(f"({part}: {time.perf_counter() - begun:.0f} s)\n", flush=True)
    if wrong:
        sys.exit("wrong or failed:\n  " + "\n  ".join(wrong))
