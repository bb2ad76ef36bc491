"""The implementation of each op on a platform, and the sizes that follow from it. Platforms have jax's names: cpu, gpu,
tpu."""

import functools
import importlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "paged_decode": ("reference", "triton"),
        "paged_prefill": ("reference", "triton"),
        "paged_attention": ("reference", "mosaic_tpu"),
        "segment_attention": ("reference", "triton", "mosaic_tpu", "cudnn"),
        "fused_decode": ("reference", "triton"),
        "merge_attn_states": ("reference", "triton"),
        "skinny_matmul": ("reference", "triton"),
        "add_rms_norm": ("reference", "triton"),
    }
)
"""op -> the modules in its folder; each has `run` with the signature of the op (without `impl`)."""

TPU_TABLE_BYTES = 512 * 2**10
"""Of the 1 MiB of scalar memory. Compiled for a v5e with 128 sequences, a table of 768 KiB still fits and one of 1000
KiB does not."""

DEFAULT_IMPL: Mapping[str, str] = MappingProxyType({"cpu": "reference", "gpu": "triton", "tpu": "mosaic_tpu"})


@functools.cache
def select(platform: str) -> Mapping[str, str]:
    """op -> implementation for a platform. The choice is logged once per process. KeyError for an unknown platform.

    An op that has no implementation for the platform runs its reference there.
    """
    default = DEFAULT_IMPL[platform]
    chosen = MappingProxyType(
        {op: default if default in known else "reference" for op, known in IMPLEMENTATIONS.items()}
    )
    logger.info("kernels on %s: %s", platform, ", ".join(f"{op}={impl}" for op, impl in chosen.items()))
    return chosen


def current_platform() -> str:
    """The platform that is traced for: of the devices of the current mesh, or the default backend's if none is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind: str = device.device_kind
    by_kind = "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"
    platform: str = getattr(device, "platform", by_kind)  # jax 0.10.0 has no `platform`
    return platform


def implementation(op: str, impl: str | None) -> Callable[..., Any]:
    """The `run` of an implementation, by default that of the current platform. Pallas is imported only if it is needed.

    Raises ValueError for an unknown `impl`.
    """
    return _implementation(op, impl or select(current_platform())[op])


@functools.cache
def _implementation(op: str, impl: str) -> Callable[..., Any]:
    if impl not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op} has no implementation {impl!r}, only {', '.join(IMPLEMENTATIONS[op])}")
    return importlib.import_module(f".{op}.{impl}", __package__).run


def raise_unsupported(op: str, impl: str, why: str, **arrays: Shaped[Array, "..."]) -> NoReturn:
    """Raise NotImplementedError: an implementation does not support these shapes. There is no silent fallback."""
    shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in arrays.items())
    raise NotImplementedError(f"{op}: {impl} does not serve {shapes}: {why}")


def kv_in_one_array(platform: str | None = None) -> bool:
    """Whether keys and values share one array, `KVCache.k`, and `KVCache.v` is empty. None: on the current platform.

    Then one copy brings a block's keys and values, and head dim 64 fills the 128 lanes that a TPU copies at a time.
    """
    return (platform or current_platform()) == "tpu"


def kv_cache_head_dim(head_dim: int, platform: str) -> int:
    """The last axis to allocate the KV cache with. For two arrays, callers zero-pad q, k and v to it.

    Zeros change no score and give zero outputs. Triton blocks are powers of two, and masking would load as much as
    padding does. On a TPU it holds a key and a value: `kv_cache.pack_kv`. The CPU needs no padding.
    """
    if platform == "cpu":
        return head_dim
    if platform == "gpu":
        return max(16, 1 << (head_dim - 1).bit_length())
    return 2 * value_lane(head_dim)


def value_lane(head_dim: int) -> int:
    """Where a head's values begin in a cache that has them beside its keys: at lane 64 or a multiple of 128."""
    return 64 if head_dim <= 64 else -(-head_dim // 128) * 128


def kv_heads_first(platform: str | None = None) -> bool:
    """Whether a cache block is [K, block_size, H] instead of [block_size, K, H]. None: on the current platform.

    A GPU's kernels transpose blocks while they copy them, and XLA there writes a token in place only if tokens are the
    outer axis. On the CPU the matrix products need the keys of each head together, and transposing the blocks took
    most of the time: cross attention of 8 sequences over 1500 keys, 6 heads of 64, went from 12.9 ms with token-major
    blocks of 16 to 3.8 ms with heads first and blocks of 64. On a TPU the last two axes are stored in tiles, which
    tokens and lanes fill for any number of heads.
    """
    return (platform or current_platform()) != "gpu"


def kv_block_size(smallest: int, max_tokens: int, max_seqs: int, platform: str) -> int:
    """Tokens per cache block: `smallest`, doubled until the block table of so many sequences of so many tokens fits
    where the platform's kernels need it. That is the scalar memory of a TPU."""
    size = smallest
    while platform == "tpu" and 4 * max_seqs * -(-max_tokens // size) > TPU_TABLE_BYTES:
        size *= 2
    return size


def kv_cache_dtype(dtype: jax.typing.DTypeLike, platform: str) -> jnp.dtype:
    """The dtype to allocate the KV cache with, for keys and values in `dtype`.

    XLA:CPU has neither gather nor scatter of bfloat16: it converts the whole cache to float32 and, after a write, back.
    With k and v of 131 MB each, decode of 4 sequences of 64 tokens took 192 ms instead of 0.3, a write of 4 tokens 317
    ms instead of 0.01. So the CPU's cache stores the bits of bfloat16 as integers: see `kv_cache.to_cache_dtype`.
    """
    return jnp.dtype(jnp.uint16 if platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16 else dtype)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products with float32 sums, which XLA:CPU uses.

    On two cores of an EPYC that has them, [6000, 384] x [384, 1536] takes 36 ms, in float32 50 ms; 8 rows times a
    matrix of 52 000 x 384, which is bound by memory, 3.0 ms and 5.9 ms.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())


def q_block_size(platform: str) -> int:
    """Queries per block of `paged_prefill`.

    On the CPU, blocks of 32 would make attention over 1024 keys a quarter faster, but each prompt is padded to whole
    blocks: a prompt with one small image has 76 tokens, padded to 80 by blocks of 16 and to 96 by blocks of 32.
    """
    return {"cpu": 16, "gpu": 64, "tpu": 64}[platform]
