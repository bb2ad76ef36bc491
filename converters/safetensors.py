"""Read a directory of safetensors files: headers at once, weights when asked for.

Headers come from strangers. The safetensors library checks every length, offset and shape before it is used; beside
what it checks, a key that occurs twice and a dtype that NumPy cannot hold are refused. Whatever is wrong is a
`CheckpointError` that names the file. Pickle formats are never opened.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from mmjax.converters.formats import format_hint
from mmjax.converters.transforms import Region
from safetensors import SafetensorError, safe_open

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8  # little-endian length of the header, at the start of the file
MAX_DIMENSIONS = 32

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
FLOAT8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])  # the library looks for these in NumPy, which has none


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be read: something is missing, damaged or hostile."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file; `start` counts bytes from the start of the file. listed: not missing in an index."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    opened: safe_open = dataclasses.field(repr=False)
    listed: bool = True

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, region: Region = ()) -> np.ndarray:
        """The value or a region of it, read-only. It is read anew each time, and nothing else of the file stays in
        memory."""
        if region:
            value = self._read_region(region)
        elif self.dtype in FLOAT8:
            value = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.start).reshape(self.shape)
        else:
            value = self.opened.get_tensor(self.name)
        value.flags.writeable = False
        return value

    def _read_region(self, region: Region) -> np.ndarray:
        """By runs of bytes that follow each other in the file. The library would read the whole tensor."""
        out = np.empty([part.stop - part.start for part in region], self.dtype)
        partial = [axis for axis, part in enumerate(region) if out.shape[axis] < self.shape[axis]]
        axis = partial[-1] if partial else 0  # of all axes behind it, everything is read
        strides = [math.prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape))]
        runs = out.reshape(math.prod(out.shape[:axis]), -1).view(np.uint8)
        with self.file.open("rb", buffering=0) as file:
            for run, outer in zip(
                runs, itertools.product(*(range(p.start, p.stop) for p in region[:axis])), strict=True
            ):
                at = (*outer, region[axis].start)
                offset = self.start + sum(i * stride for i, stride in zip(at, strides, strict=False))
                _pread(file.fileno(), run.data, offset)
        return out


def _pread(descriptor: int, out: memoryview, offset: int) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if not count:
            raise CheckpointError("a file has become shorter than its header says")
        done += count


def open_checkpoint(directory: Path | str) -> dict[str, StoredTensor]:
    """Name -> tensor, in file order, of `model.safetensors`, a sharded index, or the safetensors files there are.

    Reads headers only. Raises CheckpointError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _open_shards(directory, _read_index(directory / INDEX))
    files = _weight_files(directory)
    if files:
        return _open_unlisted(directory, files)
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} has weights only in a pickle format ({pickles[0]}), which can run code when opened and is not"
            " supported: save the model again with `save_pretrained(..., safe_serialization=True)`, or fetch a revision"
            " that has safetensors files"
        )
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}{format_hint(directory) or ''}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, in the order of their bytes. Raises CheckpointError."""
    try:
        header, start, nbytes = _header(file)
        opened = safe_open(file, framework="np", backend="pread")  # mapped pages would count as this process's memory
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {_fault(header, nbytes) or error}") from error
    tensors = {}
    for name in opened.offset_keys():
        stored, begin = opened.get_slice(name), header[name]["data_offsets"][0]
        dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
        if dtype not in DTYPES or len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(f"{file}: tensor {name!r} {_entry_fault(header[name])}")
        tensors[name] = StoredTensor(name, file, DTYPES[dtype], shape, start + begin, opened)
    return tensors


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(name -> entry as it is written, where the weights start, their bytes), each name once."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if size < LENGTH_BYTES:
            raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file")
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: a header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}")
        start = LENGTH_BYTES + length
        if start > size:
            raise CheckpointError(f"{file}: the header should take {length} bytes, but the file has {size} in all")
        header = _parse(stream.read(length), f"{file}: the header")
    header.pop("__metadata__", None)
    return header, start, size - start


def _fault(header: Mapping[str, Any], nbytes: int) -> str | None:
    """What is wrong with a header that the library refuses, with the values; None: something it says itself."""
    for name, entry in header.items():
        if fault := _entry_fault(entry):
            return f"tensor {name!r} {fault}"
    at, before = 0, "the header"
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at:
            problem = "overlaps" if begin < at else f"leaves {begin - at} unused bytes after"
            return f"tensor {name!r} {problem} {before}"
        at, before = end, repr(name)
    if at != nbytes:
        return f"the header describes {at} bytes of weights, but the file has {nbytes} (an incomplete download?)"
    return None


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with the entry of one tensor, as the end of a sentence about it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}"
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        return f"has a bad shape {str(shape)[:80]}"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has bad data_offsets {str(offsets)[:80]}"
    nbytes, span = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if span != nbytes:
        return f"of shape {tuple(shape)} and dtype {dtype} takes {nbytes} bytes, but its data_offsets span {span}"
    return None


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


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


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model without an index: no adapter's, and not those of Mistral's own format if there
    are others."""
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    return [file for file in files if not file.name.startswith("consolidated")] or files


def _open_unlisted(directory: Path, files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of files that no index lists."""
    numbered = {match[1]: int(match[2]) for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.", file.name))}
    if numbered and len(numbered) < (total := max(numbered.values())):
        raise CheckpointError(f"{directory} has {len(numbered)} of {total} shards and no {INDEX}")
    if len(files) > 1:
        log.warning("%s has %d safetensors files and no %s: all are read", directory, len(files), INDEX)
    return _collect(files, {})


def _open_shards(directory: Path, places: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of an index's shards. Where the index is not right, the tensors are taken from where they are."""
    shards = sorted(set(places.values()))
    tensors = _collect([directory / shard for shard in shards if (directory / shard).is_file()], places)
    if any(name not in tensors for name in places):
        others = [file for file in _weight_files(directory) if file.name not in shards]
        elsewhere = _collect(others, {})
        tensors |= {name: tensor for name, tensor in elsewhere.items() if name in places and name not in tensors}
    missing = [name for name in places if name not in tensors]
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if missing and absent:
        raise CheckpointError(f"{directory}: {len(absent)} of {len(shards)} shards are missing, first {absent[0]}")
    moved = [name for name, tensor in tensors.items() if name in places and tensor.file.name != places[name]]
    unlisted = [name for name in tensors if name not in places]
    for names, told in (
        (missing, "lists tensors that no shard has"),
        (moved, "lists tensors in another shard than they are in"),
        (unlisted, "does not list all tensors of its shards"),
    ):
        if names:
            log.warning("%s %s: %d, first %s", directory / INDEX, told, len(names), names[0])
    return tensors | {name: dataclasses.replace(tensors[name], listed=False) for name in unlisted}


def _collect(files: list[Path], places: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of all files. One that several files have is taken from where `places` puts it, else from the
    first. CheckpointError where their shapes differ."""
    tensors: dict[str, StoredTensor] = {}
    doubled = []
    for file in files:
        for name, tensor in read_header(file).items():
            first = tensors.get(name)
            if first is not None:
                doubled.append(name)
                if first.shape != tensor.shape:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} has shape {tensor.shape}, but {first.shape} in {first.file.name}"
                    )
            if first is None or places.get(name) == file.name:
                tensors[name] = tensor
    if doubled:
        where = tensors[doubled[0]].file
        log.warning("%d tensors are in several files, first %s, which is read from %s", len(doubled), doubled[0], where)
    return tensors
