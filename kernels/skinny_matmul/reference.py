"""The product in jnp, split as the tile says."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ..attn_states import AttnStates
from ..merge_attn_states.reference import run as merge
from .types import Product, ResidualParts, Tile


def run(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Shaped[Array, "..."],
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
        sum_squares = jnp.stack([(part**2).sum(1) for part in _parts(exact, tile)])
        norm = jax.lax.rsqrt(sum_squares.sum() / exact.shape[1] + eps)
        rows = exact * x.norm_weight.astype(jnp.float32)
    else:
        rows = merge(x) if isinstance(x, AttnStates) else x
        dtype = rows.dtype
    exact_weight = weight.astype(jnp.float32)
    if scale is not None:
        exact_weight = jnp.moveaxis(exact_weight * scale.astype(jnp.float32)[..., None], -1, 0)
    columns = exact_weight.reshape(rows.shape[1], -1).T
    spans = zip(_parts(rows.astype(jnp.float32), tile), _parts(columns, tile), strict=True)
    sums = jnp.stack([jnp.einsum("mk,nk->mn", *span, precision=jax.lax.Precision.HIGHEST) for span in spans])
    if weight.ndim == 3:
        gate, up = jnp.split((sums.sum(0) * norm).astype(dtype).astype(jnp.float32), 2, axis=1)
        return Product((jax.nn.silu(gate) * up).astype(dtype), residual)
    return Product(sums if into is None else into.at[1:].set(sums[:, 0].astype(into.dtype)), residual, sum_squares)


def _parts(x: Float[Array, "rows K"], tile: Tile) -> list[Float[Array, "rows _"]]:
    """The parts of K, of whole blocks each."""
    blocks = x.shape[1] // tile.block_k
    edges = [i * blocks // tile.split_k * tile.block_k for i in range(1, tile.split_k)]
    return jnp.split(x, edges, axis=1)
