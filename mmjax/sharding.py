"""The mesh axis of each logical axis. No other file names a mesh axis."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODEL = "model"

# A logical axis that is missing here raises KeyError, so that a typo does not silently replicate an array.
RULES: dict[str, str | None] = {
    "vocab": MODEL,
    "kv_heads": MODEL,
    "heads": MODEL,
    "mlp": MODEL,
    "experts": MODEL,
    "expert_mlp": None,
    "router": None,
    "embed": None,
    "embed_out": None,
    "group": None,
    "group_kv": None,
    "head_dim": None,
    "pair": None,
    "depth": None,
    "patch": None,
    "position": None,
    "kernel": None,
    "size_1": None,
}


def partition_spec(axes: Sequence[str]) -> P:
    """The partition of an array whose dimensions carry these logical axes."""
    names = [RULES[axis] for axis in axes]
    while names and names[-1] is None:  # P("a", None) equals P("a") but has another jit cache key
        names.pop()
    return P(*names)


def mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of one axis over which one replica of the model is split."""
    return Mesh(np.asarray(devices), (MODEL,), axis_types=(AxisType.Auto,))


def tp_size(mesh: Mesh) -> int:
    """The number of devices that the model is split over."""
    return int(mesh.shape[MODEL])


def named_sharding(mesh: Mesh, axes: Sequence[str]) -> NamedSharding:
    """The sharding of an array whose dimensions carry these logical axes."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """x, split over the current mesh by these logical axes; () is on every device whole."""
    current = jax.sharding.get_abstract_mesh()
    if current.empty or current.shape[MODEL] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def round_up(n: int, multiple: int) -> int:
    """n rounded up to a multiple: the padded size of an axis that is split over `multiple` devices."""
    return -(-n // multiple) * multiple


def map_heads(function: Any, in_axes: Sequence[Sequence[str]], out_axes: Any) -> Any:
    """`function` on the heads of each device: a shard_map over the current mesh, or `function` itself on one device.

    Attention does not mix heads, so devices do not communicate. Arrays that have no heads are arguments too, with axes
    (): one that `function` closes over belongs to another mesh, and cannot be indexed in it.
    """
    current = jax.sharding.get_abstract_mesh()
    if current.empty or current.shape[MODEL] == 1:
        return function
    is_axes = lambda x: isinstance(x, tuple) and all(isinstance(a, str) for a in x)  # noqa: E731
    return jax.shard_map(
        function,
        in_specs=tuple(partition_spec(axes) for axes in in_axes),
        out_specs=jax.tree.map(partition_spec, out_axes, is_leaf=is_axes),
        check_vma=False,
    )


def sum_over_shards(function: Any, in_axes: Sequence[Sequence[str]]) -> Any:
    """`function(shard, *args)` on each device's shard of the arguments, and the sum of its outputs.

    shard: int32 [], the index of the shard. On one device it is 0, and the sum has one term.
    """
    current = jax.sharding.get_abstract_mesh()
    if current.empty or current.shape[MODEL] == 1:
        return functools.partial(function, np.int32(0))

    def run(*args: Any) -> Any:
        return jax.lax.psum(function(jax.lax.axis_index(MODEL), *args), MODEL)

    return jax.shard_map(run, in_specs=tuple(partition_spec(axes) for axes in in_axes), out_specs=P(), check_vma=False)
