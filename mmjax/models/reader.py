"""What all families but Whisper have in common: a decoder that reads tokens and, among them, the rows of media."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Shape
from mmjax.nn.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decoder; a family adds those of its towers."""

    text: DecoderConfig

    @property
    def shape(self) -> Shape:
        """Sizes for the engine, of text alone; a family adds what its towers eat and yield."""
        t = self.text
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
            rope_rows=t.rope.rows,
        )


class Model(nnx.Module):
    """See `mmjax.models.family.Model`; `encode` is the family's."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)
