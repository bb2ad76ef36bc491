"""What the Qwen vision families have in common: a decoder, and a tower of patches whose rows it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Encoder, Shape
from mmjax.nn.decoder import Decoder, DecoderConfig
from mmjax.nn.patches import PatchConfig, PatchTower


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. largest: rows of the largest item that the preprocessor lets through."""

    text: DecoderConfig
    vision: PatchConfig
    largest: int

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        t, v = self.text, self.vision
        encoder = Encoder(
            features=v.features,
            kinds=("image", "video"),
            grain=v.grain,
            rows=1,
            numbered=v.numbered,
            picks=v.picks,
            based=v.based,
        )
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
            rope_rows=t.rope.rows,
            slab_width=v.row_width,
            encoders={"vision": encoder},
            largest_item=self.largest,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, text=self.text.split(ways), vision=self.vision.split(ways))


def most_pixels(prepare: Mapping[str, Any]) -> int:
    """The largest area that a preprocessor file allows; `size` and `max_pixels` both hold areas."""
    return int(prepare.get("max_pixels") or prepare["size"]["longest_edge"])


class Model(nnx.Module):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)
        self.vision = PatchTower(c.vision)

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        return self.vision(features)
