"""Parameters: declared by shape and logical axes, stored as floats or in int8."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8

from mmjax.kernels import current_platform
from mmjax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check  # jax also constructs it with shapes or shardings instead of arrays
class QuantizedArray:
    """An int8 weight: values * scale, with one scale per output channel (length 1 along the contracted axes).

    last: the contracted axes, where `values` has them after all others; () where it has the weight's own order.
    """

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    last: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.values.shape[: -len(self.last) or None])
        for axis, size in zip(self.last, self.values.shape[len(shape) :], strict=True):
            shape.insert(axis, size)
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


WeightValue = Float[Array, "..."] | QuantizedArray


class Weight(nnx.Param[Any]):
    """A parameter; `[...]` is its value, dequantized if it is stored in int8."""

    @property
    def stored(self) -> Any:
        """The array or the `QuantizedArray`, to be passed to `weight_einsum`."""
        return self.get_value()

    def __getitem__(self, key: Any) -> Any:
        return dequantize(self.stored)[key] if isinstance(self.stored, QuantizedArray) else super().__getitem__(key)

    def einsum(self, equation: str, x: Float[Array, "..."], **kwargs: Any) -> Float[Array, "..."]:
        """`jnp.einsum(equation, x, weight)`; see `weight_einsum`."""
        return weight_einsum(equation, x, self.stored, **kwargs)

    def logits(self, hidden: Float[Array, "S D"], vocab_size: int) -> Float32[Array, "S V"]:
        """Logits over a vocabulary, of a head that may be padded. On every device whole.

        What the devices exchange are the logits: else XLA gathers the head, 1 GiB in each step of a 7B model.
        """
        out = self.einsum("sd,vd->sv", hidden, preferred_element_type=jnp.float32)
        return constrain(constrain(out, ("position", "vocab")), ())[:, :vocab_size]

    def lookup(self, ids: Int[Array, "T"]) -> Float[Array, "T ..."]:
        """Rows of an embedding matrix; ids are clipped to its range."""
        table = self[...]
        if table.dtype != jnp.bfloat16 or current_platform() != "cpu":
            return jnp.take(table, ids, axis=0, mode="clip")
        # Gather integers: XLA:CPU cannot gather bfloat16, and would convert the whole table each time. The barrier ties
        # the integer view to the ids. Without it, XLA would hoist the view out of loops as a copy of the table.
        table, ids = jax.lax.optimization_barrier((table, ids))
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
        return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), jnp.bfloat16)


def dequantize(value: WeightValue) -> Float[Array, "..."]:
    """The weight as an array."""
    if not isinstance(value, QuantizedArray):
        return value
    values = jnp.moveaxis(value.values, range(-len(value.last), 0), value.last)
    return values.astype(value.scale.dtype) * value.scale


def index_value(value: WeightValue, index: Int[Array, ""]) -> WeightValue:
    """`value[index]`, of a weight in its own order."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), value)


def weight_einsum(equation: str, x: Float[Array, "..."], value: WeightValue, **kwargs: Any) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, weight)`, in x's dtype. A wider x is rounded to the weight's dtype first.

    The scales of an int8 weight are applied to the output. XLA:GPU fuses the conversion of a weight into the product,
    but if the weight is also multiplied by its scales, it first writes the whole result to memory.
    """
    if not isinstance(value, QuantizedArray):
        if value.dtype == x.dtype:
            return jnp.einsum(equation, x, value, **kwargs)
        return jnp.einsum(equation, x.astype(value.dtype), value, **{"preferred_element_type": x.dtype} | kwargs)
    left, names, result = re.split(",|->", equation)
    stored = "".join(name for i, name in enumerate(names) if i not in value.last)
    stored += "".join(names[i] for i in value.last)
    out = jnp.einsum(f"{left},{stored}->{result}", x, value.values.astype(x.dtype), **kwargs)
    scale = jnp.einsum(f"{names}->{''.join(name for name in result if name in names)}", value.scale)
    scale = jnp.expand_dims(scale, [i for i, name in enumerate(result) if name not in names])
    return out * scale.astype(out.dtype)


def weight(*shape: int, axes: tuple[str, ...], dtype: DTypeLike = jnp.float32) -> Weight:
    """Declare a parameter by its shape and logical axes, without storage.

    axes: one logical axis per dimension; `sharding.RULES` maps each to the mesh. Raises ValueError when the two lengths
    differ.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} has {len(shape)} dimensions but axes={axes}")
    return Weight(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether the model reads a weight of these axes only through `Weight.einsum`, `weight_einsum` and `Weight.lookup`.
    It passes the weights of experts on whole."""
    return "experts" not in axes and bool(contracted_axes(axes))


def quantize(value: Float[Array, "..."], contracted: tuple[int, ...], *, move_last: bool = False) -> QuantizedArray:
    """Round to int8: in each output channel, 127 stands for the largest magnitude.

    contracted: the axes that products sum over, ascending. move_last: store them after all others.
    """
    exact = value.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=contracted, keepdims=True)
    # values are divided by the scale as it is stored; it is never zero, though padded channels are
    scale = jnp.where(largest > 0, largest / 127, 1.0).astype(value.dtype)
    values = jnp.round(exact / scale.astype(jnp.float32)).clip(-127, 127).astype(jnp.int8)
    if not move_last:
        return QuantizedArray(values, scale)
    return QuantizedArray(jnp.moveaxis(values, contracted, range(-len(contracted), 0)), scale, contracted)


def contracted_axes(axes: tuple[str, ...]) -> tuple[int, ...]:
    """The dimensions that a product with a weight of these logical axes sums over; () for a weight that is no matrix.

    A matrix maps the width to heads, to a feed-forward or to the vocabulary, or back. No product sums over experts or
    layers.
    """
    inner = {"kv_heads", "heads", "mlp", "expert_mlp", "vocab"} & set(axes)
    if "embed" not in axes or not inner:
        return ()
    width = axes.index("embed")
    if axes[-1] != "embed" or "vocab" in inner:
        return (width,)
    return tuple(i for i, axis in enumerate(axes) if axis not in ("embed", "depth", "experts"))
