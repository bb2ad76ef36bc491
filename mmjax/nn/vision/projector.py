"""The projector from the width of an image tower to that of the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from mmjax.nn.activations import ACTIVATIONS, activation_of
from mmjax.nn.weight import Weight, weight


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Sizes. act: a key of ACTIVATIONS. bias: of both layers."""

    input_dim: int
    output_dim: int
    act: str
    bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], input_dim: int, output_dim: int) -> ProjectorConfig:
        """From projector_hidden_act and multimodal_projector_bias."""
        act = activation_of(config, "projector_hidden_act", "gelu")
        return cls(input_dim, output_dim, act, bool(config.get("multimodal_projector_bias", True)))


class Projector(nnx.Module):
    """Two dense layers."""

    def __init__(self, c: ProjectorConfig) -> None:
        self.fc1 = weight(c.input_dim, c.output_dim, axes=("embed", "embed_out"))
        self.fc1_bias = weight(c.output_dim, axes=("embed_out",)) if c.bias else None
        self.fc2 = weight(c.output_dim, c.output_dim, axes=("embed", "embed_out"))
        self.fc2_bias = weight(c.output_dim, axes=("embed_out",)) if c.bias else None
        self.act = c.act

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape D"]:
        """Hidden states of the tower as embeddings of the language model."""
        return _dense(ACTIVATIONS[self.act](_dense(x, self.fc1, self.fc1_bias)), self.fc2, self.fc2_bias)


def _dense(x: Float[Array, "*shape n"], kernel: Weight, bias: Weight | None) -> Float[Array, "*shape m"]:
    y = x @ kernel[...]
    return y if bias is None else y + bias[...]
