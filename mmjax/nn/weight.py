"""How a parameter is declared: its shape, its logical axes, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def weight(*shape: int, axes: tuple[str, ...], dtype: DTypeLike = jnp.float32) -> nnx.Param[jax.ShapeDtypeStruct]:
    """Declare a parameter: shape and logical axes side by side, no storage.

    `axes` names one logical axis per dimension; `sharding.RULES` says where each lies on the mesh.
    Raises ValueError when the two lengths differ.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} has {len(shape)} dimensions but axes={axes}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
