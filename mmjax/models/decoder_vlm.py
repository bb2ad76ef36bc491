"""What all families but Whisper have in common: a decoder that reads tokens and, among them, the rows of media."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
from flax import nnx

from mmjax.batch import Batch, KVCache
from mmjax.nn.decoder import Decoder, DecoderConfig
from mmjax.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decoder; a family adds those of its towers."""

    text: DecoderConfig

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine, of text alone; a family adds what its towers eat and yield."""
        t = self.text
        return ModelSpec(
            num_layers=t.num_layers,
            num_kv_heads=t.num_kv_heads,
            head_dim=t.head_dim,
            vocab_size=t.vocab_size,
            hidden_size=t.hidden_size,
            max_positions=t.max_positions,
            rope_axes=t.rope.num_axes,
        )

    def for_max_len(self, max_model_len: int) -> Self:
        """The same model for sequences of at most `max_model_len` tokens."""
        return dataclasses.replace(self, text=self.text.for_max_len(max_model_len))


class Model(nnx.Module):
    """See `mmjax.models.base.Model`; `encode` is the family's."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)

    def __call__(self, batch: Batch, kv_cache: KVCache, mm_embeds: jax.Array) -> tuple[jax.Array, KVCache]:
        return self.text(batch, kv_cache, mm_embeds)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)
