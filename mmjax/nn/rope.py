"""Rotary position embeddings: one position per token, or one per section (time, height, width)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

Frequencies = Float64[np.ndarray, "half_H"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """The frequency of each of the H / 2 rotated pairs, and the axis whose position rotates it.

    inv_freq: inverse frequencies. pair_axis: the axis of each pair (0 for one-dimensional rope; else time, height or
    width). attention_factor: multiplies rotated queries and keys. short_inv_freq: replaces inv_freq if no sequence is
    longer than original_max_positions. dynamic: (theta, factor), from which the frequencies follow if one is.
    max_positions: to which the scaling extends the positions of the model, 0 if config.json counts them all.
    """

    inv_freq: tuple[float, ...]
    pair_axis: tuple[int, ...]
    attention_factor: float = 1.0
    short_inv_freq: tuple[float, ...] = ()
    original_max_positions: int = 0
    dynamic: tuple[float, float] | None = None
    max_positions: int = 0

    @property
    def num_axes(self) -> int:
        """The number of position axes (R)."""
        return max(self.pair_axis) + 1

    @classmethod
    def from_hf(cls, rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
        """From `rope_theta` and `rope_scaling` or `rope_parameters`. rotary_dim: the rotated numbers of a head.

        Known types: default, mrope (sections contiguous, or interleaved with `mrope_interleaved`), linear, dynamic,
        yarn, llama3, longrope (also called su). `scaling` also holds max_position_embeddings, and, if config.json has
        it, original_max_position_embeddings. Raises ValueError for any other.
        """
        inv_freq = _inv_freq(rotary_dim, theta)
        scaling = scaling or {}
        rope_type = str(scaling.get("rope_type", scaling.get("type", "default")))
        axis = _pair_axis(rotary_dim, scaling)
        plain = cls(tuple(inv_freq.tolist()), axis)
        if rope_type in ("default", "mrope"):
            return plain
        if rope_type == "llama3":
            return dataclasses.replace(plain, inv_freq=tuple(_llama3(inv_freq, scaling).tolist()))
        if rope_type in ("longrope", "su"):
            return _longrope(inv_freq, scaling)
        if rope_type not in ("linear", "dynamic", "yarn"):
            raise ValueError(
                f"rope type {rope_type!r} is not supported; known: default, mrope, linear, dynamic, yarn, llama3, "
                "longrope"
            )
        positions = scaling.get("max_position_embeddings") or 0
        original = scaling.get("original_max_position_embeddings") or positions
        factor = float(scaling.get("factor") or positions / original)
        scaled = dataclasses.replace(plain, max_positions=int(original * factor))
        if rope_type == "linear":
            return dataclasses.replace(scaled, inv_freq=tuple((inv_freq / factor).tolist()))
        if rope_type == "dynamic":
            return dataclasses.replace(scaled, dynamic=(theta, factor), original_max_positions=positions)
        return dataclasses.replace(
            scaled,
            inv_freq=tuple(_yarn(inv_freq, theta, factor, original, scaling).tolist()),
            attention_factor=_yarn_attention_factor(factor, scaling),
        )

    def for_max_len(self, max_model_len: int) -> Rope:
        """For sequences of at most `max_model_len` tokens. All use one set of frequencies, so that cached keys stay
        valid while a sequence grows."""
        if max_model_len > self.original_max_positions:
            if self.dynamic is None:
                return self
            theta, factor = self.dynamic
            n = 2 * len(self.inv_freq)
            stretch = factor * max_model_len / self.original_max_positions - (factor - 1)
            return dataclasses.replace(self, inv_freq=tuple(_inv_freq(n, theta * stretch ** (n / (n - 2))).tolist()))
        return dataclasses.replace(self, inv_freq=self.short_inv_freq) if self.short_inv_freq else self

    def angles(self, positions: Int[Array, "R T"]) -> Float32[Array, "T half_H"]:
        """The angle by which each pair of each token is rotated."""
        chosen = positions[jnp.asarray(self.pair_axis)] if self.num_axes > 1 else positions
        return chosen.astype(jnp.float32).T * jnp.asarray(self.inv_freq, jnp.float32)


def _inv_freq(rotary_dim: int, theta: float) -> Frequencies:
    return 1.0 / theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _pair_axis(rotary_dim: int, scaling: Mapping[str, Any]) -> tuple[int, ...]:
    """The axis of each pair, by mrope_section."""
    pairs, sections = rotary_dim // 2, scaling.get("mrope_section")
    if not isinstance(sections, list):
        return (0,) * pairs
    if sum(sections) != pairs:
        raise ValueError(f"mrope_section {sections} must sum to half the head size, {pairs}")
    if scaling.get("mrope_interleaved"):  # height and width take every third pair while they last
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(pairs))
    return tuple(i % 3 for i, n in enumerate(sections) for _ in range(n))


def _llama3(inv_freq: Frequencies, scaling: Mapping[str, Any]) -> Frequencies:
    """Llama 3.1's scaling: long wavelengths grow by `factor`, short ones stay, and those between are interpolated."""
    factor, low, high, original = (
        float(scaling[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi / inv_freq
    ramp = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - ramp) * inv_freq / factor + ramp * inv_freq


def _yarn(inv_freq: Frequencies, theta: float, factor: float, original: int, scaling: Mapping[str, Any]) -> Frequencies:
    """YaRN (arXiv:2309.00071): pairs that turn often within the original positions keep their frequency, those that
    turn seldom are slowed down by `factor`, and those between are interpolated."""
    rotary_dim = 2 * len(inv_freq)

    def pair_of(turns: float) -> float:
        """The pair, as a fraction, that turns so often."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / max(high - low, 0.001), 0.0, 1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def _yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _longrope(inv_freq: Frequencies, scaling: Mapping[str, Any]) -> Rope:
    """Phi-3's scaling: each frequency has a divisor for long contexts and one for short contexts."""
    # in float32, as the published code: at position 1000, the last bit of a frequency changes the angle by 1e-4
    wavelength = (1 / inv_freq).astype(np.float32)
    divisors = (np.asarray(scaling[name], np.float32) for name in ("long_factor", "short_factor"))
    long, short = (tuple((1 / (divisor * wavelength)).tolist()) for divisor in divisors)
    longest, original = (int(scaling[name]) for name in ("max_position_embeddings", "original_max_position_embeddings"))
    factor = float(scaling.get("factor") or longest / original)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        long,
        (0,) * len(long),
        attention_factor=float(attention_factor),
        short_inv_freq=short,
        original_max_positions=original,
    )


@jax.named_scope("rope")
def apply_rope(x: Float[Array, "T *heads H"], angles: Float32[Array, "T H//2"]) -> Float[Array, "T *heads H"]:
    """Rotate pairs (i, i + H / 2), in float32; the result is in x's dtype."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1] // 2,)
    cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def apply_partial_rope(
    x: Float[Array, "T *heads H"], angles: Float32[Array, "T half_R"], factor: float
) -> Float[Array, "T *heads H"]:
    """Rotate the first R numbers of each head, and multiply them by `factor`; the others pass."""
    rotary_dim = 2 * angles.shape[1]
    rotated = apply_rope(x[..., :rotary_dim], angles)
    return jnp.concatenate([rotated * jnp.asarray(factor, x.dtype), x[..., rotary_dim:]], axis=-1)
