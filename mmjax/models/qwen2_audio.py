"""Qwen2-Audio: Whisper's encoder, the mean of every two steps, a dense layer, and Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.models import decoder_vlm
from mmjax.nn.audio.whisper import WhisperEncoder, WhisperEncoderConfig
from mmjax.nn.encoder import Features
from mmjax.nn.text_config import ANY, decoder_config
from mmjax.nn.weight import weight
from mmjax.processors.qwen2_audio import audio_fields
from mmjax.processors.whisper_chunks import CHUNK_STEPS
from mmjax.spec import EncoderSpec, ModelSpec

ENCODER_DEFAULTS = {  # of transformers' Qwen2AudioEncoderConfig
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes."""

    audio: WhisperEncoderConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json."""
        return cls(
            text=decoder_config(config["text_config"], "qwen2", tied=tied, choice=ANY),
            audio=WhisperEncoderConfig.from_hf(ENCODER_DEFAULTS | config["audio_config"]),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        a = self.audio
        encoder = EncoderSpec(
            audio_fields(a.num_mel_bins),
            modalities=("audio",),
            embeds_per_group=CHUNK_STEPS // 2,
            max_item_inputs=-(-a.window_steps // CHUNK_STEPS),
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=self.text.hidden_size,
            encoders={"audio": encoder},
            max_item_embeds=a.window_steps // 2,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), audio=self.audio.for_tp(tp_size))


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.audio = WhisperEncoder(c.audio)
        self.project = weight(c.audio.tower.hidden_size, c.text.hidden_size, axes=("embed", "embed_out"))
        self.project_bias = weight(c.text.hidden_size, axes=("embed_out",))

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        x, step = self.audio.encode_chunks(features), features["step_index"]
        with jax.named_scope("projector"):
            x = (jnp.take(x, step, axis=0, mode="clip") + jnp.take(x, step + 1, axis=0, mode="clip")) / 2
            return self.audio.final_norm(x) @ self.project[...] + self.project_bias[...]
