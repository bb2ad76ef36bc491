"""A checkpoint directory, or a hub id, becomes a family, its configuration and its parameters on the devices."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax import demo, sharding
from mmjax.converters.table import Part, convert
from mmjax.models import Family
from mmjax.nn.weight import QuantizedArray, contracted_axes, is_matrix, quantize

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
HEAD = "lm_head.weight"
TEXT, EMBEDDING = "text.", "text.embed"  # where every family keeps its language model, and that one's embedding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists: its shape and its logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory that holds a model: config.json, the other *config.json by name, and weights in either form."""

    directory: Path
    family: Family
    config: dict[str, Any]
    files: Mapping[str, dict[str, Any]]
    token: str | None = None

    @classmethod
    def open(
        cls,
        model: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """From a local directory or a hub id. overrides: values that replace those of config.json, such as the places
        of parts that another checkpoint holds. Raises ValueError saying what is missing."""
        directory = find_model(model, revision=revision, token=token)
        files = {path.name: read_json(path) for path in sorted(directory.glob("*config.json"))}  # not the vocabulary
        nested = files.get("processor_config.json", {})
        for part, name in (
            ("image_processor", "preprocessor_config.json"),
            ("feature_extractor", "preprocessor_config.json"),
            ("video_processor", "video_preprocessor_config.json"),
        ):
            if part in nested and name not in files:  # what save_pretrained of transformers 5 writes
                files[name] = nested[part]
        if "config.json" not in files:
            raise ValueError(f"{directory} holds no config.json; is it a model directory?")
        config = files["config.json"] | dict(overrides or {})
        family = Family.of(config)
        for part in family.table.parts:
            if part.config not in config and config.get(part.key):
                config[part.config] = read_json(find_part(part, config, token) / "config.json")
        return cls(directory, family, config, files, token)

    @functools.cached_property
    def tensors(self) -> Mapping[str, Any]:
        """The stored tensors by name, read lazily: published names, or our own paths in a converted directory."""
        if self.converted:
            from mmjax.converters.orbax import open_converted

            return open_converted(self.directory)
        from mmjax.converters.safetensors import open_checkpoint

        own = open_checkpoint(self.directory)
        found = dict(own)
        for part in self.family.table.parts:
            if self.config.get(part.key) and not any(name.startswith(part.here) for name in own):
                other = open_checkpoint(find_part(part, self.config, self.token))
                within = {name: tensor for name, tensor in other.items() if name.startswith(part.there)}
                found |= {part.here + name.removeprefix(part.there): tensor for name, tensor in within.items()}
        return found

    @property
    def converted(self) -> bool:
        """Whether `mmjax convert` wrote this directory."""
        return (self.directory / "mmjax.json").is_file()

    def model_config(self, *, dummy: bool = False, headless: bool = False) -> Any:
        """The family's configuration. The head is tied when the config says so or when no head is stored.

        headless: leave a head of its own out, for those who want no logits.
        """
        flag = self.config.get("tie_word_embeddings", self.config.get("text_config", {}).get("tie_word_embeddings"))
        if dummy:
            stored = not flag
        elif self.converted:
            stored = "text.head" in self.tensors
        else:
            stored = any(self.family.table.canonical(name) == HEAD for name in self.tensors)
        return self.family.config.from_hf(self.config, self.files, tied=bool(flag) or headless or not stored)

    def param_values(self, specs: Mapping[str, ParamSpec]) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter of `leaves`, one at a time. Raises ConversionError when the checkpoint does not fit."""
        shapes = {path: spec.shape for path, spec in specs.items()}
        if not self.converted:
            yield from convert(self.tensors, self.family.table, shapes)
            return
        for path, shape in shapes.items():
            if path not in self.tensors or tuple(self.tensors[path].shape) != shape:
                found = tuple(self.tensors[path].shape) if path in self.tensors else "nothing"
                raise ValueError(
                    f"{self.directory}: parameter {path!r} needs shape {shape}, found {found}; convert it again"
                )
            yield path, self.tensors[path].read()


def find_model(model: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a model: a local path as it is, anything else through huggingface_hub's cache.

    "demo" is the model that ships with mmjax, unless a local directory of that name holds a config.json.
    """
    path = Path(model).expanduser()
    if model == demo.NAME and not (path / "config.json").is_file():
        return demo.DIRECTORY
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ValueError(f"{model!r} is neither a model directory nor a hub id such as 'Qwen/Qwen2-VL-2B-Instruct'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, token=token, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises a dozen kinds, offline ones included
        raise ValueError(
            f"{model!r} is no local directory, and fetching it from the hub failed: {type(error).__name__}: {error}"
        ) from error


def find_part(part: Part, config: Mapping[str, Any], token: str | None) -> Path:
    """The directory that holds a part of a model. Raises ValueError saying how to name another."""
    try:
        return find_model(config[part.key], token=token)
    except ValueError as error:
        raise ValueError(
            f"{part.key} of config.json: {error}. hf_overrides={{{part.key!r}: ...}} names another place."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


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
    weight_dtype: Any,
    compute_dtype: Any,
    *,
    matmul_dtype: Any = None,
    dummy: bool = False,
    seed: int = 0,
    int8: bool = False,
    text_only: bool = False,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> tuple[nnx.GraphDef[Any], Any, dict[str, jax.Array | QuantizedArray]]:
    """(graph, configuration as split over the mesh, parameters by path on the mesh).

    dtype: what the values are rounded to. held: the dtype they are then kept and computed in. matrices: another dtype
    for those that `Weight.einsum` multiplies by. int8: keep the matrices of the language model in int8; one at a time
    is on the devices in both forms. text_only: whatever belongs to no language model stays off the devices; no program
    may use it.
    """
    tp_size = sharding.tp_size(mesh)
    split = config.for_tp(tp_size)
    graph, specs = param_specs(checkpoint.family, split)

    def dtype_of(path: str) -> Any:
        apart = (
            matmul_dtype is not None and not (int8 and is_int8_param(path, specs[path])) and is_matrix(specs[path].axes)
        )
        return jnp.dtype(matmul_dtype if apart else compute_dtype)

    if dummy:
        make = progress(iter(specs.items()), len(specs))
        none = ParamSpec((0,), ("size_1",))
        kept = ((path, none if text_only and not path.startswith(TEXT) else spec) for path, spec in make)
        made = ((path, random_param(path, spec, mesh, dtype_of(path), seed)) for path, spec in kept)
        return graph, split, {path: store_param(path, specs[path], array, mesh, int8=int8) for path, array in made}
    _, stored = param_specs(checkpoint.family, config)
    params: dict[str, jax.Array | QuantizedArray] = {}
    for path, value in progress(checkpoint.param_values(stored), len(stored)):
        spec = specs[path]
        if text_only and not path.startswith(TEXT):
            params[path] = jnp.zeros((0,), jnp.dtype(compute_dtype), device=sharding.named_sharding(mesh, ("size_1",)))
            continue
        array = (
            fit_to_mesh(value, stored[path], spec)
            .astype(jnp.dtype(weight_dtype), copy=False)
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
