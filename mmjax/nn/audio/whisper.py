"""Whisper's encoder, which the families that hear share: over whole windows, or over clips of any length in pieces.

A window is what the position table spans (30 seconds). A unit is a window or a piece of one. Axes: U units, t mel
frames or steps of a unit; a step is two frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.nn.encoder import Encoder, EncoderConfig, gelu
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight

EPS = 1e-5  # of every norm; the config does not name it


@dataclasses.dataclass(frozen=True)
class WhisperEncoderConfig:
    """Sizes. bins: numbers of a mel frame; steps: of a window."""

    tower: EncoderConfig
    num_mel_bins: int
    window_steps: int

    @classmethod
    def from_hf(cls, audio: Mapping[str, Any]) -> WhisperEncoderConfig:
        """From a config with Whisper's keys. Raises ValueError for an encoder that scales its embeddings."""
        if audio.get("scale_embedding"):
            raise ValueError("scale_embedding=true is not supported: no published Whisper scales its embeddings")
        width, heads = audio["d_model"], audio["encoder_attention_heads"]
        tower = EncoderConfig(
            hidden_size=width,
            num_layers=audio["encoder_layers"],
            num_heads=heads,
            head_dim=width // heads,
            intermediate_size=audio["encoder_ffn_dim"],
            eps=EPS,
            act=audio.get("activation_function", "gelu"),
        )
        return cls(tower, audio["num_mel_bins"], audio["max_source_positions"])

    def for_tp(self, tp_size: int) -> WhisperEncoderConfig:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class ConvEncoder(Encoder):
    """Two convolutions over time, blocks, a final norm. What stands between them is its heir's."""

    def __init__(self, c: EncoderConfig, bins: int) -> None:
        super().__init__(c)
        d = c.hidden_size
        self.conv1 = weight(3, bins, d, axes=("kernel", "patch", "embed"))
        self.conv1_bias = weight(d, axes=("embed",))
        self.conv2 = weight(3, d, d, axes=("kernel", "embed", "embed_out"))
        self.conv2_bias = weight(d, axes=("embed_out",))
        self.norm = weight(d, axes=("embed",))
        self.norm_bias = weight(d, axes=("embed",))

    def conv1_frames(self, mel: jax.Array, *, pad: int = 0) -> jax.Array:
        """The first convolution of mel f32[U, t, bins], `pad` zeros at either end: [U, t', D]."""
        return gelu(convolve(mel.astype(self.conv1.dtype), self.conv1[...], stride=1, pad=pad) + self.conv1_bias[...])

    def conv2_steps(self, x: jax.Array, *, pad: int = 0) -> jax.Array:
        """The second, of the first's [U, t, D], which halves them: [U, t', D]."""
        return gelu(convolve(x, self.conv2[...], stride=2, pad=pad) + self.conv2_bias[...])

    def final_norm(self, x: jax.Array) -> jax.Array:
        """The final norm, [..., D]."""
        return layer_norm(x, self.norm[...], self.norm_bias[...], EPS)


class WhisperEncoder(ConvEncoder):
    """Whisper's, which stores its positions."""

    def __init__(self, c: WhisperEncoderConfig) -> None:
        super().__init__(c.tower, c.num_mel_bins)
        self.positions = weight(c.window_steps, c.tower.hidden_size, axes=("position", "embed"))

    def encode_windows(self, mel: jax.Array) -> jax.Array:
        """f32[U, bins, 2 * steps] to [U * steps, D], normed."""
        x = self.conv2_steps(self.conv1_frames(mel.swapaxes(1, 2), pad=1), pad=1) + self.positions[...]
        num_inputs, steps, width = x.shape
        segment_ids = jnp.arange(num_inputs * steps, dtype=jnp.int32) // steps
        return self.final_norm(self(x.reshape(-1, width), segment_ids, segment_len=steps))

    def encode_chunks(self, features: Mapping[str, jax.Array]) -> jax.Array:
        """[U * PIECE, D] of `AudioConfig.pieces` or `AudioConfig.reaching` [U, ...], before the norm.

        A piece sees its neighbours' frames, so that its steps are those of the whole window; where the window ends, the
        convolutions see nothing. Steps that are not wanted keep to themselves.
        """
        start, heard, reach = features["first_step"], features["audio_steps"], features.get("wanted_steps")
        x = self.conv1_frames(features["mel"])
        frame = jnp.arange(x.shape[1], dtype=jnp.int32) - 1  # counted from the piece's first
        inside = (frame + 2 * start[:, None] >= 0) & (frame < features["num_frames"][:, None])
        x = jnp.where(inside[..., None], x, jnp.zeros((), x.dtype))
        x = self.conv2_steps(x)
        step = jnp.arange(x.shape[1], dtype=jnp.int32)
        x = x + jnp.take(self.positions[...], start[:, None] + step, axis=0, mode="clip")
        wanted = step < (heard if reach is None else reach)[:, None]
        segment_ids = (2 * features["window_ids"][:, None] + jnp.where(wanted, 0, 1)).reshape(-1)
        seen = None if reach is None else ((step < heard[:, None]) | ~wanted).reshape(-1)
        return self(x.reshape(-1, x.shape[-1]), segment_ids, key_mask=seen)


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int, pad: int = 0) -> jax.Array:
    """x [U, t, C] convolved over time with kernel [3, C, D], `pad` zeros at either end: [U, t', D].

    One matrix product over the three shifted copies side by side, which is faster than XLA's convolution on the CPU.
    """
    x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0)))
    last = x.shape[1] - 2
    shifted = jnp.concatenate([x[:, i : i + last : stride] for i in range(3)], axis=-1)
    return shifted @ kernel.reshape(-1, kernel.shape[-1])
