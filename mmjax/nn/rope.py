"""Rotary position embeddings: one position per token, or one per section (time, height, width)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

Frequencies = Float64[np.ndarray, "half_H"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """The frequency of each of the H / 2 rotated pairs, and the axis whose position rotates it.

    inv_freq: inverse frequencies. pair_axis: the axis of each pair (0 for one-dimensional rope; else time, height or
    width). attention_factor: multiplies rotated queries and keys; `DecoderConfig.scale` applies its square to the
    scores instead. short_inv_freq: replaces inv_freq if no sequence is longer than original_max_positions.
    """

    inv_freq: tuple[float, ...]
    pair_axis: tuple[int, ...]
    attention_factor: float = 1.0
    short_inv_freq: tuple[float, ...] = ()
    original_max_positions: int = 0

    @property
    def num_axes(self) -> int:
        """The number of position axes (R)."""
        return max(self.pair_axis) + 1

    @classmethod
    def from_hf(cls, head_dim: int, theta: float, scaling: dict[str, object] | None) -> Rope:
        """From `rope_theta` and `rope_scaling` or `rope_parameters`.

        Known types: default, mrope (sections contiguous, or interleaved with `mrope_interleaved`), linear, llama3,
        longrope (also called su; `scaling` then holds max_position_embeddings and original_max_position_embeddings
        too). Raises ValueError for any other.
        """
        inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        axis = [0] * (head_dim // 2)
        scaling = scaling or {}
        rope_type = str(scaling.get("rope_type", scaling.get("type", "default")))
        sections = scaling.get("mrope_section")
        if isinstance(sections, list):
            if sum(sections) != head_dim // 2:
                raise ValueError(f"mrope_section {sections} must sum to half the head size, {head_dim // 2}")
            axis = [i % 3 for i, n in enumerate(sections) for _ in range(n)]
            if scaling.get("mrope_interleaved"):  # height and width take every third pair while they last
                axis = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(head_dim // 2)]
        if rope_type == "linear":
            inv_freq = inv_freq / float(str(scaling["factor"]))
        elif rope_type == "llama3":
            inv_freq = _llama3(inv_freq, scaling)
        elif rope_type in ("longrope", "su"):
            return _longrope(inv_freq, scaling)
        elif rope_type not in ("default", "mrope"):
            raise ValueError(
                f"rope type {rope_type!r} is not supported; known: default, mrope, linear, llama3, longrope"
            )
        return cls(tuple(inv_freq.tolist()), tuple(axis))

    def for_max_len(self, max_model_len: int) -> Rope:
        """For sequences of at most `max_model_len` tokens. All use one set of frequencies, so that cached keys stay
        valid while a sequence grows."""
        return (
            dataclasses.replace(self, inv_freq=self.short_inv_freq)
            if self.short_inv_freq and max_model_len <= self.original_max_positions
            else self
        )

    def angles(self, positions: Int[Array, "R T"]) -> Float32[Array, "T half_H"]:
        """The angle by which each pair of each token is rotated."""
        chosen = positions[jnp.asarray(self.pair_axis)] if self.num_axes > 1 else positions
        return chosen.astype(jnp.float32).T * jnp.asarray(self.inv_freq, jnp.float32)


def _llama3(inv_freq: Frequencies, scaling: dict[str, object]) -> Frequencies:
    """Llama 3.1's scaling: long wavelengths grow by `factor`, short ones stay, and those between are interpolated."""
    factor, low, high, original = (
        float(str(scaling[name]))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi / inv_freq
    ramp = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - ramp) * inv_freq / factor + ramp * inv_freq


def _longrope(inv_freq: Frequencies, scaling: dict[str, object]) -> Rope:
    """Phi-3's scaling: each frequency has a divisor for long contexts and one for short contexts."""
    # in float32, as the published code: at position 1000, the last bit of a frequency changes the angle by 1e-4
    wavelength = (1 / inv_freq).astype(np.float32)
    divisors = (np.asarray(scaling[name], np.float32) for name in ("long_factor", "short_factor"))
    long, short = (tuple((1 / (divisor * wavelength)).tolist()) for divisor in divisors)
    longest, original = (
        int(str(scaling[name])) for name in ("max_position_embeddings", "original_max_position_embeddings")
    )
    factor = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    return Rope(long, (0,) * len(long), attention_factor=factor, short_inv_freq=short, original_max_positions=original)


@jax.named_scope("rope")
def apply_rope(x: Float[Array, "T *heads H"], angles: Float32[Array, "T H//2"]) -> Float[Array, "T *heads H"]:
    """Rotate pairs (i, i + H / 2), in float32; the result is in x's dtype."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1] // 2,)
    cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
