"""Base of all families but Whisper: a decoder over token embeddings, some of which media embeddings replace."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from flax import nnx
from jaxtyping import Array, Float, Float32

from mmjax.batch import Batch, KVCache
from mmjax.nn.decoder import Decoder, DecoderConfig
from mmjax.spec import ModelSpec

ConfigT = TypeVar("ConfigT", bound="Config")  # not Self: beartype resolves it only in a class that it decorates


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decoder; a family adds those of its encoders."""

    text: DecoderConfig

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine, of the decoder alone; a family adds its encoders."""
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

    def for_max_len(self: ConfigT, max_model_len: int) -> ConfigT:
        """The same model for sequences of at most `max_model_len` tokens."""
        return dataclasses.replace(self, text=self.text.for_max_len(max_model_len))


class Model(nnx.Module):
    """See `mmjax.models.base.Model`; a family with encoders adds `encode`."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)

    def __call__(
        self, batch: Batch, kv_cache: KVCache, mm_embeds: Float[Array, "M W"]
    ) -> tuple[Float[Array, "T D"], KVCache]:
        return self.text(batch, kv_cache, mm_embeds)

    def logits(self, hidden: Float[Array, "S D"]) -> Float32[Array, "S V"]:
        return self.text.logits(hidden)
