"""Base of the Omni thinkers: a decoder, a vision tower and an audio tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.hf_config import audio_options
from mmjax.models import qwen_vl
from mmjax.nn.audio.qwen_omni import OmniAudioConfig, Qwen2OmniAudioEncoder, Qwen3OmniAudioEncoder
from mmjax.nn.encoder import Features
from mmjax.processors.qwen_omni import audio_fields
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config(qwen_vl.Config):
    """Sizes. max_mel_frames: of the longest clip that the preprocessor accepts."""

    audio: OmniAudioConfig
    max_mel_frames: int

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        spec, a = super().spec, self.audio
        max_chunks = -(-self.max_mel_frames // a.chunk_frames)
        encoder = EncoderSpec(
            audio_fields(a.chunk_frames, a.num_mel_bins, a.chunk_steps, windows=a.conv_channels > 0),
            modalities=("audio",),
            embeds_per_group=a.embeds_per_chunk,
            max_item_inputs=max_chunks,
        )
        return dataclasses.replace(
            spec,
            encoders={**spec.encoders, "audio": encoder},
            max_item_embeds=max(spec.max_item_embeds, encoder.num_embeds(max_chunks)),
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(
            self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size), audio=self.audio.for_tp(tp_size)
        )


def max_mel_frames(files: Mapping[str, dict[str, Any]]) -> int:
    """Mel frames of the feature extractor's window."""
    options = audio_options(files)
    return int(options["chunk_length"] * options["sampling_rate"]) // int(options["hop_length"])


class Model(qwen_vl.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.audio = Qwen3OmniAudioEncoder(c.audio) if c.audio.conv_channels else Qwen2OmniAudioEncoder(c.audio)
        self.mm_embed_dim = c.vision.mm_embed_dim

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        if name != "audio":
            return super().encode(name, features)
        embeds = self.audio.encode(features)
        return jnp.pad(embeds, ((0, 0), (0, self.mm_embed_dim - embeds.shape[1])))  # audio has no DeepStack embeddings
