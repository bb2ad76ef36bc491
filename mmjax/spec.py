"""What the engine must know of a model before it sees a weight. NumPy only: host code and device code read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """The sizes of a media encoder's input and output.

    features: name -> (trailing shape, dtype name, padding value) of each input array; the leading axis is units.
    kinds: the modalities it encodes. grain: units come in multiples of this (four patches make one row). rows: media
    rows per `grain` units, with picks at most so many; 0 for an encoder whose output is read through cross attention.
    keys: keys per unit that cross attention reads, else 0. numbered: the features that hold segment numbers, which
    must differ from item to item. picks: like features, for an encoder whose rows do not follow from its units (crops
    with margins, clips of any length): the leading axis is the item's rows, and says of each what it is made from.
    based: features and picks that count from the item's first unit, n to a unit: where items are packed end to end,
    values >= 0 grow by n for every unit before. largest: units of the largest item that the default preprocessing
    yields, where `rows` does not tell.
    """

    features: Mapping[str, tuple[tuple[int, ...], str, int]]
    modalities: tuple[str, ...]
    group_size: int = 1
    embeds_per_group: int = 0
    keys_per_input: int = 0
    segment_fields: tuple[str, ...] = ()
    gather_fields: Mapping[str, tuple[tuple[int, ...], str, int]] = dataclasses.field(default_factory=dict)
    offset_fields: Mapping[str, int] = dataclasses.field(default_factory=dict)
    max_item_inputs: int = 0

    def num_embeds(self, num_inputs: int) -> int:
        """Media rows that `units` units yield, with picks at most."""
        return num_inputs // self.group_size * self.embeds_per_group


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes from which the engine makes the pool, the slab and the step's programs.

    encoders: by a name of the family's choice. cross: whether the decoder reads the (one) encoder through cross
    attention. largest_item: media rows of the largest item that the default preprocessing yields. pooling: whether
    hidden states are wanted of it instead of tokens.
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

    @property
    def cross_len(self) -> int:
        """Keys that cross attention reads per sequence; 0 for a decoder-only model."""
        return sum(encoder.keys_per_input for encoder in self.encoders.values()) if self.is_encoder_decoder else 0

    def encoder_of(self, modality: str) -> str:
        """The name of the encoder that takes this modality."""
        return next(name for name, encoder in self.encoders.items() if modality in encoder.modalities)
