"""The audio towers of the Omni families: mel frames in chunks of equal length, each convolved alone.

An input (axis I) is a chunk; the last one of a clip may be shorter. Positions count from 0 in every chunk. Axis t:
frames or steps of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from mmjax.nn.activations import ACTIVATIONS, activation_of, gelu
from mmjax.nn.audio.whisper import EPS, ConvEncoder
from mmjax.nn.encoder import Encoder, EncoderConfig, Features
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight
from mmjax.spec import conv_length

CONV_BATCH = 32  # chunks per convolution; in the published model, each takes 6 MiB of memory


@dataclasses.dataclass(frozen=True)
class OmniAudioConfig:
    """Sizes. chunk_frames: mel frames of a chunk. output_dim: width of an embedding.

    conv_channels: of the convolutions over frequency and time in Qwen3-Omni; 0 for Qwen2.5-Omni. window_chunks: chunks
    that attend to each other.
    """

    tower: EncoderConfig
    num_mel_bins: int
    chunk_frames: int
    output_dim: int
    conv_channels: int = 0
    window_chunks: int = 1

    @classmethod
    def from_hf(cls, audio: Mapping[str, Any]) -> OmniAudioConfig:
        """From the audio_config of Qwen2.5-Omni or Qwen3-Omni."""
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
        """Steps that the convolutions leave of a full chunk."""
        return conv_length(self.chunk_frames, self.num_strided_convs)

    @property
    def embeds_per_chunk(self) -> int:
        """Embeddings of a full chunk: one per step, or per two steps in Qwen2.5-Omni."""
        return self.chunk_steps if self.conv_channels else -(-self.chunk_steps // 2)

    def for_tp(self, tp_size: int) -> OmniAudioConfig:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class Qwen2OmniAudioEncoder(ConvEncoder):
    """Qwen2.5-Omni's: two convolutions over time, and the mean of every two steps."""

    def __init__(self, c: OmniAudioConfig) -> None:
        super().__init__(c.tower, c.num_mel_bins)
        self.project = weight(c.tower.hidden_size, c.output_dim, axes=("embed", "embed_out"))
        self.project_bias = weight(c.output_dim, axes=("embed_out",))

    def encode(self, features: Features) -> Float[Array, "E W"]:
        """Embeddings of `audio_fields` of mmjax.processors.qwen_omni."""
        length, step = features["audio_frames"], features["step_index"]
        # the next convolution must see zeros after the audio, not the output of this one for silence
        x = zero_after(self.apply_conv1(features["mel"], pad=1), length)
        x = self.apply_conv2(x, pad=1)
        x = _run_layers(self, x, jnp.arange(len(x), dtype=jnp.int32), conv_length(length, 1))
        with jax.named_scope("projector"):
            x = (jnp.take(x, step, axis=0, mode="clip") + jnp.take(x, step + 1, axis=0, mode="clip")) / 2
            return self.final_norm(x) @ self.project[...] + self.project_bias[...]


class Qwen3OmniAudioEncoder(Encoder):
    """Qwen3-Omni's: three convolutions over frequency and time, and windows of several chunks."""

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
        self.conv_out = weight(n * bins, d, axes=("patch", "embed"))
        self.norm = weight(d, axes=("embed",))
        self.norm_bias = weight(d, axes=("embed",))
        self.project1 = weight(d, d, axes=("embed", "mlp"))
        self.project1_bias = weight(d, axes=("mlp",))
        self.project2 = weight(d, c.output_dim, axes=("mlp", "embed"))
        self.project2_bias = weight(c.output_dim, axes=("embed",))
        self.c = c

    def encode(self, features: Features) -> Float[Array, "E W"]:
        """Embeddings of `audio_fields` of mmjax.processors.qwen_omni."""
        mel = features["mel"].astype(self.conv1.dtype)
        x = jax.lax.map(lambda chunk: self._convolve(*chunk), (mel, features["num_frames"]), batch_size=CONV_BATCH)
        x = _run_layers(self, x @ self.conv_out[...], features["window_ids"], conv_length(features["audio_frames"], 3))
        with jax.named_scope("projector"):
            x = jnp.take(x, features["step_index"], axis=0, mode="clip")
            x = layer_norm(x, self.norm[...], self.norm_bias[...], EPS)
            x = ACTIVATIONS[self.c.tower.act](self.project1.einsum("ed,df->ef", x) + self.project1_bias[...])
            return self.project2.einsum("ef,fd->ed", x) + self.project2_bias[...]

    @jax.named_scope("conv")
    def _convolve(self, mel: Float[Array, "t bins"], num_frames: Int[Array, ""]) -> Float[Array, "steps inner"]:
        """The steps of one chunk, whose frames after the first `num_frames` are padding."""
        x = zero_after(mel[None, :, :, None], num_frames[None])
        kernels = ((self.conv1, self.conv1_bias), (self.conv2, self.conv2_bias), (self.conv3, self.conv3_bias))
        for num_convs, (kernel, bias) in enumerate(kernels, 1):
            axes = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel[...], (2, 2), ((1, 1), (1, 1)), dimension_numbers=axes)
            x = zero_after(gelu(x + bias[...]), conv_length(num_frames[None], num_convs))
        return x[0].swapaxes(1, 2).reshape(x.shape[1], -1)  # channel-major, the order of the next weight


def _run_layers(
    tower: Encoder, x: Float[Array, "I t C"], window_ids: Int[Array, "I"], length: Int[Array, "I"]
) -> Float[Array, "U C"]:
    """The layers' output for x with positions added; U counts the steps of all chunks. The first `length` steps of each
    chunk attend to those of all chunks of the same window; padding attends to padding."""
    inputs, steps, width = x.shape
    x = x + jnp.asarray(sinusoids(steps, width), x.dtype)
    is_padding = jnp.where(length_mask(length, steps), 0, 1)
    return tower(x.reshape(-1, width), (2 * window_ids[:, None] + is_padding).reshape(inputs * steps))


def zero_after(x: Float[Array, "I t *rest"], length: Int[Array, "I"]) -> Float[Array, "I t *rest"]:
    """x with zeros after the first `length` frames or steps of each input."""
    mask = length_mask(length, x.shape[1])
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def length_mask(length: Int[Array, "I"], steps: int) -> Bool[Array, "I {steps}"]:
    """True for the first `length` steps of each input."""
    return jnp.arange(steps, dtype=jnp.int32) < length[:, None]


def sinusoids(length: int, width: int) -> Float32[np.ndarray, "{length} {width}"]:
    """Sinusoidal positions (arXiv:1706.03762), all sines before all cosines, of wavelengths from 2 pi to 20000 pi."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
