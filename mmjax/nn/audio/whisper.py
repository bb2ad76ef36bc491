"""Whisper's encoder, used by several audio families: over whole windows, or over clips of any length in chunks.

A window has as many steps as the position table (30 seconds). An input (axis I) is a window or a chunk of one; its axis
t counts mel frames or encoder steps. A step is two frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mmjax.nn.activations import activation_of, gelu
from mmjax.nn.encoder import Encoder, EncoderConfig, Features
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight

EPS = 1e-5  # of every norm; config.json does not name it


@dataclasses.dataclass(frozen=True)
class WhisperEncoderConfig:
    """Sizes. window_steps: encoder steps of a window."""

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
            act=activation_of(audio, "activation_function", "gelu"),
        )
        return cls(tower, audio["num_mel_bins"], audio["max_source_positions"])

    def for_tp(self, tp_size: int) -> WhisperEncoderConfig:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class ConvEncoder(Encoder):
    """Two convolutions over time, layers, and a final norm; a subclass combines them."""

    def __init__(self, c: EncoderConfig, bins: int) -> None:
        super().__init__(c)
        d = c.hidden_size
        self.conv1 = weight(3, bins, d, axes=("kernel", "patch", "embed"))
        self.conv1_bias = weight(d, axes=("embed",))
        self.conv2 = weight(3, d, d, axes=("kernel", "embed", "embed_out"))
        self.conv2_bias = weight(d, axes=("embed_out",))
        self.norm = weight(d, axes=("embed",))
        self.norm_bias = weight(d, axes=("embed",))

    @jax.named_scope("conv1")
    def apply_conv1(self, mel: Float[Array, "I t bins"], *, pad: int = 0) -> Float[Array, "I frames C"]:
        """The first convolution, with `pad` zeros at both ends."""
        return gelu(convolve(mel.astype(self.conv1.dtype), self.conv1[...], stride=1, pad=pad) + self.conv1_bias[...])

    @jax.named_scope("conv2")
    def apply_conv2(self, x: Float[Array, "I frames C"], *, pad: int = 0) -> Float[Array, "I steps C"]:
        """The second convolution, of stride 2."""
        return gelu(convolve(x, self.conv2[...], stride=2, pad=pad) + self.conv2_bias[...])

    @jax.named_scope("norm")
    def final_norm(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
        """The norm after the last layer."""
        return layer_norm(x, self.norm[...], self.norm_bias[...], EPS)


class WhisperEncoder(ConvEncoder):
    """Whisper's encoder, whose positions are a stored table."""

    def __init__(self, c: WhisperEncoderConfig) -> None:
        super().__init__(c.tower, c.num_mel_bins)
        self.positions = weight(c.window_steps, c.tower.hidden_size, axes=("position", "embed"))

    def encode_windows(self, mel: Float32[Array, "I t bins"]) -> Float[Array, "U C"]:
        """Hidden states of whole windows, after the final norm; U counts the steps of all windows."""
        x = self.apply_conv2(self.apply_conv1(mel, pad=1), pad=1) + self.positions[...]
        num_inputs, steps, width = x.shape
        segment_ids = jnp.arange(num_inputs * steps, dtype=jnp.int32) // steps
        return self.final_norm(self(x.reshape(-1, width), segment_ids, segment_len=steps))

    def encode_chunks(self, features: Features) -> Float[Array, "U C"]:
        """Hidden states of chunks, before the final norm; U counts the steps of all chunks.

        features: `chunk_fields` of mmjax.processors.whisper_chunks, and output_steps if embeddings are made from more
        steps than are audio. A chunk includes frames of its neighbors, so that its steps equal those of the whole
        window; the convolutions see zeros beyond the ends of the window. Steps after output_steps attend to each other
        only.
        """
        first_step, audio_steps = features["first_step"], features["audio_steps"]
        output_steps = features.get("output_steps")
        x = self.apply_conv1(features["mel"])
        frame = jnp.arange(x.shape[1], dtype=jnp.int32) - 1  # counted from the chunk's first
        inside = (frame + 2 * first_step[:, None] >= 0) & (frame < features["num_frames"][:, None])
        x = jnp.where(inside[..., None], x, jnp.zeros((), x.dtype))
        x = self.apply_conv2(x)
        step = jnp.arange(x.shape[1], dtype=jnp.int32)
        x = x + jnp.take(self.positions[...], first_step[:, None] + step, axis=0, mode="clip")
        is_output = step < (audio_steps if output_steps is None else output_steps)[:, None]
        segment_ids = (2 * features["window_ids"][:, None] + jnp.where(is_output, 0, 1)).reshape(-1)
        key_mask = None if output_steps is None else ((step < audio_steps[:, None]) | ~is_output).reshape(-1)
        return self(x.reshape(-1, x.shape[-1]), segment_ids, key_mask=key_mask)


def convolve(
    x: Float[Array, "I t inner"], kernel: Float[Array, "3 inner outer"], *, stride: int, pad: int = 0
) -> Float[Array, "I steps outer"]:
    """x convolved over time, with `pad` zeros at both ends.

    It is one matrix product of three shifted copies side by side: on the CPU, faster than XLA's convolution.
    """
    x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0)))
    last = x.shape[1] - 2
    shifted = jnp.concatenate([x[:, i : i + last : stride] for i in range(3)], axis=-1)
    return shifted @ kernel.reshape(-1, kernel.shape[-1])
