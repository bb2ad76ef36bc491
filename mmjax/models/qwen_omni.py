"""What the Omni thinkers have in common: a decoder that reads the rows of a vision tower and of an audio tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models import qwen_vl
from mmjax.nn.audio.qwen_omni import OmniAudioConfig, Qwen2OmniAudioEncoder, Qwen3OmniAudioEncoder
from mmjax.processors.qwen_omni import audio_fields
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config(qwen_vl.Config):
    """Sizes. frames: mel frames of the longest clip that the preprocessor lets through."""

    audio: OmniAudioConfig
    max_mel_frames: int

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        shape, a = super().spec, self.audio
        units = -(-self.max_mel_frames // a.chunk_frames)
        encoder = EncoderSpec(
            audio_fields(a.chunk_frames, a.num_mel_bins, a.chunk_steps, windows=a.conv_channels > 0),
            modalities=("audio",),
            embeds_per_group=a.embeds_per_chunk,
            max_item_inputs=units,
        )
        return dataclasses.replace(
            shape,
            encoders={**shape.encoders, "audio": encoder},
            max_item_embeds=max(shape.max_item_embeds, encoder.num_embeds(units)),
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(
            self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size), audio=self.audio.for_tp(tp_size)
        )


def max_mel_frames(files: Mapping[str, dict[str, Any]]) -> int:
    """Mel frames of the feature extractor's window."""
    prepare = files.get("processor_config.json", {}).get("feature_extractor") or files["preprocessor_config.json"]
    return int(prepare["chunk_length"] * prepare["sampling_rate"]) // int(prepare["hop_length"])


class Model(qwen_vl.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.audio = Qwen3OmniAudioEncoder(c.audio) if c.audio.conv_channels else Qwen2OmniAudioEncoder(c.audio)
        self.row_width = c.vision.mm_embed_dim

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        if name != "audio":
            return super().encode(name, features)
        rows = self.audio.encode(features)
        return jnp.pad(rows, ((0, 0), (0, self.row_width - rows.shape[1])))  # sound has nothing to add to inner blocks
