"""How a parameter is declared, its shape and its logical axes, and how it is read when it is kept in int8."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight in int8 steps, `scale` each: i8[...], and one scale per output channel (length 1 along the inputs)."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


WeightValue = jax.Array | QuantizedArray


class Weight(nnx.Param[Any]):
    """A parameter; `[...]` is its value, however it is kept."""

    @property
    def stored(self) -> Any:
        """The array, or the `Quantised`, for those who pass it on to `product`."""
        return self.get_value()

    def __getitem__(self, key: Any) -> Any:
        return dequantize(self.stored)[key] if isinstance(self.stored, QuantizedArray) else super().__getitem__(key)

    def einsum(self, spec: str, x: jax.Array, **kwargs: Any) -> jax.Array:
        """`jnp.einsum(spec, x, weight)`."""
        return weight_einsum(spec, x, self.stored, **kwargs)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` i32[T] of the table, each id brought into its range: [T, ...]."""
        table = self[...]
        if table.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
            return jnp.take(table, ids, axis=0, mode="clip")
        # As integers: XLA:CPU, which cannot gather bfloat16, would convert the whole table each time. And it would take
        # that view of the table for work to do ahead of a loop, a copy, were it not tied to the ids.
        table, ids = jax.lax.optimization_barrier((table, ids))
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
        return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), jnp.bfloat16)


def dequantize(value: WeightValue) -> jax.Array:
    """The weight as an array."""
    return value.values.astype(value.scale.dtype) * value.scale if isinstance(value, QuantizedArray) else value


def index_value(value: Any, index: jax.Array) -> Any:
    """`kept[index]`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), value)


def weight_einsum(equation: str, x: jax.Array, value: WeightValue, **kwargs: Any) -> jax.Array:
    """`jnp.einsum(spec, x, weight)`, in x's dtype. An x wider than the weight is rounded to the weight's dtype first.

    The scales of int8 are applied to what comes out: XLA:GPU reads int8 memory in a product whose weight is converted,
    but writes out the whole weight first if it is multiplied too.
    """
    if not isinstance(value, QuantizedArray):
        if value.dtype == x.dtype:
            return jnp.einsum(equation, x, value, **kwargs)
        return jnp.einsum(equation, x.astype(value.dtype), value, **{"preferred_element_type": x.dtype} | kwargs)
    out = jnp.einsum(equation, x, value.values.astype(x.dtype), **kwargs)
    names, result = equation.split(",")[1].split("->")
    scale = jnp.einsum(f"{names}->{''.join(name for name in result if name in names)}", value.scale)
    scale = jnp.expand_dims(scale, [i for i, name in enumerate(result) if name not in names])
    return out * scale.astype(out.dtype)


def weight(*shape: int, axes: tuple[str, ...], dtype: DTypeLike = jnp.float32) -> Weight:
    """Declare a parameter: shape and logical axes side by side, no storage.

    `axes` names one logical axis per dimension; `sharding.RULES` says where each lies on the mesh.
    Raises ValueError when the two lengths differ.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} has {len(shape)} dimensions but axes={axes}")
    return Weight(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a weight of these axes is read through `Weight.einsum`, `product` and `Weight.look_up` alone. Those of
    experts are passed on whole."""
    return "experts" not in axes and bool(contracted_axes(axes))


def quantize(value: jax.Array, contracted: tuple[int, ...]) -> QuantizedArray:
    """Round to int8, -127 to 127 over the largest magnitude of each output channel; `inputs`: the axes summed over."""
    exact = value.astype(jnp.float32)
    most = jnp.max(jnp.abs(exact), axis=contracted, keepdims=True)
    # rounded to what it is kept in before it is used, and never zero: channels of padding are all zero
    scale = jnp.where(most > 0, most / 127, 1.0).astype(value.dtype)
    steps = jnp.round(exact / scale.astype(jnp.float32)).clip(-127, 127)
    return QuantizedArray(steps.astype(jnp.int8), scale)


def contracted_axes(axes: tuple[str, ...]) -> tuple[int, ...]:
    """The dimensions that a product with this weight sums over, from its logical axes; () for what is no such weight.

    A weight leads from the width to heads, a feed-forward or the vocabulary, or back; experts and layers are apart.
    """
    inner = {"kv_heads", "heads", "mlp", "expert_mlp", "vocab"} & set(axes)
    if "embed" not in axes or not inner:
        return ()
    width = axes.index("embed")
    if axes[-1] != "embed" or "vocab" in inner:
        return (width,)
    return tuple(i for i, axis in enumerate(axes) if axis not in ("embed", "depth", "experts"))
