"""What the engine asks of a family's configuration and of its module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import jax

from mmjax.batch import Batch, KVCache
from mmjax.spec import ModelSpec


class Config(Protocol):
    """A family's configuration: the sizes that the model is declared with."""

    @property
    def spec(self) -> ModelSpec: ...

    def for_tp(self, tp_size: int) -> Self:
        """The configuration whose sharded sizes divide over `tp_size` devices."""
        ...

    def for_max_len(self, max_model_len: int) -> Self:
        """The configuration for sequences of at most `max_model_len` tokens: rotary frequencies may depend on it."""
        ...


class Model(Protocol):
    """What a family's module offers. All are called inside jit."""

    def __call__(self, batch: Batch, kv_cache: KVCache, mm_embeds: jax.Array) -> tuple[jax.Array, KVCache]:
        """Hidden states [T, D] after the final norm, and the cache with the batch's keys and values written."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[S, D] to f32[S, V]."""
        ...

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        """Embeddings [E, W] of the named encoder's fields, which `ModelSpec.encoders` lists; for cross attention hidden
        states [inputs * keys_per_input, D]."""
        ...


class CrossModel(Model, Protocol):
    """An encoder-decoder."""

    def write_cross_kv(self, encoded: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array) -> KVCache:
        """Write every layer's cross-attention keys and values at slot_mapping i32[inputs * keys_per_input]."""
        ...
