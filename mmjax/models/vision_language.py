"""What the Qwen vision families have in common: a decoder, and a tower of patches whose rows it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mmjax.models import reader
from mmjax.models.family import Encoder, Shape
from mmjax.nn.patches import PatchConfig, PatchTower


@dataclasses.dataclass(frozen=True)
class Config(reader.Config):
    """Sizes. largest: rows of the largest item that the preprocessor lets through."""

    vision: PatchConfig
    largest: int

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        v = self.vision
        encoder = Encoder(
            features=v.features,
            kinds=("image", "video"),
            grain=v.grain,
            rows=1,
            numbered=v.numbered,
            picks=v.picks,
            based=v.based,
        )
        return dataclasses.replace(
            super().shape, slab_width=v.row_width, encoders={"vision": encoder}, largest_item=self.largest
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, text=self.text.split(ways), vision=self.vision.split(ways))


def most_pixels(prepare: Mapping[str, Any]) -> int:
    """The largest area that a preprocessor file allows; `size` and `max_pixels` both hold areas."""
    return int(prepare.get("max_pixels") or prepare["size"]["longest_edge"])


class Model(reader.Model):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = PatchTower(c.vision)

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        return self.vision(features)
