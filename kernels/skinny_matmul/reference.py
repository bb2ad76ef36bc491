"""The product in jnp, split as the tile says."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ..attn_states import AttnStates
from ..merge_attn_states.reference import run as merge
from .types import Product, ResidualParts, Tile


def run(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Shaped[Array, "K *pair N"],
    scale: Float[Array, "*pair N"] | None = None,
    *,
    tile: Tile,
    eps: float,
    reserve: int,
    into: Float[Array, "parts N"] | None,
) -> Product:
    """See `skinny_matmul`."""
    residual = sum_squares = None
    norm = jnp.float32(1)
    if isinstance(x, ResidualParts):
        dtype = x.parts.dtype
        exact = x.parts.astype(jnp.float32).sum(0, keepdims=True)
        residual = jnp.zeros((1 + reserve, exact.shape[1]), dtype).at[0].set(exact[0].astype(dtype))
        sum_squares = (exact.reshape(tile.split_k, -1) ** 2).sum(1, keepdims=True)
        norm = jax.lax.rsqrt(sum_squares.sum() / exact.shape[1] + eps)
        rows = exact * x.norm_weight.astype(jnp.float32)
    else:
        rows = merge(x) if isinstance(x, AttnStates) else x
        dtype = rows.dtype
    M, K = rows.shape
    wide = rows.astype(jnp.float32).reshape(M, tile.split_k, -1)
    exact_weight = weight.astype(jnp.float32) * (1.0 if scale is None else scale.astype(jnp.float32))
    parts = exact_weight.reshape(tile.split_k, K // tile.split_k, -1)
    sums = jnp.einsum("mpk,pkn->pmn", wide, parts, precision=jax.lax.Precision.HIGHEST)
    if weight.ndim == 3:
        gate, up = jnp.split((sums.sum(0) * norm).astype(dtype).astype(jnp.float32), 2, axis=1)
        return Product((jax.nn.silu(gate) * up).astype(dtype), residual)
    return Product(sums if into is None else into.at[1:].set(sums[:, 0].astype(into.dtype)), residual, sum_squares)
