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

from mmjax.nn.audio.whisper import EPS, ConvEncoder
from mmjax.nn.encoder import ACTIVATIONS, Encoder, EncoderConfig, gelu
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight
from mmjax.spec import conv_length

CONV_BATCH = 32  # chunks convolved at a time: of a published model each takes 6 MiB then


@dataclasses.dataclass(frozen=True)
class OmniAudioConfig:
    """Sizes. chunk: mel frames of `bins` numbers per unit; out: width of a row.

    channels: of the convolutions over frequency and time of the second generation, 0 for the first. window: chunks that
    attend to each other.
    """

    tower: EncoderConfig
    num_mel_bins: int
    chunk_frames: int
    output_dim: int
    conv_channels: int = 0
    window_chunks: int = 1

    @classmethod
    def from_hf(cls, audio: Mapping[str, Any]) -> OmniAudioConfig:
        """From audio_config of either generation."""
        width, heads = audio["d_model"], audio["encoder_attention_heads"]
        tower = EncoderConfig(
            hidden_size=width,
            num_layers=audio["encoder_layers"],
            num_heads=heads,
            head_dim=width // heads,
            intermediate_size=audio["encoder_ffn_dim"],
            eps=EPS,
            act=audio["activation_function"],
        )
        chunk = 2 * audio["n_window"]
        sizes = cls(tower, audio["num_mel_bins"], chunk, audio["output_dim"])
        if "downsample_hidden_size" not in audio:
            return sizes
        return dataclasses.replace(
            sizes, conv_channels=audio["downsample_hidden_size"], window_chunks=audio["n_window_infer"] // chunk
        )

    @property
    def num_strided_convs(self) -> int:
        """Convolutions of stride 2."""
        return 3 if self.conv_channels else 1

    @property
    def chunk_steps(self) -> int:
        """Steps of a full chunk after the convolutions."""
        return conv_length(self.chunk_frames, self.num_strided_convs)

    @property
    def embeds_per_chunk(self) -> int:
        """Rows of a chunk, at most: a step each, or two steps of the first generation."""
        return self.chunk_steps if self.conv_channels else -(-self.chunk_steps // 2)

    def for_tp(self, tp_size: int) -> OmniAudioConfig:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class Qwen2OmniAudioEncoder(ConvEncoder):
    """The first generation: two convolutions over time, and the mean of every two steps."""

    def __init__(self, c: OmniAudioConfig) -> None:
        super().__init__(c.tower, c.num_mel_bins)
        self.project = weight(c.tower.hidden_size, c.output_dim, axes=("embed", "embed_out"))
        self.project_bias = weight(c.output_dim, axes=("embed_out",))

    def encode(self, features: Mapping[str, jax.Array]) -> jax.Array:
        """[R, out] of `ChunkConfig.features` [U, ...] and `ChunkConfig.picks` [R, ...]."""
        length, step = features["audio_frames"], features["step_index"]
        x = mask_after(
            self.conv1_frames(features["mel"], pad=1), length
        )  # after the sound is nothing, not the echo of silence
        x = self.conv2_steps(x, pad=1)
        x = _blocks(self, x, jnp.arange(len(x), dtype=jnp.int32), conv_length(length, 1))
        x = (jnp.take(x, step, axis=0, mode="clip") + jnp.take(x, step + 1, axis=0, mode="clip")) / 2
        return self.final_norm(x) @ self.project[...] + self.project_bias[...]


class Qwen3OmniAudioEncoder(Encoder):
    """The second generation: three convolutions over frequency and time, and windows of several chunks."""

    def __init__(self, c: OmniAudioConfig) -> None:
        super().__init__(c.tower)
        d, n, bins = c.tower.hidden_size, c.conv_channels, conv_length(c.num_mel_bins, 3)
        kernel = ("kernel", "kernel", "patch", "embed")
        self.conv1 = weight(3, 3, 1, n, axes=kernel)
        self.conv1_bias = weight(n, axes=("embed",))
        self.conv2 = weight(3, 3, n, n, axes=kernel)
        self.conv2_bias = weight(n, axes=("embed",))
        self.conv3 = weight(3, 3, n, n, axes=kernel)
        self.conv3_bias = weight(n, axes=("embed",))
        self.gather = weight(n * bins, d, axes=("patch", "embed"))
        self.norm = weight(d, axes=("embed",))
        self.norm_bias = weight(d, axes=("embed",))
        self.project1 = weight(d, d, axes=("embed", "mlp"))
        self.project1_bias = weight(d, axes=("mlp",))
        self.project2 = weight(d, c.output_dim, axes=("mlp", "embed"))
        self.project2_bias = weight(c.output_dim, axes=("embed",))
        self.c = c

    def encode(self, features: Mapping[str, jax.Array]) -> jax.Array:
        """[R, out] of `ChunkConfig.features` [U, ...] and `ChunkConfig.picks` [R, ...]."""
        mel = features["mel"].astype(self.conv1.dtype)
        x = jax.lax.map(lambda of: self._convolved(*of), (mel, features["num_frames"]), batch_size=CONV_BATCH)
        x = _blocks(self, x @ self.gather[...], features["window_ids"], conv_length(features["audio_frames"], 3))
        x = jnp.take(x, features["step_index"], axis=0, mode="clip")
        x = layer_norm(x, self.norm[...], self.norm_bias[...], EPS)
        x = ACTIVATIONS[self.c.tower.act](self.project1.einsum("rd,df->rf", x) + self.project1_bias[...])
        return self.project2.einsum("rf,fd->rd", x) + self.project2_bias[...]

    def _convolved(self, mel: jax.Array, extent: jax.Array) -> jax.Array:
        """One chunk [t, bins], of which the first `extent` frames exist: [t / 8, channels * bins / 8]."""
        x = mask_after(mel[None, :, :, None], extent[None])
        kernels = ((self.conv1, self.conv1_bias), (self.conv2, self.conv2_bias), (self.conv3, self.conv3_bias))
        for times, (kernel, bias) in enumerate(kernels, 1):
            axes = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel[...], (2, 2), ((1, 1), (1, 1)), dimension_numbers=axes)
            x = mask_after(gelu(x + bias[...]), conv_length(extent[None], times))
        return x[0].swapaxes(1, 2).reshape(x.shape[1], -1)  # channel by channel, as the weights after it are stored


def _blocks(tower: Encoder, x: jax.Array, window: jax.Array, length: jax.Array) -> jax.Array:
    """[U * t, C]: positions added to x [U, t, C], and all blocks. Chunks of equal `window` i32[U], negative for none,
    attend to each other's first `length` i32[U] steps."""
    units, steps, width = x.shape
    x = x + jnp.asarray(sinusoids(steps, width), x.dtype)
    own = jnp.where(length_mask(length, steps), 0, 1)  # padding keeps to itself
    return tower(x.reshape(-1, width), (2 * window[:, None] + own).reshape(units * steps))


def mask_after(x: jax.Array, length: jax.Array) -> jax.Array:
    """x [U, t, ...] with zeros after the first `length` i32[U] of t."""
    kept = length_mask(length, x.shape[1])
    return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def length_mask(length: jax.Array, steps: int) -> jax.Array:
    """bool[U, steps]: the first length[u] of each chunk."""
    return jnp.arange(steps, dtype=jnp.int32) < length[:, None]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed positions, sines beside cosines, with time scales from 1 to 10000: f32[length, width]."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
