"""The residual sum that ends one half of a layer and the norm that begins the next."""

from jaxtyping import Array, Float

from ..choose import implementation


def add_rms_norm(
    x: Float[Array, "M D"],
    y: Float[Array, "*parts M D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """(x + y, RMS norm of that sum times weight), both in x's dtype.

    y: [M, D], or f32[P, M, D] to be summed over P. The sum is rounded to x's dtype before it is normalized, and the
    norm before it is scaled. Raises NotImplementedError where `impl` does not serve the shape.
    """
    return implementation("add_rms_norm", impl)(x, y, weight, eps=eps)
