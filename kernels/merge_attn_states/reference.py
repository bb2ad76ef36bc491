"""The merge in jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..attn_states import AttnStates


def run(states: AttnStates) -> Float[Array, "S NH"]:
    """See `merge_attn_states`."""
    weight = jnp.exp2(states.lse - states.lse.max(0))
    weight = weight / weight.sum(0)
    heads = states.out.astype(jnp.float32).reshape(*weight.shape, -1)
    return (heads * weight[..., None]).sum(0).reshape(states.out.shape[1:]).astype(states.out.dtype)
