"""What the engine calls of a family's configuration and of its module."""

from __future__ import annotations

from typing import Protocol, TypeVar

from jaxtyping import Array, Float, Float32, Int

from mmjax.batch import Batch, KVCache
from mmjax.nn.encoder import Features
from mmjax.spec import ModelSpec

AnyConfig = TypeVar("AnyConfig", bound="Config")  # not Self: beartype knows it only where a class is decorated whole


class Config(Protocol):
    """A family's configuration: the sizes that the model is declared with."""

    @property
    def spec(self) -> ModelSpec: ...

    def for_tp(self: AnyConfig, tp_size: int) -> AnyConfig:
        """The configuration whose sharded sizes divide over `tp_size` devices."""
        ...

    def for_max_len(self: AnyConfig, max_model_len: int) -> AnyConfig:
        """The configuration for sequences of at most `max_model_len` tokens: rotary frequencies may depend on it."""
        ...


class Model(Protocol):
    """What a family's module offers. All are called inside jit."""

    def __call__(
        self, batch: Batch, kv_cache: KVCache, mm_embeds: Float[Array, "M W"]
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """Hidden states after the final norm, and the cache with the batch's keys and values written.

        mm_embeds: the embeddings that `batch.mm_index` refers to.
        """
        ...

    def logits(self, hidden: Float[Array, "S D"]) -> Float32[Array, "S V"]:
        """Logits over the vocabulary."""
        ...

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        """Embeddings of media, from the fields of the named encoder of `ModelSpec.encoders`. For cross attention:
        hidden states, `keys_per_input` for each input."""
        ...


class CrossModel(Model, Protocol):
    """An encoder-decoder."""

    def write_cross_kv(self, encoded: Float[Array, "U D"], kv_cache: KVCache, slot_mapping: Int[Array, "U"]) -> KVCache:
        """Write every layer's cross-attention keys and values of what `encode` returned, at the layer's slots."""
        ...
