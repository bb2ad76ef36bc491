"""Reads the parameters of a checkpoint, brings them to their shapes and dtypes, and puts them on the devices."""

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
from jax.sharding import Mesh, NamedSharding

from mmjax import sharding
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.precision import Precision
from mmjax.models import Family
from mmjax.models.base import Config
from mmjax.nn.weight import QuantizedArray, contracted_axes, is_matrix, quantize

TEXT, EMBEDDING = "text.", "text.embed"  # paths of every family's language model and of its embedding
ProgressBar = Callable[[Iterator[Any], int], Iterator[Any]]
"""Shows a progress bar over an iterator of this many items."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists: its shape and its logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def param_specs(family: Family, config: Config) -> tuple[nnx.GraphDef[Any], dict[str, ParamSpec]]:
    """The graph of the family's module, and its parameters by dotted path. Allocates nothing."""
    graph, state = nnx.split(family.model(config))
    specs = {}
    for path, param in nnx.to_flat_state(state):
        specs[".".join(map(str, path))] = ParamSpec(tuple(param.get_value().shape), tuple(param.axes))
    return graph, specs


def load_params(
    checkpoint: Checkpoint,
    config: Config,
    mesh: Mesh,
    precision: Precision,
    *,
    dummy_seed: int | None = None,
    int8: bool = False,
    text_only: bool = False,
    progress: ProgressBar = lambda items, total: items,
) -> tuple[nnx.GraphDef[Any], Config, dict[str, jax.Array | QuantizedArray]]:
    """(graph, configuration as split over the mesh, parameters on the mesh by path).

    dummy_seed: make random weights of this seed and read none. int8: store the matrices of the language model in int8;
    only one at a time is on the devices in both forms. text_only: leave everything but the language model off the
    devices; no program may use it.
    """
    tp_size = sharding.tp_size(mesh)
    split = config.for_tp(tp_size)
    graph, specs = param_specs(checkpoint.family, split)

    def dtype_of(path: str) -> jnp.dtype:
        multiplied = is_matrix(specs[path].axes) and not (int8 and is_int8_param(path, specs[path]))
        return jnp.dtype(precision.matmul_dtype if multiplied and precision.matmul_dtype else precision.compute_dtype)

    def is_left_out(path: str) -> bool:
        return text_only and not path.startswith(TEXT)

    empty = ParamSpec((0,), ("size_1",))
    params: dict[str, jax.Array | QuantizedArray] = {}
    if dummy_seed is not None:
        for path, spec in progress(iter(specs.items()), len(specs)):
            shape = empty if is_left_out(path) else spec
            array = random_param(path, shape, mesh, dtype_of(path), dummy_seed)
            params[path] = store_param(path, spec, array, mesh, int8=int8)
        return graph, split, params
    _, stored = param_specs(checkpoint.family, config)
    values = checkpoint.param_values({path: spec.shape for path, spec in stored.items()})
    for path, value in progress(values, len(stored)):
        spec = specs[path]
        if is_left_out(path):
            placement = sharding.named_sharding(mesh, empty.axes)
            params[path] = jnp.zeros(empty.shape, jnp.dtype(precision.compute_dtype), device=placement)
            continue
        rounded = fit_to_mesh(value, stored[path], spec).astype(jnp.dtype(precision.weight_dtype), copy=False)
        array = jax.device_put(rounded.astype(dtype_of(path), copy=False), sharding.named_sharding(mesh, spec.axes))
        params[path] = store_param(path, spec, array, mesh, int8=int8)
    return graph, split, params


def store_param(path: str, spec: ParamSpec, array: jax.Array, mesh: Mesh, *, int8: bool) -> jax.Array | QuantizedArray:
    """A parameter as it is stored: unchanged, or in int8 if it is a matrix of the language model.

    The embedding is stored unchanged: its rows are looked up, and it may be the head as well.
    """
    if not (int8 and is_int8_param(path, spec)):
        return array
    inputs = contracted_axes(spec.axes)
    scale_axes = tuple("size_1" if i in inputs else axis for i, axis in enumerate(spec.axes))
    placements = (sharding.named_sharding(mesh, axes) for axes in (spec.axes, scale_axes))
    quantized = _quantizer(inputs, *placements)(array)
    return jax.block_until_ready(quantized)  # or the next parameters would be sent before `array` is freed


def is_int8_param(path: str, spec: ParamSpec) -> bool:
    """Whether quantization to int8 applies to a parameter."""
    return path.startswith(TEXT) and path != EMBEDDING and bool(contracted_axes(spec.axes))


@functools.cache
def _quantizer(inputs: tuple[int, ...], values: Any, scale: Any) -> Callable[[jax.Array], QuantizedArray]:
    """`quantize` into these shardings, which stand in a QuantizedArray as jit wants them."""
    return jax.jit(lambda array: quantize(array, inputs), out_shardings=QuantizedArray(values, scale))


def fit_to_mesh(value: np.ndarray, stored: ParamSpec, wanted: ParamSpec) -> np.ndarray:
    """Bring a stored parameter to the shape that it has on the mesh.

    Key/value heads that are fewer than the devices are repeated, each copy with its share of the query heads. Every
    other axis is padded with zeros, which no result depends on.
    """
    if stored.shape == wanted.shape:
        return value
    if "kv_heads" in wanted.axes:
        axis = wanted.axes.index("kv_heads")
        group = axis + 1
        copies = wanted.shape[axis] // stored.shape[axis]
        if stored.shape[group] != wanted.shape[group]:
            num_kv = 2 if wanted.axes[group] == "group_kv" else 0  # keys and values that lie behind the queries
            value = _repeat_kv_heads(value, axis, copies, num_kv)
    padding = [(0, want - have) for have, want in zip(value.shape, wanted.shape, strict=True)]
    return np.pad(value, padding)


def _repeat_kv_heads(value: np.ndarray, axis: int, copies: int, num_kv: int) -> np.ndarray:
    """[.., K, G + num_kv, ..] to [.., K * copies, G / copies + num_kv, ..]: queries are split among the copies, keys
    and values repeated."""
    value = np.moveaxis(value, (axis, axis + 1), (0, 1))
    heads, group = value.shape[0], value.shape[1] - num_kv
    queries = value[:, :group].reshape(heads * copies, group // copies, *value.shape[2:])
    repeated = np.repeat(value[:, group:], copies, axis=0)
    return np.moveaxis(np.concatenate([queries, repeated], axis=1), (0, 1), (axis, axis + 1))


def random_param(path: str, spec: ParamSpec, mesh: Mesh, dtype: jnp.dtype, seed: int) -> jax.Array:
    """A parameter made on the device: ones for norms, small noise otherwise."""
    is_norm = re.search(r"norm\d?$", path) is not None
    make = _random_param(spec.shape, sharding.named_sharding(mesh, spec.axes), jnp.dtype(dtype), is_norm)
    return make(np.uint32(seed), np.uint32(zlib.crc32(path.encode())))


@functools.cache
def _random_param(
    shape: tuple[int, ...], placement: NamedSharding, dtype: jnp.dtype, is_norm: bool
) -> Callable[..., jax.Array]:
    def make(seed: jax.Array, name: jax.Array) -> jax.Array:
        if is_norm:
            return jnp.ones(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), name)
        return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)

    return jax.jit(make, out_shardings=placement)
