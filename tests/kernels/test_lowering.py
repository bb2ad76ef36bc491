"""The kernels lower for devices that this machine lacks, which finds wrong block shapes and unsupported operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax import kernels, sharding
from mmjax.batch import Batch, KVCache
from mmjax.nn import attention

DEVICES = {"cuda": ("gpu", "triton"), "tpu": ("tpu", "mosaic_tpu")}
I32 = jnp.int32
Programs = dict[str, tuple[Callable[..., Any], tuple[tuple[tuple[int, ...], Any], ...]]]
DECODE_STEP = ("qkv", "o", "gate_up", "down", "attend", "merge", "norm")


def programs(platform: str, impl: str) -> Programs:
    head_dim, queries = kernels.kv_cache_head_dim(64, platform), kernels.q_block_size(platform)
    packed = ((1024, 4, 80), jnp.bfloat16)
    options: dict[str, Any] = {"scale": 0.125, "impl": impl}
    attention = one_array_programs if kernels.kv_in_one_array(platform) else two_array_programs
    return {
        **attention(head_dim, queries, options),
        "segments": (functools.partial(kernels.segment_attention, **options), (packed,) * 3 + (((1024,), I32),)),
        "masked_keys": (
            lambda *arrays: kernels.segment_attention(*arrays[:4], key_mask=arrays[4], **options),
            (packed,) * 3 + (((1024,), I32), ((1024,), jnp.bool_)),
        ),
    }


def two_array_programs(head_dim: int, queries: int, options: dict[str, Any]) -> Programs:
    cache, table = ((128, 64, 2, head_dim), jnp.bfloat16), ((4, 8), I32)
    q, blocks = ((4, 2, 7, head_dim), jnp.bfloat16), ((3, queries, 2, 7, head_dim), jnp.bfloat16)
    prefill = (blocks, cache, cache, table, ((3,), I32), ((3,), I32), ((4,), I32))
    return {
        "decode": (functools.partial(kernels.paged_decode, **options), (q, cache, cache, table, ((4,), I32))),
        "causal": (functools.partial(kernels.paged_prefill, causal=True, **options), prefill),
        "cross": (functools.partial(kernels.paged_prefill, causal=False, **options), prefill),
    }


def one_array_programs(lanes: int, queries: int, options: dict[str, Any]) -> Programs:
    def shapes(count: int, queries: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
        q, new = ((count, queries, 1, 7, 64), jnp.bfloat16), ((count, queries, 1, 64), jnp.bfloat16)
        vectors = ((4, 8), I32), ((count,), I32), ((count,), I32), ((4,), I32)
        return q, ((128, 1, 64, lanes), jnp.bfloat16), new, new, *vectors

    def causal(q: Any, cache: Any, k: Any, v: Any, *batch: Any) -> Any:
        return kernels.paged_attention(q, cache, (k, v), *batch, causal=True, **options)

    def cross(q: Any, cache: Any, _k: Any, _v: Any, *batch: Any) -> Any:
        return kernels.paged_attention(q, cache, None, *batch, causal=False, **options)

    return {
        "decode": (causal, shapes(4, 1)),
        "causal": (causal, shapes(3, queries)),
        "cross": (cross, shapes(3, queries)),
    }


def decode_step_programs() -> Programs:
    """The ops of a decode step on a GPU: rows as wide as 2048, 2 kv heads of 8 queries."""
    bf16, f32, i8 = jnp.bfloat16, jnp.float32, jnp.int8

    def multiply(rows: Any, weight: Any, scale: Any = None, **options: Any) -> Any:
        one_row = not isinstance(rows, jax.Array)
        head_dim = 128 if isinstance(rows, kernels.AttnStates) else 0
        shape = weight.shape if scale is None else (weight.shape[-1], *weight.shape[:-1])
        tile = kernels.tile_for(1 if one_row else len(rows), shape, head_dim=head_dim, int8=scale is not None)
        assert tile is not None
        return kernels.skinny_matmul(rows, weight, scale, tile=tile, eps=1e-6, impl="triton", **options)

    def qkv(parts: Any, norm: Any, weight: Any, scale: Any = None) -> Any:
        return multiply(kernels.ResidualParts(parts, norm), weight, scale, reserve=4)

    def o(out: Any, lse: Any, into: Any, weight: Any, scale: Any = None) -> Any:
        return multiply(kernels.AttnStates(out, lse), weight, scale, into=into)

    def attend(qkv: Any, cos: Any, sin: Any, squares: Any, bias: Any, *cache: Any) -> Any:
        epilogue = kernels.QKVEpilogue(cos, sin, squares, bias, hidden_size=2048, eps=1e-6)
        return kernels.fused_decode(qkv, epilogue, *cache, scale=0.1, impl="triton")

    cache = (((128, 64, 2, 128), bf16),) * 2 + (((1, 8), I32), ((1,), I32), ((1,), I32), ((), I32))
    states = ((16, 1, 2048), bf16), ((16, 1, 16), f32)
    return {
        "qkv": (qkv, (((9, 2048), bf16), ((2048,), bf16), ((2048, 2560), bf16))),
        "o": (o, (*states, ((5, 2048), bf16), ((2048, 2048), bf16))),
        "gate_up": (qkv, (((5, 2048), bf16), ((2048,), bf16), ((2048, 2, 11008), bf16))),
        "down": (multiply, (((256, 11008), bf16), ((11008, 2048), bf16))),
        "qkv_int8": (qkv, (((9, 2048), bf16), ((2048,), bf16), ((2560, 2048), i8), ((2560,), bf16))),
        "o_int8": (o, (*states, ((9, 2048), bf16), ((2048, 2048), i8), ((2048,), bf16))),
        "gate_up_int8": (qkv, (((5, 2048), bf16), ((2048,), bf16), ((2, 11008, 2048), i8), ((2, 11008), bf16))),
        "down_int8": (multiply, (((16, 11008), bf16), ((2048, 11008), i8), ((2048,), bf16))),
        "attend": (
            attend,
            (((4, 1, 2, 10, 128), f32), ((1, 64), f32), ((1, 64), f32), ((4, 1), f32), ((2, 10, 128), bf16), *cache),
        ),
        "merge": (
            lambda *states: kernels.merge_attn_states(kernels.AttnStates(*states), impl="triton"),
            (((16, 4, 2048), bf16), ((16, 4, 16), f32)),
        ),
        "norm": (
            functools.partial(kernels.add_rms_norm, eps=1e-6, impl="triton"),
            (((4, 2048), bf16), ((4, 4, 2048), f32), ((2048,), bf16)),
        ),
    }


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["decode", "causal", "cross", "segments", "masked_keys"])
@pytest.mark.parametrize("device", DEVICES)
def test_lowers(device: str, name: str) -> None:
    text = lowered(device, *programs(*DEVICES[device])[name])
    assert "tpu_custom_call" in text or "triton" in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [*DECODE_STEP, *(f"{name}_int8" for name in DECODE_STEP[:4])])
def test_decode_step_lowers(name: str) -> None:
    assert "triton" in lowered("cuda", *decode_step_programs()[name])


def lowered(device: str, function: Callable[..., Any], shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> str:
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    try:
        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    except TypeError:  # before 0.11 a device has no platform
        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu if device == "cuda" else None)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(device,)).as_text()


def test_a_layer_on_a_mesh_of_tpus() -> None:
    """Two kv heads on two devices, one each; the batch is on all of them."""
    mesh = AbstractMesh((2,), (sharding.MODEL,), abstract_device=tpu())
    cache = KVCache(*(jax.ShapeDtypeStruct((n, 2, 64, 256), jnp.bfloat16) for n in (64, 0)))

    def layer(q: Any, k: Any, v: Any, cache: KVCache, batch: Batch) -> Any:
        cache = attention.write_kv(k, v, cache, batch.slot_mapping, I32(32))
        out, cache = attention.attend(q, k, v, cache, batch, I32(0), scale=0.1)
        return attention.cross_attend(out, cache, batch, I32(32), scale=0.1), cache

    for blocks, queries in ((4, 1), (2, 64)):
        tokens = blocks * queries
        q, kv = (jax.ShapeDtypeStruct((tokens, 2, *inner), jnp.bfloat16) for inner in ((8, 128), (128,)))
        shapes = {
            "token_ids": (tokens,), "rope_positions": (1, tokens), "mm_index": (tokens,), "slot_mapping": (tokens,),
            "seq_index": (blocks,), "q_start": (blocks,), "block_table": (blocks, 8), "context_lens": (blocks,),
            "cross_block_table": (blocks, 4), "cross_context_lens": (blocks,),
        }  # fmt: skip
        batch = Batch(**{name: jax.ShapeDtypeStruct(shape, I32) for name, shape in shapes.items()})
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(layer).trace(q, kv, kv, cache, batch)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 2


def tpu() -> AbstractDevice:
    try:
        return AbstractDevice("TPU v5 lite", 1, "tpu")
    except TypeError:  # before 0.11 a device has no platform
        return AbstractDevice("TPU v5 lite", 1)
