"""The interfaces of a family's configuration and of its model, as the loader and the engine use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from jaxtyping import Array, Float, Float32, Int

from mmjax.batch import Batch, KVCache
from mmjax.nn.encoder import Features
from mmjax.spec import ModelSpec

ConfigT = TypeVar("ConfigT", bound="Config")  # not Self: beartype resolves it only in a class that it decorates


class Config(Protocol):
    """A family's configuration: the sizes that the model is declared with."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and the other *config.json files by name. tied: whether the head is the embedding. Raises
        ValueError for what the family does not support."""
        ...

    @property
    def spec(self) -> ModelSpec: ...

    def for_tp(self: ConfigT, tp_size: int) -> ConfigT:
        """The same sizes, padded to divide over `tp_size` devices."""
        ...

    def for_max_len(self: ConfigT, max_model_len: int) -> ConfigT:
        """The configuration for sequences of at most `max_model_len` tokens, on which rotary frequencies may depend."""
        ...


class Model(Protocol):
    """A family's model. All methods are called inside jit."""

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
        """Embeddings of media. name, features: an encoder of `ModelSpec.encoders`, and its fields. An encoder-decoder
        returns hidden states, `keys_per_input` for each input."""
        ...


class CrossModel(Model, Protocol):
    """An encoder-decoder."""

    def write_cross_kv(self, encoded: Float[Array, "U D"], kv_cache: KVCache, slot_mapping: Int[Array, "U"]) -> KVCache:
        """Write the cross-attention keys and values of `encoded`, output of `encode`, at the slots of each layer."""
        ...

    def alignment_scores(
        self, encoded: Float[Array, "U D"], token_ids: Int[Array, "T"]
    ) -> Float32[Array, "num_heads T U"]:
        """Scores of `ModelSpec.num_alignment_heads` heads of cross attention to `encoded`, output of `encode`, for each
        token of a transcript."""
        ...
