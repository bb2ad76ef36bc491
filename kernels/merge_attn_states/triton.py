"""The merge on GPU, in Pallas-Triton: a program takes one head of one sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from .. import gpu
from ..attn_states import AttnStates
from ..choose import raise_unsupported


def run(states: AttnStates, *, interpret: bool = False) -> Float[Array, "S NH"]:
    """See `merge_attn_states`. The number of splits and the head dim must be powers of two."""
    out, lse = states
    splits, S, N = lse.shape
    H = out.shape[2] // N
    if not (gpu.is_power_of_2(splits) and gpu.is_power_of_2(H)):
        raise_unsupported("merge_attn_states", "triton", "splits and head dim must be powers of two", out=out, lse=lse)
    return pl.pallas_call(
        _kernel,
        grid=(S, N),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(out.shape[1:], out.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="merge_attn_states",
    )(out, lse)


def _kernel(states_ref: Any, lse_ref: Any, out_ref: Any) -> None:
    s, n = pl.program_id(0), pl.program_id(1)
    splits, _, N = lse_ref.shape
    H = states_ref.shape[2] // N
    lane = n * H + jnp.arange(H, dtype=jnp.int32)
    split = jnp.arange(splits, dtype=jnp.int32)
    lse = lse_ref[split, s, n]
    weight = jnp.exp2(lse - jnp.max(lse))
    states = states_ref[split[:, None], s, lane[None]].astype(jnp.float32)
    merged = jnp.sum(states * weight[:, None], axis=0) / jnp.sum(weight)
    out_ref[s, lane] = merged.astype(out_ref.dtype)
