"""Attention over splits of the keys, merged."""

from jaxtyping import Array, Float

from ..attn_states import AttnStates
from ..choose import implementation


def merge_attn_states(states: AttnStates, *, impl: str | None = None) -> Float[Array, "S NH"]:
    """Attention over all keys, its N heads beside each other, in the dtype of `states.out`.

    Raises NotImplementedError where `impl` does not serve the shape.
    """
    return implementation("merge_attn_states", impl)(states)
