"""What the Omni thinkers have in common: a decoder that reads the rows of a vision tower and of an audio tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models import vision_language
from mmjax.models.family import Encoder, Shape
from mmjax.nn.audio_chunks import ChunkConfig, ChunkTower, SpectrumTower


@dataclasses.dataclass(frozen=True)
class Config(vision_language.Config):
    """Sizes. frames: mel frames of the longest clip that the preprocessor lets through."""

    audio: ChunkConfig
    frames: int

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        shape, a = super().shape, self.audio
        units = -(-self.frames // a.chunk)
        encoder = Encoder(
            features=a.features,
            kinds=("audio",),
            rows=a.rows,
            numbered=a.numbered,
            picks=a.picks,
            based=a.based,
            largest=units,
        )
        return dataclasses.replace(
            shape,
            encoders={**shape.encoders, "audio": encoder},
            largest_item=max(shape.largest_item, encoder.rows_of(units)),
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(
            self, text=self.text.split(ways), vision=self.vision.split(ways), audio=self.audio.split(ways)
        )


def longest(files: Mapping[str, dict[str, Any]]) -> int:
    """Mel frames of the feature extractor's window."""
    prepare = files.get("processor_config.json", {}).get("feature_extractor") or files["preprocessor_config.json"]
    return int(prepare["chunk_length"] * prepare["sampling_rate"]) // int(prepare["hop_length"])


class Model(vision_language.Model):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.audio = SpectrumTower(c.audio) if c.audio.channels else ChunkTower(c.audio)
        self.row_width = c.vision.row_width

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        if name != "audio":
            return super().encode(name, features)
        rows = self.audio.rows(features)
        return jnp.pad(rows, ((0, 0), (0, self.row_width - rows.shape[1])))  # sound has nothing to add to inner blocks
