"""The product of a few rows with a weight, bound by reading the weight, and what surrounds it in a decode step."""

from jaxtyping import Array, Float, Shaped

from ..attn_states import AttnStates
from ..choose import implementation
from .tiles import tile_for
from .types import Product, ResidualParts, Tile

__all__ = ["Product", "ResidualParts", "Tile", "skinny_matmul", "tile_for"]


def skinny_matmul(
    x: Float[Array, "M K"] | AttnStates | ResidualParts,
    weight: Shaped[Array, "..."],
    scale: Float[Array, "*pair N"] | None = None,
    *,
    tile: Tile,
    eps: float = 0.0,
    reserve: int = 0,
    into: Float[Array, "parts N"] | None = None,
    impl: str | None = None,
) -> Product:
    """x [M, K] times weight [K, N]; or, gated, times weight [K, 2, F]: silu(x @ weight[:, 0]) * (x @ weight[:, 1]).

    A single row may come in parts: `AttnStates` are merged on the way, `ResidualParts` summed and normed with eps; then
    the sum comes back as the first of 1 + reserve rows. A single row's product may go `into` rows 1..split_k of
    residual parts [1 + split_k, N], donated, in their dtype. `tile`: see `tile_for`. Raises NotImplementedError for
    what `impl` does not serve.

    An int8 weight comes as [N, K] or [2, F, K], with the scale of each column.
    """
    return implementation("skinny_matmul", impl)(x, weight, scale, tile=tile, eps=eps, reserve=reserve, into=into)
