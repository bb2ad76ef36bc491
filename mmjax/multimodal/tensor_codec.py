"""Encodes tensors as base64 text of the files that `torch.save` writes, without torch, and without running pickles.

Such a file is a ZIP archive of a pickle that describes the tensor, and of its bytes. The pickle is parsed as data:
opcodes and names that a dense tensor does not need are refused. `.npy` files are read too.
"""

import base64
import binascii
import io
import math
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mmjax.multimodal.arrays import to_numpy
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.multimodal.url_sources import bare_base64
from mmjax.types import RequestError

STORAGES = {
    "FloatStorage": np.dtype("f4"),
    "DoubleStorage": np.dtype("f8"),
    "HalfStorage": np.dtype("f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "ShortStorage": np.dtype("i2"),
    "IntStorage": np.dtype("i4"),
    "LongStorage": np.dtype("i8"),
    "BoolStorage": np.dtype("?"),
}
# the first bytes of files
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9")  # of torch before 1.6
NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
MAX_AXES = 8
MAX_ENTRIES = 64
MAX_PICKLE_BYTES = 1 << 16
CONSTANT_OPCODES = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
VALUE_OPCODES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")


class Storage(NamedTuple):
    """A flat array, stored under a key in the archive."""

    dtype: np.dtype
    key: str
    length: int


class TensorView(NamedTuple):
    """A tensor: a view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Marks the start of a tuple on the stack."""


def tensor2base64(x: Any) -> str:
    """The file that `torch.save` would write for an array of any library, in base64, as vLLM's clients send it."""
    return base64.b64encode(write_tensor(x)).decode("ascii")


def base642tensor(encoded: str, *, limits: MediaLimits = DEFAULT) -> np.ndarray:
    """The array in base64 text. RequestError for anything but one dense tensor within the limits. Nothing in the text
    is ever executed."""
    if not isinstance(encoded, str):
        raise RequestError(f"A base64 tensor must be a string, got {type(encoded).__name__}.", "bad_tensor")
    if limits.tensor_bytes and len(encoded) // 4 * 3 > limits.tensor_bytes + MAX_PICKLE_BYTES:
        raise _too_large(limits)
    try:
        data = base64.b64decode(bare_base64(encoded), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("The tensor is not valid base64.", "bad_base64") from error
    return read_tensor(data, limits)


def read_tensor(data: bytes, limits: MediaLimits = DEFAULT) -> np.ndarray:
    """The array in a file of `torch.save` or `numpy.save`: contiguous, in native byte order."""
    try:
        if data.startswith(NPY_MAGIC):
            return _read_npy(data, limits)
        if data.startswith(LEGACY_MAGIC):
            raise _refused("it was written by torch before 1.6; save it again with a newer one")
        if not data.startswith(ZIP_MAGIC):
            raise _refused("it is neither a file of torch.save nor of numpy.save")
        return _read_zip(data, limits)
    except RequestError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, RecursionError) as error:
        raise _refused("it is damaged") from error
    except (EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise _refused("it is damaged") from error


def _refused(reason: str) -> RequestError:
    return RequestError(f"The tensor cannot be read: {reason}.", "bad_tensor")


def _too_large(limits: MediaLimits) -> RequestError:
    return RequestError(
        f"The tensor has more than the {limits.tensor_bytes} bytes that are decoded. Send fewer rows, or raise "
        "MMJAX_MAX_EMBED_DECODE_BYTES.",
        "media_too_large",
    )


def _read_npy(data: bytes, limits: MediaLimits) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise _refused("its version of the npy format is unknown")
    shape, column_major, dtype = read[version](file)
    if dtype.kind not in "biuf" or len(shape) > MAX_AXES:
        raise _refused(f"it must hold numbers on at most {MAX_AXES} axes")
    count = math.prod(shape)
    if limits.tensor_bytes and count * dtype.itemsize > limits.tensor_bytes:
        raise _too_large(limits)
    if count * dtype.itemsize != len(data) - file.tell():
        raise _refused("its size is not what its header says")
    array = np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if column_major else "C")
    return np.array(array, dtype.newbyteorder("="), order="C")


def _read_zip(data: bytes, limits: MediaLimits) -> np.ndarray:
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:  # checked before zipfile lists the entries
        raise _refused("the archive has too many entries")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise _refused("the archive names an entry twice")
        for info in entries.values():
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refused("the archive is encrypted or packed in an unknown way")
        if limits.tensor_bytes and sum(info.file_size for info in entries.values()) > limits.tensor_bytes + (1 << 20):
            raise _too_large(limits)
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _refused("the archive was not written by torch.save")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise _refused("its description is too long for one tensor")
        root = pickles[0].removesuffix("data.pkl")
        view = parse_pickle(archive.read(pickles[0]))
        byte_order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if byte_order not in (b"little", b"big"):
            raise _refused("its byte order is unknown")
        _check_view(view, limits)
        entry = entries.get(f"{root}data/{view.storage.key}")
        if entry is None or entry.file_size < view.storage.length * view.storage.dtype.itemsize:
            raise _refused("its storage is missing or too short")
        storage = np.frombuffer(archive.read(entry), view.storage.dtype, view.storage.length)
    if byte_order == b"big" and view.storage.dtype.itemsize > 1:
        storage = storage.view(f"u{storage.itemsize}").byteswap().view(storage.dtype)
    if math.prod(view.shape) == 0:
        return np.zeros(view.shape, view.storage.dtype)
    strides = [stride * storage.itemsize for stride in view.strides]
    tensor = np.lib.stride_tricks.as_strided(storage[view.offset :], view.shape, strides, writeable=False)
    return np.array(tensor, order="C")


def _check_view(view: TensorView, limits: MediaLimits) -> None:
    """RequestError unless every element lies in the storage and the dense tensor is within the limits."""
    integers = (view.storage.length, view.offset, *view.shape, *view.strides)
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**62 for n in integers):
        raise _refused("its sizes must be integers of at least 0")
    if len(view.shape) > MAX_AXES or len(view.shape) != len(view.strides):
        raise _refused(f"it must have at most {MAX_AXES} axes, each with one stride")
    size = math.prod(view.shape)
    if limits.tensor_bytes and max(size, view.storage.length) * view.storage.dtype.itemsize > limits.tensor_bytes:
        raise _too_large(limits)
    last = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    if size and view.offset + last >= view.storage.length:
        raise _refused("it reaches beyond its storage")


def parse_pickle(data: bytes) -> TensorView:
    """The one tensor that a pickle describes. RequestError if it describes anything else."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in CONSTANT_OPCODES:
            stack.append(CONSTANT_OPCODES[name])
        elif name in VALUE_OPCODES:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(module, attribute))
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "TUPLE":
            start = len(stack) - 1 - stack[::-1].index(_Mark)
            stack[start:] = [tuple(stack[start + 1 :])]
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(function(*arguments))
        elif name == "STOP":
            break
        elif name not in ("PROTO", "FRAME"):
            raise _refused(f"its description uses {name}, which no dense tensor needs")
    if len(stack) != 1 or not isinstance(stack[0], TensorView):
        raise _refused("it holds something other than one tensor")
    return stack[0]


def _global(module: Any, name: Any) -> Any:
    """The stand-in for a global: a function of this module, or the dtype of a storage."""
    function = STAND_INS.get((module, name))
    if function is not None:
        return function
    if module == "torch" and name in STORAGES:
        return STORAGES[name]
    shown = f"{module}.{name}"[:80]
    raise _refused(f"its description names {shown}, and only dense tensors of plain number types are read")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _refused("it is damaged")
    return TensorView(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _hooks(*arguments: Any) -> None:
    if arguments:
        raise _refused("its hooks are not empty")


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): _hooks,
}


def _storage(reference: Any) -> Storage:
    tag, dtype, key, _, length = reference
    if tag != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
        raise _refused("it refers to something other than a storage")
    return Storage(dtype, key, length)


def write_tensor(x: Any) -> bytes:
    """The file that `torch.save` would write for an array; `torch.load` reads it. RequestError for other dtypes."""
    array = np.ascontiguousarray(_in_own_dtype(x))
    storage = next((name for name, dtype in STORAGES.items() if dtype == array.dtype), None)
    if storage is None:
        raise RequestError(f"A tensor cannot hold {array.dtype}; use float32, bfloat16 or int64.", "bad_tensor")
    shape = np.shape(x)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    description = b"".join(
        [
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            f"ctorch\n{storage}\n".encode(),
            _text("0"),
            _text("cpu"),
            _number(array.size),
            b"tQK\x00",
            b"(" + b"".join(map(_number, shape)) + b"t",
            b"(" + b"".join(map(_number, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR.",
        ]
    )
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    parts = {"data.pkl": description, "byteorder": b"little", "data/0": little.tobytes(), "version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(
                zipfile.ZipInfo(f"archive/{name}"), content
            )  # without a timestamp, so that equal arrays make equal files
    return buffer.getvalue()


def _in_own_dtype(x: Any) -> np.ndarray:
    """The array as NumPy in its own dtype, torch's bfloat16 included."""
    array = to_numpy(x)
    return array.astype(ml_dtypes.bfloat16) if str(getattr(x, "dtype", "")).endswith("bfloat16") else array


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")
