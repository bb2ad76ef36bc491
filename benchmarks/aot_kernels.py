"""Compile every GPU and TPU kernel ahead of time, on a machine that has neither.

    python benchmarks/aot_kernels.py [cuda] [tpu] [-v]

For cuda, jax[cuda13] must be installed: XLA:GPU, Triton and ptxas run for an H100. For tpu, jax[tpu]: the whole of
libtpu, Mosaic included, for v5e and v6e. A target whose plugin is missing is skipped. Prints a table (compile seconds,
temporary MiB beside the arguments, size of the pool) and exits 1 if anything failed.
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
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec


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

Case = tuple[str, Callable[..., Any], tuple[tuple[tuple[int, ...], Any], ...]]


def cases(ops: Any, impl: str, platform: str) -> Iterator[Case]:
    """name, function, ((shape, dtype), ...) for each op over head dims, groups, pages and dtypes."""
    i32 = jnp.int32
    half = jnp.bfloat16 if platform == "tpu" else jnp.float16
    for head_dim, K, G, page, dtype in (
        (64, 2, 7, 64, jnp.bfloat16),
        (64, 6, 1, 64, jnp.bfloat16),
        (64, 20, 1, 64, half),
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
        K = ops.kv_cache_heads(K, platform)
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
    if target == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return topologies.get_topology_desc(target, platform="tpu", chips_per_host_bounds=(1, 1, 1))


def compile_all(ops: Any, target: str, impl: str, platform: str, verbose: bool) -> int:
    """Compile every case for a target; the number of failures."""
    mesh = topologies.make_mesh(topology(target), (1,), ("x",))
    failures = 0
    for name, function, shapes in cases(ops, impl, platform):
        arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec())) for s, d in shapes]
        donated = (0, 1) if name.startswith("write") else ()
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
        pool = 2 * arguments[1].size * arguments[1].dtype.itemsize / 2**20
        seconds = time.perf_counter() - begun
        print(f"{target:8} {name:75} {seconds:5.1f} s  temp {temporary:7.1f} MiB  k+v {pool:6.0f} MiB", flush=True)
    return failures


def main() -> int:
    ops = kernels()
    chosen = [x for x in sys.argv[1:] if not x.startswith("-")] or ["cuda", "tpu"]
    failures = 0
    for plugin, impl, platform, targets in (
        ("cuda", "triton", "gpu", ("h100",)),
        ("tpu", "mosaic_tpu", "tpu", ("v5e:1x1", "v6e:1x1")),
    ):
        found = importlib.util.find_spec("jax_cuda13_plugin" if plugin == "cuda" else "libtpu")
        if plugin not in chosen or found is None:
            print(f"{plugin}: skipped, {'plugin not installed' if found is None else 'not asked for'}")
            continue
        for target in targets:
            failures += compile_all(ops, target, impl, platform, "-v" in sys.argv)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
