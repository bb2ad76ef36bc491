"""The kernels lower for devices that this machine lacks, which finds wrong block shapes and unsupported operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax import kernels

DEVICES = {"cuda": ("gpu", "triton"), "tpu": ("tpu", "mosaic_tpu")}
I32 = jnp.int32


def programs(platform: str, impl: str) -> dict[str, tuple[Callable[..., Any], tuple[tuple[tuple[int, ...], Any], ...]]]:
    head_dim, queries = kernels.kv_cache_head_dim(64, platform), kernels.q_block_size(platform)
    cache, table = ((128, 64, 2, head_dim), jnp.bfloat16), ((4, 8), I32)
    q, blocks = ((4, 2, 7, head_dim), jnp.bfloat16), ((3, queries, 2, 7, head_dim), jnp.bfloat16)
    packed = ((1024, 4, 80), jnp.bfloat16)
    options: dict[str, Any] = {"scale": 0.125, "impl": impl}
    prefill = (blocks, cache, cache, table, ((3,), I32), ((3,), I32), ((4,), I32))
    return {
        "decode": (functools.partial(kernels.paged_decode, **options), (q, cache, cache, table, ((4,), I32))),
        "causal": (functools.partial(kernels.paged_prefill, causal=True, **options), prefill),
        "cross": (functools.partial(kernels.paged_prefill, causal=False, **options), prefill),
        "segments": (functools.partial(kernels.segment_attention, **options), (packed,) * 3 + (((1024,), I32),)),
        "masked_keys": (
            lambda *arrays: kernels.segment_attention(*arrays[:4], key_mask=arrays[4], **options),
            (packed,) * 3 + (((1024,), I32), ((1024,), jnp.bool_)),
        ),
    }


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["decode", "causal", "cross", "segments", "masked_keys"])
@pytest.mark.parametrize("device", DEVICES)
def test_lowers(device: str, name: str) -> None:
    function, shapes = programs(*DEVICES[device])[name]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    try:
        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    except TypeError:  # before 0.11 a device has no platform
        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu if device == "cuda" else None)):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(device,)).as_text()
    assert "tpu_custom_call" in text or "triton" in text
