"""A decode step's attention on GPU: one kernel of split-KV attention (flash decoding) in Pallas-Triton.

A program serves one kv head of one sequence, all its query heads at once, so that a key is read once, and one of
`splits` equal parts of the keys that the sequence already had. The new key and value come from registers: the program
of the first split adds and writes them, so that no program waits for another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int, Num

from .. import gpu, online_softmax, tile
from ..attn_states import AttnStates
from ..choose import raise_unsupported
from . import QKVEpilogue

PROGRAMS = 128
"""Programs to aim for: about one for each of 132 multiprocessors."""
MAX_SPLITS = 16
"""What merges them takes all at once."""


def run(
    qkv: Float[Array, "*parts S K heads H"],
    epilogue: QKVEpilogue,
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    slot_mapping: Int[Array, "S"],
    first_block: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[
    Float[Array, "S KGH"] | AttnStates, Num[Array, "num_blocks block_size K H"], Num[Array, "num_blocks block_size K H"]
]:
    """See `fused_decode`. bfloat16; the block size and the head dim must be powers of two, from 16 up."""
    parts = qkv if qkv.ndim == 5 else qkv[None]
    _, S, K, rows, H = parts.shape
    G, block_size = rows - 2, k_cache.shape[1]
    if k_cache.dtype != jnp.bfloat16 or qkv.dtype not in (jnp.bfloat16, jnp.float32):
        raise_unsupported("fused_decode", "triton", "the KV cache is bfloat16", qkv=qkv, k=k_cache)
    powers = gpu.is_power_of_2(block_size) and gpu.is_power_of_2(H)
    if not powers or min(block_size, H) < gpu.TENSOR_CORE_ROWS or k_cache.shape[2:] != (K, H):
        why = "block size and head dim must be those of the cache, powers of two >= 16"
        raise_unsupported("fused_decode", "triton", why, qkv=qkv, k=k_cache)
    splits = kv_splits(S * K, block_table.shape[1] * block_size, window)
    optional = {name: getattr(epilogue, name) for name in ("sum_squares", "bias", "q_norm", "k_norm")}
    inputs = {"qkv": parts, "cos": epilogue.cos, "sin": epilogue.sin}
    inputs |= {name: array for name, array in optional.items() if array is not None}
    inputs |= {"block_table": block_table, "context_lens": context_lens, "slot_mapping": slot_mapping}
    inputs |= {"first_block": first_block.reshape(1), "k": k_cache, "v": v_cache}
    outputs = {
        "out": jax.ShapeDtypeStruct((splits, S, K, G, H), jnp.bfloat16),
        "lse": jax.ShapeDtypeStruct((splits, S, K, G), jnp.float32),
        "k_out": jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype),
        "v_out": jax.ShapeDtypeStruct(v_cache.shape, v_cache.dtype),
    }
    kernel = functools.partial(
        _kernel,
        names=(*inputs, *outputs),
        block=gpu.key_block_size(block_size, k_cache.dtype),
        scale=scale * gpu.LOG2E,
        hidden_size=epilogue.hidden_size,
        eps=epilogue.eps,
        window=window,
    )
    out, lse, k_cache, v_cache = pl.pallas_call(
        kernel,
        grid=(S, K, splits),
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=list(outputs.values()),
        input_output_aliases={len(inputs) - 2: 2, len(inputs) - 1: 3},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3 if H <= 128 else 2),
        interpret=interpret,
        name="fused_decode",
    )(*inputs.values())
    states = AttnStates(out.reshape(splits, S, K * G * H), lse.reshape(splits, S, K * G))
    return (states.out[0] if splits == 1 else states), k_cache, v_cache


def kv_splits(heads: int, max_keys: int, window: int | None = None) -> int:
    """Into how many parts to split the keys of `heads` kv heads, all sequences together, of at most max_keys each."""
    max_keys = max_keys if window is None else min(max_keys, window)
    splits = 1
    while splits < MAX_SPLITS and heads * splits < PROGRAMS and splits * 64 < max_keys:
        splits *= 2
    return splits


def _kernel(
    *refs: Any,
    names: tuple[str, ...],
    block: int,
    scale: float,
    hidden_size: int,
    eps: float,
    window: int | None,
) -> None:
    r = dict(zip(names, refs, strict=True))
    s, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, _, _, G, H = r["out"].shape
    block_size = r["k"].shape[1]
    lane = jnp.arange(H, dtype=jnp.int32)
    row = jnp.minimum(jnp.arange(max(gpu.TENSOR_CORE_ROWS, pl.next_power_of_2(G)), dtype=jnp.int32), G - 1)
    old = jnp.maximum(r["context_lens"][s] - 1, 0)
    low = 0 if window is None else jnp.maximum(old + 1 - window, 0)
    first_block = r["first_block"][0]

    load = functools.partial(_load, r, s, h, hidden_size, eps)
    rotated = functools.partial(_rotated, r, load, s, lane, eps)
    query = rotated("q_norm", row[:, None]).astype(jnp.bfloat16)
    key, value = rotated("k_norm", G).astype(jnp.bfloat16), load(G + 1, lane).astype(jnp.bfloat16)

    def chunk(c: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        at = c * block
        block_id = r["block_table"][s, lax.div(at, block_size)] + first_block
        keys = pl.ds(lax.rem(at, block_size), block)
        key_pos = at + jnp.arange(block, dtype=jnp.int32)
        live = key_pos < old if window is None else (key_pos < old) & (key_pos >= low)
        x = tile.qk_dot(query, r["k"][block_id, keys, h, :]) * scale
        values = plgpu.load(r["v"].at[block_id, keys, h, :], mask=live[:, None], other=0.0)
        x = jnp.where(live[None], x, online_softmax.MASKED)
        return online_softmax.update(state, x, lambda weights: tile.pv_dot(weights, values), exp=jnp.exp2)

    score = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)[None], axis=1) * scale
    own = (i == 0).astype(jnp.float32)
    state = (
        jnp.where(i == 0, score, online_softmax.MASKED),
        jnp.zeros_like(score) + own,
        jnp.zeros(query.shape, jnp.float32) + value.astype(jnp.float32)[None] * own,
    )
    first = 0 if window is None else lax.div(low, block)
    last = lax.div(old + (block - 1), block)
    split = lax.div(last - first + (splits - 1), splits)
    state = lax.fori_loop(first + i * split, jnp.minimum(first + (i + 1) * split, last), chunk, state)
    top, total, _ = state
    # Rows past the last query head repeat it: they write what it writes.
    r["out"][i, s, h, row[:, None], lane[None]] = online_softmax.finalize(state).astype(jnp.bfloat16)
    if splits > 1:
        lse = top + jnp.log2(jnp.maximum(total, 1e-30))
        r["lse"][i, s, h, row] = jnp.where(total > 0, lse, online_softmax.MASKED)
    slot = r["slot_mapping"][s]

    @pl.when((i == 0) & (slot >= 0))
    def write() -> None:
        block_id, offset = lax.div(slot, block_size) + first_block, lax.rem(slot, block_size)
        at = jnp.arange(H, dtype=jnp.int32)
        r["k_out"][block_id, offset, h, at] = key
        r["v_out"][block_id, offset, h, at] = value


def _load(
    r: dict[str, Any], s: Any, h: Any, hidden_size: int, eps: float, row: Any, lane: Int[Array, "..."]
) -> Float32[Array, "..."]:
    """Rows of the kv head's queries, key and value: summed, normed and with their bias, float32 values of bfloat16."""
    x = r["qkv"][0, s, h, row, lane].astype(jnp.float32)
    for p in range(1, r["qkv"].shape[0]):
        x = x + r["qkv"][p, s, h, row, lane].astype(jnp.float32)
    if "sum_squares" in r:
        squares = functools.reduce(jnp.add, [r["sum_squares"][p, s] for p in range(r["sum_squares"].shape[0])])
        x = x * lax.rsqrt(squares / hidden_size + eps)
    x = _rounded(x)
    return _rounded(x + r["bias"][h, row, lane].astype(jnp.float32)) if "bias" in r else x


def _rotated(
    r: dict[str, Any], load: Any, s: Any, lane: Int[Array, "H"], eps: float, norm: str, row: Any
) -> Float32[Array, "..."]:
    """Rows loaded, normed over the head and rotated: each number with its partner in the other half."""
    H = lane.shape[0]
    at = lane if isinstance(row, int) else lane[None]
    partner = jnp.where(at < H // 2, at + H // 2, at - H // 2)
    x, y = load(row, at), load(row, partner)
    if norm in r:
        factor = lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) / H + eps)
        x = _rounded(_rounded(x * factor) * r[norm][at].astype(jnp.float32))
        y = _rounded(_rounded(y * factor) * r[norm][partner].astype(jnp.float32))
    half = lax.rem(at, H // 2)
    cos, sin = r["cos"][s, half], r["sin"][s, half]
    return x * cos + y * jnp.where(at < H // 2, -sin, sin)


def _rounded(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    return x.astype(jnp.bfloat16).astype(jnp.float32)
