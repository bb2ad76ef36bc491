"""Log-mel features on the device, of whole windows: what `mmjax.mel` computes on the host for clips of any
length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from mmjax.mel import FLOOR, RANGE, LogMel


@jax.named_scope("mel")
def log_mel(samples: Float32[Array, "I samples"], c: LogMel) -> Float32[Array, "I t bins"]:
    """Features of windows of c.samples samples, which silence fills up.

    The transform is a product with the tapered cosines and sines: 1 GFLOP for 30 seconds.
    """
    if c.samples % c.hop or samples.shape[1] != c.samples:
        raise ValueError(f"log_mel: windows have {c.samples} samples, a multiple of {c.hop}; got {samples.shape[1]}")
    # Frame i is padded[i * hop :][:window], put together from the pieces of one hop each in which it lies.
    half, frames, pieces = c.window // 2, c.frames, -(-c.window // c.hop)
    padded = jnp.pad(samples, ((0, 0), (half, half)), mode="reflect")
    padded = jnp.pad(padded, ((0, 0), (0, (frames + pieces) * c.hop - padded.shape[1])))
    hops = padded.reshape(padded.shape[0], -1, c.hop)
    framed = jnp.concatenate([hops[:, i : i + frames] for i in range(pieces)], axis=-1)[:, :, : c.window]
    bins = c.window // 2 + 1
    angle = 2 * np.pi / c.window * np.outer(np.arange(c.window), np.arange(bins))
    basis = c.taper[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    spectrum = _exact_dot(framed, basis.astype(np.float32))
    power = jnp.square(spectrum[..., :bins]) + jnp.square(spectrum[..., bins:])
    mel = jnp.log10(jnp.maximum(_exact_dot(power, c.filters.T), 10.0**FLOOR))
    return (jnp.maximum(mel, mel.max((1, 2), keepdims=True) - RANGE) + 4.0) / 4.0


def _exact_dot(
    x: Float32[Array, "I t inner"], table: Float32[np.ndarray, "inner outer"]
) -> Float32[Array, "I t outer"]:
    """x @ table in float32, which accelerators round to less by default."""
    return jnp.matmul(x, jnp.asarray(table), precision=jax.lax.Precision.HIGHEST)
