"""What the engine must know of a model before it sees a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax

from mmjax.batch import Batch, Pool


@dataclasses.dataclass(frozen=True)
class Encoder:
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
    kinds: tuple[str, ...]
    grain: int = 1
    rows: int = 0
    keys: int = 0
    numbered: tuple[str, ...] = ()
    picks: Mapping[str, tuple[tuple[int, ...], str, int]] = dataclasses.field(default_factory=dict)
    based: Mapping[str, int] = dataclasses.field(default_factory=dict)
    largest: int = 0

    def rows_of(self, units: int) -> int:
        """Media rows that `units` units yield, with picks at most."""
        return units // self.grain * self.rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes from which the engine makes the pool, the slab and the step's programs.

    encoders: by a name of the family's choice. cross: whether the decoder reads the (one) encoder through cross
    attention. largest_item: media rows of the largest item that the default preprocessing yields. pooling: whether
    hidden states are wanted of it instead of tokens.
    """

    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    width: int
    max_len: int
    rope_rows: int = 1
    slab_width: int = 0
    encoders: Mapping[str, Encoder] = dataclasses.field(default_factory=dict)
    cross: bool = False
    largest_item: int = 0
    pooling: bool = False

    @property
    def cross_keys(self) -> int:
        """Keys that cross attention reads per sequence; 0 for a decoder-only model."""
        return sum(encoder.keys for encoder in self.encoders.values()) if self.cross else 0

    def encoder_of(self, kind: str) -> str:
        """The name of the encoder that takes this modality."""
        return next(name for name, encoder in self.encoders.items() if kind in encoder.kinds)


class Config(Protocol):
    """A family's configuration: sizes that the model is declared with."""

    @property
    def shape(self) -> Shape: ...

    def split(self, ways: int) -> Config:
        """The configuration whose sharded sizes divide over `ways` devices."""
        ...


class Model(Protocol):
    """What a family's module offers. All are called inside jit."""

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        """Hidden states [T, D] after the final norm, and the pool with the batch's keys written."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[S, D] to f32[S, V]."""
        ...

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        """Media rows [R, W] of the named encoder's features [U, ...] and picks [R, ...]; without picks
        R = U / grain * rows; for cross attention hidden states [U * keys, D]."""
        ...


class CrossModel(Model, Protocol):
    """An encoder-decoder."""

    def cross(self, encoded: jax.Array, pool: Pool, slot: jax.Array) -> Pool:
        """Write every layer's cross-attention keys and values at slot i32[units * keys]."""
        ...
