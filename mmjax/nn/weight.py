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
class Quantised:
    """A weight in int8 steps, `scale` each: i8[...], and one scale per output channel (length 1 along the inputs)."""

    steps: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps.shape

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.scale.nbytes


Kept = jax.Array | Quantised


class Weight(nnx.Param[Any]):
    """A parameter; `[...]` is its value, however it is kept."""

    @property
    def kept(self) -> Any:
        """The array, or the `Quantised`, for those who pass it on to `product`."""
        return self.get_value()

    def __getitem__(self, key: Any) -> Any:
        return full(self.kept)[key] if isinstance(self.kept, Quantised) else super().__getitem__(key)

    def einsum(self, spec: str, x: jax.Array, **kwargs: Any) -> jax.Array:
        """`jnp.einsum(spec, x, weight)`."""
        return product(spec, x, self.kept, **kwargs)

    def look_up(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` i32[T] of the table, each id brought into its range: [T, ...]."""
        table = self[...]
        if table.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
            return jnp.take(table, ids, axis=0, mode="clip")
        # As integers: XLA:CPU, which cannot gather bfloat16, would convert the whole table each time. And it would take
        # that view of the table for work to do ahead of a loop, a copy, were it not tied to the ids.
        table, ids = jax.lax.optimization_barrier((table, ids))
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
        return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), jnp.bfloat16)


def full(kept: Kept) -> jax.Array:
    """The weight as an array."""
    return kept.steps.astype(kept.scale.dtype) * kept.scale if isinstance(kept, Quantised) else kept


def part(kept: Any, index: jax.Array) -> Any:
    """`kept[index]`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), kept)


def product(spec: str, x: jax.Array, kept: Kept, **kwargs: Any) -> jax.Array:
    """`jnp.einsum(spec, x, weight)`, in x's dtype. An x wider than the weight is rounded to the weight's dtype first.

    The scales of int8 are applied to what comes out: XLA:GPU reads int8 memory in a product whose weight is converted,
    but writes out the whole weight first if it is multiplied too.
    """
    if not isinstance(kept, Quantised):
        if kept.dtype == x.dtype:
            return jnp.einsum(spec, x, kept, **kwargs)
        return jnp.einsum(spec, x.astype(kept.dtype), kept, **{"preferred_element_type": x.dtype} | kwargs)
    out = jnp.einsum(spec, x, kept.steps.astype(x.dtype), **kwargs)
    names, result = spec.split(",")[1].split("->")
    scale = jnp.einsum(f"{names}->{''.join(name for name in result if name in names)}", kept.scale)
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
    return "experts" not in axes and bool(inputs_of(axes))


def quantise(value: jax.Array, inputs: tuple[int, ...]) -> Quantised:
    """Round to int8, -127 to 127 over the largest magnitude of each output channel; `inputs`: the axes summed over."""
    exact = value.astype(jnp.float32)
    most = jnp.max(jnp.abs(exact), axis=inputs, keepdims=True)
    # rounded to what it is kept in before it is used, and never zero: channels of padding are all zero
    scale = jnp.where(most > 0, most / 127, 1.0).astype(value.dtype)
    steps = jnp.round(exact / scale.astype(jnp.float32)).clip(-127, 127)
    return Quantised(steps.astype(jnp.int8), scale)


def inputs_of(axes: tuple[str, ...]) -> tuple[int, ...]:
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
