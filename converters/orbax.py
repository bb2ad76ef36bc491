"""Orbax checkpoints: a writer that holds one parameter at a time, and a reader that reads one at a time.

The directory is a plain Orbax checkpoint of a flat dict {parameter path: array}, restorable by a stock
`StandardCheckpointer`, plus `mmjax.json` and the published checkpoint's own small text files.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from mmjax.converters.manifest import FORMAT, MANIFEST, TEMPLATES, TEXT_FILES, is_orbax, read_manifest
from mmjax.converters.safetensors import CheckpointError, open_checkpoint
from mmjax.converters.table import Piece, Plan, Table, Tensor, build, leaf_dtype, plan
from mmjax.converters.transforms import Shape

# Arrays are cut into chunks of at most this size, so that a device that needs a part does not read the whole.
CHUNK_BYTES = 64 << 20
# Compression saves little on weights; what the file system and the headers take beyond the plain bytes.
SPARE_BYTES = 64 << 20

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A parameter that is made when Orbax comes to write it. Orbax reads `size` or `nbytes` for its statistics."""

    path: str
    shape: Shape
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def make(self) -> np.ndarray:
        value = build(self.pieces, self.shape, self.tensors)
        return value if value.dtype == self.dtype else value.astype(self.dtype)


class _OneByOne(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]  # Orbax has no type hints to check
    """Writes pending parameters as Orbax writes NumPy arrays, each finished before the next is made."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        super().__init__()
        self.progress = progress
        self.total = total

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        done = 0
        for place, value in enumerate(values):
            await self._write(value, infos[place])
            done += value.nbytes
            if self.progress is not None:
                self.progress(value.path, done, self.total)
        return []

    async def _write(self, value: _Pending, info: Any) -> None:
        """Its own function: when it returns, nothing holds the value that was made."""
        chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        for future in await super().serialize([value.make()], [info], [chunks]):
            future.result()


def convert_checkpoint(
    src: Path | str,
    dst: Path | str,
    *,
    table: Table,
    shapes: Mapping[str, Shape],
    dtype: np.typing.DTypeLike | None = None,
    progress: Progress | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """Write the safetensors checkpoint `src` as an Orbax checkpoint `dst`; return what was claimed and ignored.

    `dtype`: stored dtype of floating-point parameters (default: that of the source).
    `progress(path, done, total)`: called after each parameter, in bytes. `tensors`, `config`: of the whole model, where
    `src` does not hold all of them.
    `dst` appears only when it is complete. Raises CheckpointError (unreadable source, non-empty destination, full disk)
    and ConversionError (the tensors do not fit `shapes`), both before anything is written.
    """
    src, dst = Path(src), Path(dst)
    _refuse_occupied(dst)
    tensors = open_checkpoint(src) if tensors is None else tensors
    ready = plan(tensors, table, shapes)
    pending = {
        path: _Pending(path, tuple(shapes[path]), _stored(leaf_dtype(pieces, tensors), dtype), pieces, tensors)
        for path, pieces in ready.pieces.items()
    }
    total = sum(leaf.nbytes for leaf in pending.values())
    dst.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(dst.parent).free
    if free < total + SPARE_BYTES:
        raise CheckpointError(f"{dst.parent} has {free} bytes free, but the checkpoint takes {total + SPARE_BYTES}")
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as scratch:
        made = Path(scratch) / "checkpoint"
        _write(made, pending, progress, total)
        copied = _copy_text_files(src, made)
        sources = collections.Counter(str(tensors[name].dtype) for name in ready.claimed)
        if config is not None:
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif "config.json" in copied:
            config = json.loads((src / "config.json").read_text(encoding="utf-8"))
        manifest = {
            "format": FORMAT,
            "family": (config or {}).get("model_type"),
            "source_dtypes": dict(sources),
            "dtypes": dict(collections.Counter(str(leaf.dtype) for leaf in pending.values())),
            "tensors": len(pending),
            "bytes": total,
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _refuse_occupied(dst)
        os.replace(made, dst)
    return ready


def _refuse_occupied(dst: Path) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty directory; nothing is overwritten")


def _stored(source: np.dtype, wanted: np.typing.DTypeLike | None) -> np.dtype:
    """Only floating-point values are cast; NumPy does not count the ml_dtypes kinds among its own."""
    floating = np.issubdtype(source, np.floating) or source.type.__module__ == ml_dtypes.__name__
    return np.dtype(wanted) if wanted is not None and floating else source


def _write(made: Path, pending: dict[str, _Pending], progress: Progress | None, total: int) -> None:
    # Orbax warns when a registry cannot save jax.Array, though there is none to save.
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Pending, _OneByOne(progress, total)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(made.absolute(), args=ocp.args.PyTreeSave(pending))


def _copy_text_files(src: Path, dst: Path) -> list[str]:
    found = [name for name in TEXT_FILES if (src / name).is_file()]
    found += [str(file.relative_to(src)) for file in src.glob(TEMPLATES)]
    for name in found:
        (dst / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(src / name, dst / name)
    return found


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A parameter of an Orbax checkpoint; nothing is read until `read`."""

    store: tensorstore.TensorStore = dataclasses.field(repr=False)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def shape(self) -> Shape:
        return tuple(self.store.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, region: tuple[slice, ...] = ()) -> np.ndarray:
        """The value, or the part of it that a device needs: a fresh array. Reads only the chunks it touches."""
        return np.asarray(self.store[region].read().result())


def open_converted(directory: Path | str) -> dict[str, StoredLeaf]:
    """Parameter path -> lazy array. Reads metadata only. Raises CheckpointError.

    Nested trees are accepted too; their keys are joined by dots.
    """
    directory = Path(directory).absolute()
    if not is_orbax(directory):
        raise CheckpointError(f"{directory} is not an Orbax checkpoint: it has no _METADATA")
    manifest = read_manifest(directory)
    try:
        metadata = json.loads((directory / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
        names = [".".join(entry["key"] for entry in leaf["key_metadata"]) for leaf in metadata.values()]
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        stores = [tensorstore.open(_spec(directory, name), open=True, read=True, context=context) for name in names]
        leaves = {name: StoredLeaf(store.result()) for name, store in zip(names, stores, strict=True)}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{directory} is a damaged Orbax checkpoint: {error}") from error
    if manifest is not None and manifest["tensors"] != len(leaves):
        told = manifest["tensors"]
        raise CheckpointError(f"{directory}: {MANIFEST} speaks of {told} tensors, the checkpoint has {len(leaves)}")
    return leaves


def _spec(directory: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{directory}/"}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
