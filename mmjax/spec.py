"""The sizes and input fields of a model, which processor, engine and model share. Free of jax: host code imports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class FeatureField:
    """One input array of an encoder, as a processor makes it and a model reads it.

    The array is [n, *shape] of `dtype`. axis: whether n counts the item's encoder inputs (patches, crops, chunks) or,
    for arrays that say what each embedding is made from, its embeddings. Items are packed end to end into one array,
    which is padded with `pad`. is_segment_id: holds segment ids, which count from 0 in each item and are renumbered in
    a batch, so that no two items share one. index_stride: not 0 if it holds indices into an array that has index_stride
    elements per encoder input; those >= 0 grow by index_stride per input packed before the item.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "int32"
    pad: int = 0
    axis: Literal["inputs", "embeds"] = "inputs"
    is_segment_id: bool = False
    index_stride: int = 0


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """The sizes of a media encoder's input and output.

    fields: its input arrays. modalities: those that it encodes. group_size: inputs come in multiples of this (four
    patches make one embedding). embeds_per_group: embeddings per group of inputs, or their maximum if fields say what
    each is made from; 0 for an encoder whose output is read through cross attention. keys_per_input: keys per input
    that cross attention reads, else 0. max_item_inputs: inputs of the largest item that the default preprocessing
    yields, if they do not follow from ModelSpec.max_item_embeds.
    """

    fields: tuple[FeatureField, ...]
    modalities: tuple[str, ...]
    group_size: int = 1
    embeds_per_group: int = 0
    keys_per_input: int = 0
    max_item_inputs: int = 0

    @property
    def gathers_embeds(self) -> bool:
        """Whether fields say what each embedding is made from. The number of inputs then does not determine the number
        of embeddings (crops with margins, clips of any length)."""
        return any(field.axis == "embeds" for field in self.fields)

    def num_embeds(self, num_inputs: int) -> int:
        """Embeddings of `num_inputs` inputs; the maximum if `gathers_embeds`."""
        return num_inputs // self.group_size * self.embeds_per_group


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes from which the engine makes the KV cache, the mm_embeds buffer and the programs of a step.

    encoders: by name, which the family chooses. is_encoder_decoder: whether the decoder reads the (one) encoder through
    cross attention. max_item_embeds: embeddings of the largest item that the default preprocessing yields. pooling:
    whether it returns hidden states instead of tokens. num_alignment_heads: heads of cross attention that tell when
    each token is spoken.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    max_positions: int
    rope_axes: int = 1
    mm_embed_dim: int = 0
    encoders: Mapping[str, EncoderSpec] = dataclasses.field(default_factory=dict)
    is_encoder_decoder: bool = False
    max_item_embeds: int = 0
    pooling: bool = False
    num_alignment_heads: int = 0

    @property
    def cross_len(self) -> int:
        """Keys that cross attention reads per sequence; 0 for a decoder-only model."""
        return sum(encoder.keys_per_input for encoder in self.encoders.values()) if self.is_encoder_decoder else 0

    def encoder_of(self, modality: str) -> str:
        """The name of the encoder of this modality."""
        return next(name for name, encoder in self.encoders.items() if modality in encoder.modalities)


def conv_length(length: Any, num_convs: int = 1) -> Any:
    """The output length of `num_convs` convolutions of stride 2, kernel 3 and padding 1. length: int or integer
    array."""
    return -(-length // 2**num_convs)
