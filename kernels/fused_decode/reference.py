"""The step in jnp, from the ops that it fuses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ..choose import implementation
from ..kv_cache import write_kv_cache
from . import QKVEpilogue


def run(
    qkv: Float[Array, "*parts S K heads H"],
    epilogue: QKVEpilogue,
    k_cache: Num[Array, "num_blocks K block_size H"],
    v_cache: Num[Array, "num_blocks K block_size H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    slot_mapping: Int[Array, "S"],
    first_block: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Float[Array, "S KGH"], Num[Array, "num_blocks K block_size H"], Num[Array, "num_blocks K block_size H"]]:
    """See `fused_decode`. The keys are not split."""
    dtype = jnp.bfloat16 if k_cache.dtype == jnp.uint16 else k_cache.dtype
    x = qkv.astype(jnp.float32)
    x = x.sum(0) if x.ndim == 5 else x
    if epilogue.sum_squares is not None:
        mean = epilogue.sum_squares.sum(0) / epilogue.hidden_size
        x = x * jax.lax.rsqrt(mean + epilogue.eps)[:, None, None, None]
    x = x.astype(dtype)
    if epilogue.bias is not None:
        x = x + epilogue.bias
    query, key, value = x[:, :, :-2], x[:, :, -2], x[:, :, -1]
    if epilogue.q_norm is not None and epilogue.k_norm is not None:
        query = _rms_norm(query, epilogue.q_norm, epilogue.eps)
        key = _rms_norm(key, epilogue.k_norm, epilogue.eps)
    query, key = _rotate(query, epilogue), _rotate(key, epilogue)
    slots = jnp.where(slot_mapping >= 0, slot_mapping + first_block * k_cache.shape[2], -1)
    k_cache, v_cache = write_kv_cache(k_cache, v_cache, key, value, slots)
    out = implementation("paged_decode", "reference")(
        query, k_cache, v_cache, block_table + first_block, context_lens, scale=scale, window=window
    )
    return out.reshape(out.shape[0], -1), k_cache, v_cache


def _rms_norm(x: Float[Array, "*shape H"], weight: Float[Array, "H"], eps: float) -> Float[Array, "*shape H"]:
    exact = x.astype(jnp.float32)
    exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    return exact.astype(x.dtype) * weight


def _rotate(x: Float[Array, "*shape H"], epilogue: QKVEpilogue) -> Float[Array, "*shape H"]:
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1] // 2,)
    cos, sin = epilogue.cos.reshape(shape), epilogue.sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
