"""A checkpoint directory, or a hub id, becomes a family, its configuration and its parameters on the devices."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.precision import Precision
from mmjax.models import Family
from mmjax.nn.weight import QuantizedArray, contracted_axes, is_matrix, quantize

TEXT, EMBEDDING = "text.", "text.embed"  # where every family keeps its language model, and that one's embedding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists: its shape and its logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def param_specs(family: Family, config: Any) -> tuple[nnx.GraphDef[Any], dict[str, ParamSpec]]:
    """The module's graph and its parameters by dotted path. Nothing is allocated."""
    graph, state = nnx.split(family.model(config))
    specs = {}
    for path, param in nnx.to_flat_state(state):
        specs[".".join(map(str, path))] = ParamSpec(tuple(param.get_value().shape), tuple(param.axes))
    return graph, specs


def load_params(
    checkpoint: Checkpoint,
    config: Any,
    mesh: Mesh,
    precision: Precision,
    *,
    dummy_seed: int | None = None,
    int8: bool = False,
    text_only: bool = False,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> tuple[nnx.GraphDef[Any], Any, dict[str, jax.Array | QuantizedArray]]:
    """(graph, configuration as split over the mesh, parameters by path on the mesh).

    dummy_seed: make random weights of this seed and read none. int8: keep the matrices of the language model in int8;
    one at a time is on the devices in both forms. text_only: whatever belongs to no language model stays off the
    devices; no program may use it.
    """
    tp_size = sharding.tp_size(mesh)
    split = config.for_tp(tp_size)
    graph, specs = param_specs(checkpoint.family, split)

    def dtype_of(path: str) -> Any:
        apart = is_matrix(specs[path].axes) and not (int8 and is_int8_param(path, specs[path]))
        return jnp.dtype(precision.matmul_dtype if apart and precision.matmul_dtype else precision.compute_dtype)

    if dummy_seed is not None:
        make = progress(iter(specs.items()), len(specs))
        none = ParamSpec((0,), ("size_1",))
        kept = ((path, none if text_only and not path.startswith(TEXT) else spec) for path, spec in make)
        made = ((path, random_param(path, spec, mesh, dtype_of(path), dummy_seed)) for path, spec in kept)
        return graph, split, {path: store_param(path, specs[path], array, mesh, int8=int8) for path, array in made}
    _, stored = param_specs(checkpoint.family, config)
    params: dict[str, jax.Array | QuantizedArray] = {}
    for path, value in progress(
        checkpoint.param_values({path: spec.shape for path, spec in stored.items()}), len(stored)
    ):
        spec = specs[path]
        if text_only and not path.startswith(TEXT):
            params[path] = jnp.zeros(
                (0,), jnp.dtype(precision.compute_dtype), device=sharding.named_sharding(mesh, ("size_1",))
            )
            continue
        array = (
            fit_to_mesh(value, stored[path], spec)
            .astype(jnp.dtype(precision.weight_dtype), copy=False)
            .astype(dtype_of(path), copy=False)
        )
        params[path] = store_param(
            path, spec, jax.device_put(array, sharding.named_sharding(mesh, spec.axes)), mesh, int8=int8
        )
    return graph, split, params


def store_param(path: str, spec: ParamSpec, array: jax.Array, mesh: Mesh, *, int8: bool) -> jax.Array | QuantizedArray:
    """A parameter in the form in which it stays: as it is, or a matrix of the language model in int8.

    The embedding stays as it is: rows of it are looked up, and it may be the head as well.
    """
    if not (int8 and is_int8_param(path, spec)):
        return array
    inputs = contracted_axes(spec.axes)
    scale = tuple("size_1" if i in inputs else axis for i, axis in enumerate(spec.axes))
    kept = _quantiser(inputs, sharding.named_sharding(mesh, spec.axes), sharding.named_sharding(mesh, scale))(array)
    return jax.block_until_ready(kept)  # else the next ones would be sent before this one's first form is freed


def is_int8_param(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter is one of those that int8 is for."""
    return path.startswith(TEXT) and path != EMBEDDING and bool(contracted_axes(spec.axes))


@functools.cache
def _quantiser(inputs: tuple[int, ...], steps: Any, scale: Any) -> Callable[[jax.Array], QuantizedArray]:
    return jax.jit(lambda array: quantize(array, inputs), out_shardings=QuantizedArray(steps, scale))


def fit_to_mesh(value: np.ndarray, stored: ParamSpec, wanted: ParamSpec) -> np.ndarray:
    """Bring a stored parameter to the shape it has on the mesh.

    Key/value heads that are fewer than the devices are repeated, each copy with its share of the query heads; every
    other axis is filled up with zeros, which no result depends on.
    """
    if stored.shape == wanted.shape:
        return value
    if "kv_heads" in wanted.axes:
        axis = wanted.axes.index("kv_heads")
        group = axis + 1
        fused = wanted.axes[group] == "group_kv"
        copies = wanted.shape[axis] // stored.shape[axis]
        if stored.shape[group] != wanted.shape[group]:
            keys = 2 if fused else 0
            value = _repeat(value, axis, copies, keys)
    pad = [(0, want - have) for have, want in zip(value.shape, wanted.shape, strict=True)]
    return np.pad(value, pad)


def _repeat(value: np.ndarray, axis: int, copies: int, keys: int) -> np.ndarray:
    """[.., K, G + keys, ..] to [.., K * copies, G / copies + keys, ..]: queries are dealt out, keys repeated."""
    value = np.moveaxis(value, (axis, axis + 1), (0, 1))
    heads, group = value.shape[0], value.shape[1] - keys
    queries = value[:, :group].reshape(heads * copies, group // copies, *value.shape[2:])
    shared = np.repeat(value[:, group:], copies, axis=0)
    return np.moveaxis(np.concatenate([queries, shared], axis=1), (0, 1), (axis, axis + 1))


def random_param(path: str, spec: ParamSpec, mesh: Mesh, dtype: Any, seed: int) -> jax.Array:
    """A parameter of the right shape made on the device: ones for norms, small noise otherwise."""
    kind = "ones" if re.search(r"norm\d?$", path) else "noise"
    make = _maker(spec.shape, sharding.named_sharding(mesh, spec.axes), jnp.dtype(dtype), kind)
    return make(np.uint32(seed), np.uint32(zlib.crc32(path.encode())))


@functools.cache
def _maker(shape: tuple[int, ...], place: Any, dtype: Any, kind: str) -> Callable[..., jax.Array]:
    def make(seed: jax.Array, name: jax.Array) -> jax.Array:
        if kind == "ones":
            return jnp.ones(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), name)
        return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)

    return jax.jit(make, out_shardings=place)
