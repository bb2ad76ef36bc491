"""Loading parameters: from a checkpoint, in the shapes and dtypes of the model, onto the devices."""

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
from mmjax.converters.table import Read
from mmjax.converters.transforms import Region
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.family import Family
from mmjax.loader.precision import Precision
from mmjax.models.base import Config
from mmjax.nn.weight import QuantizedArray, contracted_axes, is_matrix, quantize

TEXT, EMBEDDING = "text.", "text.embed"  # paths of the language model and of its embedding, in every family
ProgressBar = Callable[[Iterator[Any], int], Iterator[Any]]
"""(items, their number) -> the same items, with a progress bar."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The shape and the logical axes of a parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


SKIPPED = ParamSpec((0,), ("size_1",))  # what stands for a parameter that no program uses
AbstractParam = jax.ShapeDtypeStruct | QuantizedArray


def param_specs(family: Family, config: Config) -> tuple[nnx.GraphDef[Any], dict[str, ParamSpec]]:
    """The graph of the family's module, and its parameters by dotted path. Allocates no arrays."""
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
    """(graph, configuration padded for the mesh, parameters on the mesh by path).

    dummy_seed: generate random weights from this seed and read none. int8: store the matrices of the language model in
    int8; at most one at a time is on the devices in both forms. text_only: load the language model only; no program may
    use another parameter.
    """
    padded, graph, specs = _on_mesh(checkpoint, config, mesh)
    storage = _Storage(precision, int8, text_only)
    params: dict[str, jax.Array | QuantizedArray] = {}
    if dummy_seed is not None:
        for path, spec in progress(iter(specs.items()), len(specs)):
            shaped = storage.spec(path, spec)
            array = random_param(path, shaped, mesh, storage.dtype(path, shaped), dummy_seed)
            params[path] = store_param(path, spec, array, mesh, int8=int8)
        return graph, padded, params
    _, stored = param_specs(checkpoint.family, config)
    readers = checkpoint.param_readers({path: spec.shape for path, spec in stored.items()})
    for path, read in progress(readers, len(stored)):
        spec = specs[path]
        if storage.is_skipped(path):
            target = sharding.named_sharding(mesh, SKIPPED.axes)
            params[path] = jax.device_put(np.zeros(SKIPPED.shape, jnp.dtype(precision.compute_dtype)), target)
            continue
        dtypes = jnp.dtype(precision.weight_dtype), storage.dtype(path, spec)
        array = put_param(read, stored[path], spec, sharding.named_sharding(mesh, spec.axes), dtypes)
        params[path] = store_param(path, spec, array, mesh, int8=int8)
    return graph, padded, params


def put_param(
    read: Read, stored: ParamSpec, spec: ParamSpec, target: NamedSharding, dtypes: tuple[jnp.dtype, jnp.dtype]
) -> jax.Array:
    """A parameter on the mesh. dtypes: the one that it is rounded to, and the one that it is stored in.

    If the mesh spans several hosts, each reads only what its own devices need.
    """

    def cast(value: np.ndarray) -> np.ndarray:
        return value.astype(dtypes[0], copy=False).astype(dtypes[1], copy=False)

    if target.is_fully_addressable:
        return jax.device_put(cast(fit_to_mesh(read(()), stored, spec)), target)
    parts: dict[tuple[int, ...], np.ndarray] = {}  # several devices may need the same one

    def part(index: Any) -> np.ndarray:
        region = tuple(slice(*ends.indices(size)[:2]) for ends, size in zip(index, spec.shape, strict=True))
        key = tuple(ends.start for ends in region)
        if key not in parts:
            parts[key] = cast(fit_region_to_mesh(read, stored, spec, region))
        return parts[key]

    return jax.make_array_from_callback(spec.shape, target, part)


def abstract_params(
    checkpoint: Checkpoint,
    config: Config,
    mesh: Mesh,
    precision: Precision,
    *,
    int8: bool = False,
    text_only: bool = False,
) -> tuple[nnx.GraphDef[Any], Config, dict[str, AbstractParam]]:
    """What `load_params` returns, with the shapes and shardings of the parameters in their place. Reads no tensor and
    allocates nothing, so the mesh may be of a topology that this machine does not have."""
    padded, graph, specs = _on_mesh(checkpoint, config, mesh)
    storage = _Storage(precision, int8, text_only)

    def shaped(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named_sharding(mesh, axes))

    params: dict[str, AbstractParam] = {}
    for path, spec in specs.items():
        stored = storage.spec(path, spec)
        dtype = storage.dtype(path, stored)
        if not (int8 and is_int8_param(path, spec)):
            params[path] = shaped(stored.shape, stored.axes, dtype)
            continue
        last, value_axes, scale_axes = int8_axes(spec, mesh)
        order = [i for i in range(len(spec.shape)) if i not in last] + list(last)
        lengths = tuple(1 if axis == "size_1" else size for axis, size in zip(scale_axes, spec.shape, strict=True))
        values = shaped(tuple(spec.shape[i] for i in order), value_axes, jnp.dtype(jnp.int8))
        params[path] = QuantizedArray(values, shaped(lengths, scale_axes, dtype), last)  # type: ignore[arg-type]  # shapes in place of arrays
    return graph, padded, params


def _on_mesh(
    checkpoint: Checkpoint, config: Config, mesh: Mesh
) -> tuple[Config, nnx.GraphDef[Any], dict[str, ParamSpec]]:
    """(configuration padded for the mesh, its graph, its parameters)."""
    padded = config.for_tp(sharding.tp_size(mesh))
    return padded, *param_specs(checkpoint.family, padded)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """In which dtype and shape parameters are stored; see `load_params`."""

    precision: Precision
    int8: bool
    text_only: bool

    def dtype(self, path: str, spec: ParamSpec) -> jnp.dtype:
        """Of a parameter before it is quantized."""
        is_multiplied = is_matrix(spec.axes) and not (self.int8 and is_int8_param(path, spec))
        matmul_dtype = self.precision.matmul_dtype if is_multiplied else None
        return jnp.dtype(matmul_dtype or self.precision.compute_dtype)

    def is_skipped(self, path: str) -> bool:
        return self.text_only and not path.startswith(TEXT)

    def spec(self, path: str, spec: ParamSpec) -> ParamSpec:
        """The parameter, or an empty one if it is skipped."""
        return SKIPPED if self.is_skipped(path) else spec


def store_param(path: str, spec: ParamSpec, array: jax.Array, mesh: Mesh, *, int8: bool) -> jax.Array | QuantizedArray:
    """The parameter in its stored form: in int8 if it is a matrix of the language model, else unchanged.

    The embedding is unchanged: its rows are looked up, and it may also be the head.
    """
    if not (int8 and is_int8_param(path, spec)):
        return array
    last, *axes = int8_axes(spec, mesh)
    shardings = (sharding.named_sharding(mesh, each) for each in axes)
    quantized = _quantizer(contracted_axes(spec.axes), bool(last), *shardings)(array)
    return jax.block_until_ready(quantized)  # else the next parameters are sent before `array` is freed


def is_int8_param(path: str, spec: ParamSpec) -> bool:
    """Whether quantization to int8 applies to a parameter."""
    return path.startswith(TEXT) and path != EMBEDDING and bool(contracted_axes(spec.axes))


def int8_axes(spec: ParamSpec, mesh: Mesh) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
    """How an int8 parameter is stored: `QuantizedArray.last`, and the logical axes of its values and of its scale.

    A GPU's tensor cores take bytes along the axes that are summed over.
    """
    contracted = contracted_axes(spec.axes)
    last = contracted if mesh.devices.flat[0].platform == "gpu" and "experts" not in spec.axes else ()
    first = tuple(axis for i, axis in enumerate(spec.axes) if i not in last)
    scale = tuple("size_1" if i in contracted else axis for i, axis in enumerate(spec.axes))
    return last, (*first, *(spec.axes[i] for i in last)), scale


@functools.cache
def _quantizer(
    contracted: tuple[int, ...], move_last: bool, values: NamedSharding, scale: NamedSharding
) -> Callable[[jax.Array], QuantizedArray]:
    """The jitted `quantize`, with these shardings of its outputs."""
    last = contracted if move_last else ()
    out_shardings: Any = QuantizedArray(values, scale, last)  # type: ignore[arg-type]  # the tree that jit expects
    return jax.jit(lambda array: quantize(array, contracted, move_last=move_last), out_shardings=out_shardings)


def fit_to_mesh(value: np.ndarray, stored: ParamSpec, target: ParamSpec) -> np.ndarray:
    """Bring a stored parameter to its shape on the mesh.

    Key/value heads are repeated if they are fewer than the devices, each copy with its share of the query heads. Other
    axes are padded with zeros, which change no result.
    """
    if stored.shape == target.shape:
        return value
    if "kv_heads" in target.axes:
        axis = target.axes.index("kv_heads")
        group = axis + 1
        copies = target.shape[axis] // stored.shape[axis]
        if stored.shape[group] != target.shape[group]:
            num_kv = 2 if target.axes[group] == "group_kv" else 0  # keys and values, after the queries
            value = _repeat_kv_heads(value, axis, copies, num_kv)
    padding = [(0, size - stored_size) for stored_size, size in zip(value.shape, target.shape, strict=True)]
    return np.pad(value, padding)


def fit_region_to_mesh(read: Read, stored: ParamSpec, target: ParamSpec, region: Region) -> np.ndarray:
    """A region of what `fit_to_mesh` returns, reading no more of the parameter than it needs."""
    source = [slice(min(p.start, size), min(p.stop, size)) for p, size in zip(region, stored.shape, strict=True)]
    shape, starts = [part.stop - part.start for part in region], [0] * len(region)
    fitted = list(shape)
    if "kv_heads" in target.axes:
        axis = target.axes.index("kv_heads")
        group = axis + 1
        if stored.shape[group] != target.shape[group]:  # heads are repeated: whole heads are read, with their groups
            copies = target.shape[axis] // stored.shape[axis]
            first, last = region[axis].start // copies, -(-region[axis].stop // copies)
            source[axis], source[group] = slice(first, last), slice(0, stored.shape[group])
            starts[axis], fitted[axis] = region[axis].start - first * copies, (last - first) * copies
    value = read(tuple(source))
    if not value.size:
        return np.zeros(shape, value.dtype)
    value = fit_to_mesh(value, ParamSpec(value.shape, stored.axes), ParamSpec(tuple(fitted), target.axes))
    return value[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


def _repeat_kv_heads(value: np.ndarray, axis: int, copies: int, num_kv: int) -> np.ndarray:
    """[.., K, G + num_kv, ..] to [.., K * copies, G / copies + num_kv, ..]: queries are split among the copies; keys
    and values are repeated."""
    value = np.moveaxis(value, (axis, axis + 1), (0, 1))
    heads, group = value.shape[0], value.shape[1] - num_kv
    queries = value[:, :group].reshape(heads * copies, group // copies, *value.shape[2:])
    repeated = np.repeat(value[:, group:], copies, axis=0)
    return np.moveaxis(np.concatenate([queries, repeated], axis=1), (0, 1), (axis, axis + 1))


def random_param(path: str, spec: ParamSpec, mesh: Mesh, dtype: jnp.dtype, seed: int) -> jax.Array:
    """A parameter generated on the device: ones for norms, normal noise of deviation 0.02 for others."""
    is_norm = re.search(r"norm\d?$", path) is not None
    make = _random_param(spec.shape, sharding.named_sharding(mesh, spec.axes), jnp.dtype(dtype), is_norm)
    return make(np.uint32(seed), np.uint32(zlib.crc32(path.encode())))


@functools.cache
def _random_param(
    shape: tuple[int, ...], target: NamedSharding, dtype: jnp.dtype, is_norm: bool
) -> Callable[..., jax.Array]:
    def make(seed: jax.Array, name: jax.Array) -> jax.Array:
        if is_norm:
            return jnp.ones(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), name)
        return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)

    return jax.jit(make, out_shardings=target)
