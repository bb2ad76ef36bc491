"""The projector from the width of an image tower to that of the language model."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from mmjax.nn.encoder import ACTIVATIONS
from mmjax.nn.weight import weight


class Projector(nnx.Module):
    """Two dense layers; `act` is a key of ACTIVATIONS."""

    def __init__(self, inputs: int, width: int, act: str) -> None:
        self.fc1 = weight(inputs, width, axes=("embed", "embed_out"))
        self.fc1_bias = weight(width, axes=("embed_out",))
        self.fc2 = weight(width, width, axes=("embed", "embed_out"))
        self.fc2_bias = weight(width, axes=("embed_out",))
        self.act = act

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape D"]:
        """Hidden states of the tower as embeddings of the language model."""
        return ACTIVATIONS[self.act](x @ self.fc1[...] + self.fc1_bias[...]) @ self.fc2[...] + self.fc2_bias[...]
