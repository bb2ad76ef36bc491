"""Compile every GPU and TPU kernel ahead of time, on a machine that has neither.

    python benchmarks/aot_kernels.py [cuda] [tpu] [v5e] [v6e] [v5p] [tpu7x] [-v]

For cuda, jax[cuda13] must be installed: XLA:GPU, Triton and ptxas run for an H100. For a TPU, jax[tpu]: the whole of
libtpu, Mosaic included. `tpu` is v5e and v6e; without an argument, cuda too. A target whose plugin is missing is
skipped. Prints a table (compile seconds, temporary MiB beside the arguments, size of the pool) and exits 1 if anything
failed.
"""

import os

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)

import functools
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def kernels() -> Any:
    """The package, installed or not: without an installation, the folder at the repository's root under its proper
    name."""
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "mmjax_kernels", root / "kernels" / "__init__.py", submodule_search_locations=[str(root / "kernels")]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mmjax_kernels"] = module
    spec.loader.exec_module(module)
    return module


H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x:
 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability {
 major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 minor: 0 patch: 0 }"""

TPUS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1", "tpu7x": "tpu7x:1x1x1"}

Case = tuple[str, Callable[..., Any], tuple[tuple[tuple[int, ...], Any], ...]]


def two_array_cases(ops: Any, impl: str, platform: str) -> Iterator[Case]:
    """The paged ops where keys and values have an array each."""
    i32 = jnp.int32
    for head_dim, K, G, page, dtype in (
        (64, 2, 7, 64, jnp.bfloat16),
        (64, 6, 1, 64, jnp.bfloat16),
        (64, 20, 1, 64, jnp.float16),
        (80, 8, 1, 64, jnp.bfloat16),
        (128, 2, 8, 64, jnp.bfloat16),
        (128, 2, 6, 16, jnp.bfloat16),
        (128, 1, 4, 64, jnp.bfloat16),
        (128, 8, 4, 64, jnp.bfloat16),
        (128, 32, 1, 64, jnp.bfloat16),
        (128, 2, 8, 64, jnp.float32),
        (256, 2, 4, 64, jnp.bfloat16),
        (256, 1, 8, 64, jnp.float32),
    ):
        tag = f"H{head_dim} K{K} G{G} page{page} {jnp.dtype(dtype).name}"
        H, Q = ops.kv_cache_head_dim(head_dim, platform), ops.q_block_size(platform)
        pool, table = ((2048, page, K, H), dtype), ((16, 32), i32)
        decode = functools.partial(ops.paged_decode, scale=head_dim**-0.5, impl=impl)
        yield f"paged_decode {tag}", decode, (((16, K, G, H), dtype), pool, pool, table, ((16,), i32))
        for causal in (True, False):
            prefill = functools.partial(ops.paged_prefill, causal=causal, scale=head_dim**-0.5, impl=impl)
            vectors = (((32,), i32), ((32,), i32), ((16,), i32))
            yield (
                f"paged_prefill causal={causal} {tag}",
                prefill,
                (((32, Q, K, G, H), dtype), pool, pool, table, *vectors),
            )
        rows = ((64, K, H), dtype)
        yield f"write_kv_cache {tag}", ops.write_kv_cache, (pool, pool, rows, rows, ((64,), i32))


# of published models, on one device unless another number is given: kv heads, queries per kv head, head dim, window
PUBLISHED_HEADS = {
    "Qwen2.5-VL-3B": (2, 8, 128, None),
    "Qwen2.5-VL-7B": (4, 7, 128, None),
    "Qwen2.5-VL-7B / 4": (1, 7, 128, None),
    "Qwen2-VL-2B": (2, 6, 128, None),
    "Qwen3-VL-4B, Llama-3.1-8B": (8, 4, 128, None),
    "Qwen3-VL-30B-A3B / 8": (1, 4, 128, None),
    "LLaVA-1.5-7B, Qwen2-Audio-7B": (32, 1, 128, None),
    "LLaVA-1.5-13B": (40, 1, 128, None),
    "LLaVA-OneVision-0.5B": (2, 7, 64, None),
    "Ultravox-1B": (8, 4, 64, None),
    "Phi-3.5-vision": (32, 1, 96, 262144),
    "Phi-4": (10, 4, 128, None),
    "Mistral-7B-v0.1": (8, 4, 128, 4096),
    "Whisper-large-v3-turbo": (20, 1, 64, None),
    "Whisper-tiny": (6, 1, 64, None),
}


def one_array_cases(ops: Any, impl: str, platform: str) -> Iterator[Case]:
    """The paged op where keys and values share an array: decode of 128 sequences, and a prefill of 4096 tokens."""
    i32, dtype, Q = jnp.int32, jnp.bfloat16, ops.q_block_size(platform)
    for model, (K, G, head_dim, window) in PUBLISHED_HEADS.items():
        scale, lanes = head_dim**-0.5, ops.kv_cache_head_dim(head_dim, platform)
        cache = ((2048, K, 64, lanes), dtype)

        def write_and_attend(
            q: Any, cache: Any, k: Any, v: Any, *batch: Any, scale: float = scale, window: int | None = window
        ) -> Any:
            return ops.paged_attention(q, cache, (k, v), *batch, causal=True, scale=scale, window=window, impl=impl)

        def cross(q: Any, cache: Any, *batch: Any, scale: float = scale) -> Any:
            return ops.paged_attention(q, cache, None, *batch, causal=False, scale=scale, impl=impl)[0]

        for name, count, queries in (("decode", 128, 1), ("prefill", 4096 // Q, Q)):
            q, new = ((count, queries, K, G, head_dim), dtype), ((count, queries, K, head_dim), dtype)
            batch = ((min(count, 128), 64), i32), ((count,), i32), ((count,), i32), ((min(count, 128),), i32)
            yield f"{name} {model}", write_and_attend, (q, cache, new, new, *batch)
            if "Whisper" in model:
                yield f"cross {name} {model}", cross, (q, cache, *batch)
        if "Whisper" in model:
            rows = ((1500, K, head_dim), dtype)
            empty = ((0, K, 64, lanes), dtype)
            yield f"write_kv_cache {model}", ops.write_kv_cache, (cache, empty, rows, rows, ((1500,), i32))


def cases(ops: Any, impl: str, platform: str) -> Iterator[Case]:
    """name, function, ((shape, dtype), ...) of each op."""
    yield from (one_array_cases if ops.kv_in_one_array(platform) else two_array_cases)(ops, impl, platform)
    i32 = jnp.int32
    half = jnp.bfloat16 if platform == "tpu" else jnp.float16
    for head_dim, N, U, segment_len, dtype in (
        (64, 6, 12000, 1500, jnp.bfloat16),
        (64, 16, 577 * 8, 577, jnp.bfloat16),
        (72, 16, 729 * 4, 729, jnp.bfloat16),
        (80, 16, 4096, None, jnp.bfloat16),
        (64, 12, 4096, None, half),
        (128, 8, 4096, None, jnp.bfloat16),
        (80, 16, 4096, None, jnp.float32),
        (256, 4, 4096, None, jnp.bfloat16),
    ):
        attend = functools.partial(ops.segment_attention, scale=head_dim**-0.5, segment_len=segment_len, impl=impl)
        tag = f"H{head_dim} N{N} U{U} uniform={segment_len} {jnp.dtype(dtype).name}"
        yield f"segment_attention {tag}", attend, (((U, N, head_dim), dtype),) * 3 + (((U,), i32),)


def topology(target: str) -> Any:
    if target == "cuda":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return topologies.get_topology_desc(TPUS[target], platform="tpu", chips_per_host_bounds=(1, 1, 1))


def compile_all(ops: Any, target: str, impl: str, platform: str, verbose: bool) -> int:
    """Compile every case for a target; the number of failures."""
    mesh = Mesh(np.asarray(topology(target).devices[:1]), ("x",))  # a chip of tpu7x is two devices
    failures = 0
    for name, function, shapes in cases(ops, impl, platform):
        arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec())) for s, d in shapes]
        donated = (0, 1) if name.startswith("write") else (1,) if name.startswith(("decode", "prefill")) else ()
        begun = time.perf_counter()
        try:
            with jax.set_mesh(mesh):
                compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        except Exception as error:  # whatever a compiler raises is a line of the table
            failures += 1
            print(f"{target:8} {name:75} FAILED {type(error).__name__}: {str(error)[:300]!r}", flush=True)
            if verbose:
                traceback.print_exc()
            continue
        memory = compiled.memory_analysis()
        assert memory is not None
        temporary = memory.temp_size_in_bytes / 2**20
        largest = max(arguments, key=lambda x: x.size)
        pool = (1 if platform == "tpu" else 2) * largest.size * largest.dtype.itemsize / 2**20
        seconds = time.perf_counter() - begun
        print(f"{target:8} {name:75} {seconds:5.1f} s  temp {temporary:7.1f} MiB  k+v {pool:6.0f} MiB", flush=True)
    return failures


def main() -> int:
    ops = kernels()
    chosen = [x for x in sys.argv[1:] if not x.startswith("-")] or ["cuda", "tpu"]
    failures = 0
    for target, plugin in (("cuda", "jax_cuda13_plugin"), *((name, "libtpu") for name in TPUS)):
        if target not in chosen and not ("tpu" in chosen and target in ("v5e", "v6e")):
            continue
        if importlib.util.find_spec(plugin) is None:
            print(f"{target}: skipped, {plugin} is not installed")
            continue
        impl, platform = ("triton", "gpu") if target == "cuda" else ("mosaic_tpu", "tpu")
        failures += compile_all(ops, target, impl, platform, "-v" in sys.argv)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
