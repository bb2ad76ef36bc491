"""Ultravox: Whisper's encoder, a gated projector of eight stacked steps to an embedding, and Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmjax.models import decoder_vlm
from mmjax.nn.audio.whisper import WhisperEncoder, WhisperEncoderConfig
from mmjax.nn.encoder import Features
from mmjax.nn.norm import rms_norm
from mmjax.nn.text_config import ANY, decoder_config
from mmjax.nn.weight import weight
from mmjax.processors.ultravox import audio_fields
from mmjax.processors.whisper_chunks import CHUNK_STEPS
from mmjax.spec import EncoderSpec, ModelSpec

EPS = 1e-6  # of the projector's norms; config.json does not name it
MIN_WINDOWS = 4  # windows of the longest clip that fits in every configuration: 2 minutes


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. stack_factor: encoder steps per embedding. projector_dim: inner width of the projector, gate included.
    norm_before_last: whether the projector's second norm is before its last layer (since v0.5) or after it."""

    audio: WhisperEncoderConfig
    stack_factor: int
    projector_dim: int
    norm_before_last: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json with the configs of its two parts in it. Raises ValueError for what is not
        supported."""
        act = config.get("projector_act", "swiglu")
        if act != "swiglu":
            raise ValueError(f"config.json: projector_act {act!r} is not supported: 'swiglu' is")
        return cls(
            text=decoder_config(config["text_config"], "llama", tied=tied, choice=ANY),
            audio=WhisperEncoderConfig.from_hf(config["audio_config"]),
            stack_factor=config["stack_factor"],
            projector_dim=config["hidden_size"],
            norm_before_last=config.get("projector_ln_mid", False),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        a = self.audio
        encoder = EncoderSpec(
            audio_fields(a.num_mel_bins),
            modalities=("audio",),
            embeds_per_group=-(-CHUNK_STEPS // self.stack_factor),
            max_item_inputs=MIN_WINDOWS * -(-a.window_steps // CHUNK_STEPS),
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=self.text.hidden_size,
            encoders={"audio": encoder},
            max_item_embeds=MIN_WINDOWS * -(-a.window_steps // self.stack_factor),
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), audio=self.audio.for_tp(tp_size))


class Projector(nnx.Module):
    """Norm, dense layer, SwiGLU, dense layer; a second norm before the last or after it."""

    def __init__(self, c: Config) -> None:
        stacked, half = c.audio.tower.hidden_size * c.stack_factor, c.projector_dim // 2
        self.norm1 = weight(stacked, axes=("embed",))
        self.fc1 = weight(stacked, 2, half, axes=("embed", "pair", "embed_out"))
        self.norm2 = weight(half if c.norm_before_last else c.text.hidden_size, axes=("embed",))
        self.fc2 = weight(half, c.text.hidden_size, axes=("embed", "embed_out"))
        self.norm_before_last = c.norm_before_last

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "E stacked"]) -> Float[Array, "E D"]:
        """Embeddings of stacked steps. The second half is the gate; in Llama, the first half is."""
        y = jnp.einsum("ec,cph->eph", rms_norm(x, self.norm1[...], EPS), self.fc1[...])
        y = y[:, 0] * jax.nn.silu(y[:, 1])
        if self.norm_before_last:
            return rms_norm(y, self.norm2[...], EPS) @ self.fc2[...]
        return rms_norm(y @ self.fc2[...], self.norm2[...], EPS)


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.audio = WhisperEncoder(c.audio)
        self.projector = Projector(c)
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        x = self.audio.final_norm(self.audio.encode_chunks(features))
        offset = jnp.arange(self.c.stack_factor, dtype=jnp.int32)
        x = jnp.take(x, features["step_index"][:, None] + offset, axis=0, mode="clip")
        x = jnp.where((offset < features["num_steps"][:, None])[..., None], x, jnp.zeros((), x.dtype))
        return self.projector(x.reshape(len(x), -1))
