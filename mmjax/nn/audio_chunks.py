"""The audio towers of the Omni families: mel frames in chunks of equal length, convolved one by one.

A unit is a chunk; the last of a clip may be short. Every chunk starts its positions anew. Axes: U chunks, t frames or
steps of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn.norm import layer_norm
from mmjax.nn.tower import Tower, TowerConfig, gelu
from mmjax.nn.weight import weight

EPS = 1e-5  # of every norm; the config does not name it

Fields = dict[str, tuple[tuple[int, ...], str, int]]


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """Sizes. chunk: mel frames of `bins` numbers per unit; out: width of a row."""

    tower: TowerConfig
    bins: int
    chunk: int
    out: int

    @classmethod
    def from_hf(cls, audio: Mapping[str, Any]) -> ChunkConfig:
        """From audio_config."""
        width, heads = audio["d_model"], audio["encoder_attention_heads"]
        tower = TowerConfig(
            width=width,
            depth=audio["encoder_layers"],
            heads=heads,
            head_dim=width // heads,
            mlp=audio["encoder_ffn_dim"],
            eps=EPS,
            act=audio["activation_function"],
        )
        return cls(tower, audio["num_mel_bins"], 2 * audio["n_window"], audio["output_dim"])

    @property
    def steps(self) -> int:
        """Steps of a full chunk after the convolutions."""
        return halved(self.chunk)

    @property
    def rows(self) -> int:
        """Rows of a chunk, at most."""
        return -(-self.steps // 2)

    @property
    def features(self) -> Fields:
        """What each chunk comes with: its frames, and how many of them are sound."""
        return {"mel": ((self.chunk, self.bins), "float32", 0), "length": ((), "int32", 0)}

    @property
    def numbered(self) -> tuple[str, ...]:
        """The features that hold segment numbers."""
        return ()

    @property
    def picks(self) -> Fields:
        """What each row comes with: the first of its two steps."""
        return {"first": ((), "int32", 0)}

    @property
    def based(self) -> dict[str, int]:
        """Which of them count steps."""
        return {"first": self.steps}

    def split(self, ways: int) -> ChunkConfig:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, tower=self.tower.split(ways))


class ChunkTower(Tower):
    """Two convolutions over time, blocks that attend within a chunk, and the mean of every two steps."""

    def __init__(self, c: ChunkConfig) -> None:
        super().__init__(c.tower)
        d = c.tower.width
        self.conv1 = weight(3, c.bins, d, axes=("kernel", "patch", "embed"))
        self.conv1_bias = weight(d, axes=("embed",))
        self.conv2 = weight(3, d, d, axes=("kernel", "embed", "embed_out"))
        self.conv2_bias = weight(d, axes=("embed_out",))
        self.norm = weight(d, axes=("embed",))
        self.norm_bias = weight(d, axes=("embed",))
        self.project = weight(d, c.out, axes=("embed", "embed_out"))
        self.project_bias = weight(c.out, axes=("embed_out",))
        self.c = c

    def rows(self, features: Mapping[str, jax.Array]) -> jax.Array:
        """[R, out] of `ChunkConfig.features` [U, ...] and `ChunkConfig.picks` [R, ...]."""
        length, first = features["length"], features["first"]
        x = features["mel"].astype(self.conv1.dtype)
        x = gelu(convolve(x, self.conv1[...], stride=1) + self.conv1_bias[...])
        x = jnp.where(inside(length, x.shape[1])[:, :, None], x, jnp.zeros((), x.dtype))  # the next step sees no echo
        x = gelu(convolve(x, self.conv2[...], stride=2) + self.conv2_bias[...])
        units, steps, width = x.shape
        x = x + jnp.asarray(sinusoids(steps, width), x.dtype)
        unit = jnp.arange(units, dtype=jnp.int32)[:, None]
        segment = 2 * unit + jnp.where(inside(halved(length), steps), 0, 1)  # a chunk's padding keeps to itself
        x = self(x.reshape(-1, width), segment.reshape(-1))
        pairs = jnp.take(x, first, axis=0, mode="clip") + jnp.take(x, first + 1, axis=0, mode="clip")
        x = layer_norm(pairs / 2, self.norm[...], self.norm_bias[...], EPS)
        return x @ self.project[...] + self.project_bias[...]


def halved(length: Any) -> Any:
    """Steps of a convolution of stride 2, kernel 3, padding 1 over so many."""
    return (length + 1) // 2


def inside(length: jax.Array, steps: int) -> jax.Array:
    """bool[U, steps]: the first length[u] of each chunk."""
    return jnp.arange(steps, dtype=jnp.int32) < length[:, None]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed positions, sines beside cosines, with time scales from 1 to 10000: f32[length, width]."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """x [U, t, C] convolved over time with kernel [3, C, D], padding 1: [U, ceil(t / stride), D].

    One matrix product over the three shifted copies side by side, which is faster than XLA's convolution on the CPU.
    """
    steps = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    shifted = jnp.concatenate([padded[:, i : i + steps : stride] for i in range(3)], axis=-1)
    return shifted @ kernel.reshape(-1, kernel.shape[-1])
