"""Read a directory of safetensors files: headers at once, weights when asked for, through a memory map.

Headers come from strangers. Every length, offset, dtype and file name is checked before it is used; whatever is wrong
is a `CheckpointError` that names the file. Pickle formats are never opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8  # little-endian length of the header, at the start of the file

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be read: something is missing, damaged or hostile."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a memory-mapped file; `start` counts bytes from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    pages: mmap.mmap = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A read-only view of the file; it keeps the map open for as long as it lives."""
        return np.frombuffer(self.pages, self.dtype, math.prod(self.shape), self.start).reshape(self.shape)

    def release(self) -> None:
        """Drop the tensor's pages from this process. Views stay valid: the next access reads the file again."""
        if hasattr(mmap, "MADV_DONTNEED") and self.nbytes:
            first = self.start - self.start % mmap.PAGESIZE
            self.pages.madvise(mmap.MADV_DONTNEED, first, self.start + self.nbytes - first)


def open_checkpoint(directory: Path | str) -> dict[str, StoredTensor]:
    """Name -> tensor, in file order, of `model.safetensors`, a sharded index, or the one safetensors file there is.

    Reads headers only. Raises CheckpointError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _open_shards(directory, _read_index(directory / INDEX))
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors files but no {INDEX} to tell how they belong together"
        )
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} has weights only in a pickle format ({pickles[0]}), which can run code when opened and is not"
            " supported: save the model again with `save_pretrained(..., safe_serialization=True)`, or fetch a revision"
            " that has safetensors files"
        )
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, in the order of their bytes. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < LENGTH_BYTES:
                raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file")
            pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    length = int.from_bytes(pages[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: a header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > size:
        raise CheckpointError(f"{file}: the header should take {length} bytes, but the file has {size} in all")
    header = _parse(pages[LENGTH_BYTES : LENGTH_BYTES + length], f"{file}: the header")
    header.pop("__metadata__", None)
    data = LENGTH_BYTES + length
    spans = [_span(file, name, entry) for name, entry in header.items()]
    spans.sort(key=lambda span: (span.begin, span.end))
    at, before = 0, "the header"
    for span in spans:
        if span.begin != at:
            problem = "overlaps" if span.begin < at else f"leaves {span.begin - at} unused bytes after"
            raise CheckpointError(f"{file}: tensor {span.name!r} {problem} {before}")
        at, before = span.end, repr(span.name)
    if at != size - data:
        raise CheckpointError(
            f"{file}: the header describes {at} bytes of weights, but the file has {size - data}"
            " (an incomplete download?)"
        )
    return {span.name: StoredTensor(file, span.dtype, span.shape, data + span.begin, pages) for span in spans}


@dataclasses.dataclass(frozen=True)
class _Span:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _span(file: Path, name: str, entry: Any) -> _Span:
    """One checked header entry; offsets count from the end of the header."""
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 32:
        raise CheckpointError(f"{where} has a bad shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has bad data_offsets {str(offsets)[:80]}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} of shape {tuple(shape)} and dtype {dtype} takes {nbytes} bytes,"
            f" but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return _Span(name, DTYPES[dtype], tuple(shape), *offsets)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _parse(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            raise ValueError("a key occurs twice")
        return parsed

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each a plain name in the index's own directory."""
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} exceeds the limit of {MAX_HEADER_BYTES} bytes")
    places = _parse(file.read_bytes(), str(file)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{file} has no weight_map")
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0:"):
            where = str(shard)[:80]
            raise CheckpointError(
                f"{file} puts tensor {name!r} into {where!r}, not the plain name of a safetensors file beside it"
            )
    return places


def _open_shards(directory: Path, places: Mapping[str, str]) -> dict[str, StoredTensor]:
    shards = sorted(set(places.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise CheckpointError(f"{directory}: {len(absent)} of {len(shards)} shards are missing, first {absent[0]}")
    tensors = dict(_shard_tensors(directory, shards, places))
    for name, shard in places.items():
        if name not in tensors:
            raise CheckpointError(f"{directory / INDEX} puts tensor {name!r} into {shard}, which does not have it")
    return tensors


def _shard_tensors(directory: Path, shards: list[str], places: Mapping[str, str]) -> Iterator[tuple[str, StoredTensor]]:
    for shard in shards:
        for name, tensor in read_header(directory / shard).items():
            if places.get(name) != shard:
                told = f"puts it into {places[name]}" if name in places else "does not list it"
                raise CheckpointError(f"{directory / shard} has tensor {name!r}, but {INDEX} {told}")
            yield name, tensor
