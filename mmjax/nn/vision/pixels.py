"""Pixel normalization on the device, so that the host sends bytes and not floats."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped


@dataclasses.dataclass(frozen=True)
class PixelNorm:
    """(pixel * scale - mean) / std, with one mean and one std per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> PixelNorm:
        """From the options of an image processor; `do_rescale` and `do_normalize` are honored, and null is the default.
        Raises ValueError for a mean or deviation that is neither a number nor one for each channel."""
        normalize, rescale = (config.get(name) in (None, True) for name in ("do_normalize", "do_rescale"))
        factor = config.get("rescale_factor")
        return cls(
            scale=(1 / 255 if factor is None else float(factor)) if rescale else 1.0,
            mean=_per_channel("image_mean", config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            std=_per_channel("image_std", config["image_std"]) if normalize else (1.0, 1.0, 1.0),
        )

    def normalize(self, pixels: Shaped[Array, "*shape"], *, axis: int) -> Float32[Array, "*shape"]:
        """Pixels 0..255, uint8 or float, with their channels on `axis`, as float32."""
        shape = [1] * pixels.ndim
        shape[axis] = len(self.mean)
        mean = jnp.asarray(self.mean, jnp.float32).reshape(shape)
        std = jnp.asarray(self.std, jnp.float32).reshape(shape)
        return (pixels.astype(jnp.float32) * self.scale - mean) / std


def _per_channel(name: str, value: Any) -> tuple[float, ...]:
    """One number for each channel, from one number or three."""
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(values) != 3 or not all(isinstance(each, int | float) for each in values):
        raise ValueError(f"{name} {value!r} is not supported: it is a number, or one for each of 3 channels")
    return tuple(map(float, values))


def to_patches(pixels: Float[Array, "I 3 height width"], patch_size: int) -> Float[Array, "I patches patch_dim"]:
    """The square patches of images, row by row. Pixels that fill no patch, at the right and below, are left out: SigLIP
    cuts 384 pixels into 27 patches of 14."""
    rows, columns = (edge // patch_size for edge in pixels.shape[2:])
    x = pixels[:, :, : rows * patch_size, : columns * patch_size]
    x = x.reshape(-1, 3, rows, patch_size, columns, patch_size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows * columns, 3 * patch_size**2)
