"""Tensors as base64 text: files of torch, written and read without it, and malicious files."""

import base64
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mmjax.multimodal import tensor_codec
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError
from mmjax.utils.serial_utils import base642tensor, tensor2base64

DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16, "u1", "i1", "i2", "i4", "i8", "?"]
ROWS = np.arange(24, dtype=np.float32).reshape(4, 6)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (), (0, 8), (2, 3, 4), (1,)])
def test_round_trip(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)
    made = base642tensor(tensor2base64(array))
    whole = tensor2base64(array)
    for written in (f"data:application/octet-stream;base64,{whole}", f"{whole[:8]}\r\n{whole[8:]}\n"):
        np.testing.assert_array_equal(base642tensor(written), made)
    assert made.dtype == array.dtype and made.shape == shape
    np.testing.assert_array_equal(made, array)
    assert tensor2base64(array) == tensor2base64(array.copy())


def test_arrays_of_other_libraries() -> None:
    import jax.numpy as jnp

    for array in (jnp.asarray(ROWS), jnp.asarray(ROWS, jnp.bfloat16)):
        made = base642tensor(tensor2base64(array))
        assert made.dtype == array.dtype
        np.testing.assert_array_equal(made, np.asarray(array))
    np.testing.assert_array_equal(base642tensor(tensor2base64(ROWS.T[::2])), ROWS.T[::2])
    for wrong in (np.zeros(3, complex), np.zeros(3, np.uint32), "words"):
        with pytest.raises(RequestError):
            tensor2base64(wrong)


def test_files_of_torch(shared: Path) -> None:
    folder = shared / "reference/tensors/good"
    for entry in json.loads((folder / "index.json").read_text()):
        expected = np.load((folder / entry["file"]).with_suffix(".npy"))
        if entry["dtype"] == "bfloat16":
            expected = expected.view(ml_dtypes.bfloat16)
        made = base642tensor(text((folder / entry["file"]).read_bytes()))
        assert made.dtype == expected.dtype and made.flags.c_contiguous and made.dtype.isnative
        np.testing.assert_array_equal(made, expected, err_msg=entry["file"])


@pytest.mark.parity
def test_torch_reads_what_is_written_and_the_reverse() -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        tensor = (torch.arange(24).reshape(4, 6) % 3).to(dtype)
        for given in (tensor, tensor.T, tensor[1:, ::2], tensor[:1].expand(5, 6)):
            buffer = io.BytesIO()
            torch.save(given, buffer)
            ours = base642tensor(text(buffer.getvalue()))
            np.testing.assert_array_equal(ours.astype(np.float32), given.float().numpy())
            theirs = torch.load(io.BytesIO(base64.b64decode(tensor2base64(given))), weights_only=True)
            assert theirs.dtype == dtype and torch.equal(theirs, given)


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_files_of_numpy() -> None:
    for array in (ROWS, np.asfortranarray(ROWS), ROWS.astype(">f4"), ROWS.astype("i8"), np.float32(3)):
        made = base642tensor(text(npy(array)))
        np.testing.assert_array_equal(made, array)
        assert made.dtype.isnative


# --- malicious files


def archive(parts: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as made:
        for name, content in parts.items():
            made.writestr(name, content)
    return buffer.getvalue()


def file(description: bytes, storage: bytes = bytes(96), **more: bytes) -> bytes:
    parts = {"data.pkl": description, "byteorder": b"little", "data/0": storage, "version": b"3\n"} | more
    return archive({f"archive/{name}": content for name, content in parts.items()})


def described(
    kind: str = "FloatStorage", count: int = 24, offset: int = 0, shape: Any = (4, 6), strides: Any = (6, 1)
) -> bytes:
    """The pickle of a tensor with these numbers, right or wrong."""

    def number(value: int) -> bytes:
        return (
            b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x09" + value.to_bytes(9, "little")
        )

    def numbers(values: Any) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n"
    tail = b"\x89ccollections\nOrderedDict\n)RtR."
    reference = head + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    return reference + number(offset) + numbers(shape) + numbers(strides) + tail


class Runs:
    """A pickle that would run a program."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').mkdir('/tmp/mmjax-was-here')",)


def twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            made.writestr("archive/data.pkl", described())
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(file(described()))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    return bytes(data)


def huge_npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


GOOD = tensor_codec.write_tensor(ROWS)
HARM: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "a bare pickle": pickle.dumps([1, 2]),
    "torch before 1.6": tensor_codec.LEGACY_MAGIC + b"rest",
    "an empty archive": archive({}),
    "an archive of something else": archive({"a.txt": b"a"}),
    "cut short": GOOD[: len(GOOD) // 2],
    "damaged storage": GOOD.replace(ROWS.tobytes(), ROWS[::-1].tobytes()),
    "a program": file(pickle.dumps(Runs(), 2)),
    "a program by a newer protocol": file(pickle.dumps(Runs(), 4)),
    "os.system": file(b"cos\nsystem\n(X\x02\x00\x00\x00idtR."),
    "a name of builtins": file(b"c__builtin__\neval\n."),
    "a sparse tensor": file(described().replace(b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor")),
    "a quantised storage": file(described("QInt8Storage")),
    "a dtype by another name": file(described().replace(b"torch\nFloat", b"numpy\nFloat")),
    "a list": file(b"\x80\x02]."),
    "a dictionary of tensors": file(b"\x80\x02}X\x01\x00\x00\x00a" + described()[2:-1] + b"s."),
    "no tensor": file(b"\x80\x02K\x01."),
    "two tensors": file(described()[:-1] + described()[2:-1] + b"."),
    "an empty stack": file(b"\x80\x02R."),
    "no end": file(described()[:-1]),
    "an unknown opcode": file(b"\x80\x02\xff."),
    "a memo that was never written": file(b"\x80\x02h\x05."),
    "a memo at a huge place": file(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "a string that claims to be long": file(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a long number": file(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a long description": file(b"\x80\x02" + b"N0" * 70_000 + described()[2:]),
    "deep tuples": file(b"\x80\x02)" + b"\x85" * 60_000 + b"."),
    "the same reference many times": file(b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 5000 + b"."),
    "a persistent id that is no tuple": file(b"\x80\x02X\x07\x00\x00\x00storageQ."),
    "a call of a tuple": file(b"\x80\x02))R."),
    "hooks": file(described().replace(b"OrderedDict\n)R", b"OrderedDict\nK\x01\x85R")),
    "beyond the storage": file(described(offset=1)),
    "a storage longer than its bytes": file(described(count=25, shape=(25,), strides=(1,))),
    "a negative offset": file(described(offset=-1)),
    "a negative size": file(described(shape=(-4, 6))),
    "a negative stride": file(described(strides=(-6, 1))),
    "sizes without strides": file(described(strides=(6,))),
    "many axes": file(described(shape=(1,) * 9, strides=(1,) * 9)),
    "a size that is no number": file(described().replace(b"J\x04\x00\x00\x00", b"N")),
    "a tensor of zero strides that is huge": file(described(shape=(2**20, 2**20), strides=(0, 0))),
    "sizes whose product overflows": file(described(shape=(2**33, 2**33), strides=(0, 0))),
    "a huge number": file(described(shape=(2**70,), strides=(0,))),
    "a huge storage": file(described(count=2**60)),
    "no storage": archive({"archive/data.pkl": described()}),
    "a storage by a path": file(described().replace(b"\x01\x00\x00\x000", b"\x04\x00\x00\x00../0")),
    "an unknown byte order": file(described(), byteorder=b"middle"),
    "two descriptions": archive({"a/data.pkl": described(), "b/data.pkl": described(), "a/data/0": bytes(96)}),
    "an entry twice": twice(),
    "an encrypted entry": encrypted(),
    "packed by bzip2": archive({"archive/data.pkl": described(), "archive/data/0": bytes(96)}, zipfile.ZIP_BZIP2),
    "a bomb": archive({"archive/data.pkl": described(), "archive/data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
    "many entries": archive({f"archive/{n}": b"" for n in range(2000)}),
    "npy of objects": npy(np.array([{}], object), allow_pickle=True),
    "npy of texts": npy(np.array(["a"])),
    "npy of records": npy(np.zeros(2, [("a", "f4")])),
    "npy of complex numbers": npy(np.zeros(2, complex)),
    "npy that claims to be huge": huge_npy("(1000000, 1000000)"),
    "npy of negative size": huge_npy("(-1, 4)"),
    "npy of fractional size": huge_npy("(1.5,)"),
    "npy with too little": huge_npy("(4,)", data=bytes(12)),
    "npy with too much": huge_npy("(4,)", data=bytes(20)),
    "npy with a head that is a program": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getcwd()".ljust(32),
    "npy with a deep head": huge_npy("(" * 5000 + ")" * 5000),
    "npy of an unknown version": b"\x93NUMPY\x09\x00" + bytes(40),
    "npy that ends early": b"\x93NUMPY\x01",
}


def test_good_files_of_this_kind_are_read() -> None:
    """The functions above make good files by default."""
    np.testing.assert_array_equal(tensor_codec.read_tensor(file(described(), ROWS.tobytes())), ROWS)
    packed = archive({"x/data.pkl": described(), "x/data/0": ROWS.tobytes()}, zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(tensor_codec.read_tensor(packed), ROWS)
    np.testing.assert_array_equal(tensor_codec.read_tensor(huge_npy("(4, 6)", data=ROWS.tobytes())), ROWS)


@pytest.mark.parametrize("name", HARM)
def test_malicious_files_are_refused(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        base642tensor(text(HARM[name]), limits=MediaLimits(tensor_bytes=1 << 24))
    assert caught.value.code in ("bad_tensor", "media_too_large")
    assert not Path("/tmp/mmjax-was-here").exists() and " at 0x" not in str(caught.value)


@pytest.mark.parametrize("given", ["%", "AAA", "AA AA", "ä", None, b"AAAA", 3])
def test_text_that_is_not_base64(given: Any) -> None:
    with pytest.raises(RequestError):
        base642tensor(given)


def test_size_is_checked_first() -> None:
    with pytest.raises(RequestError, match="MMJAX_MAX_EMBED_DECODE_BYTES"):
        base642tensor("A" * 4_000_000, limits=MediaLimits(tensor_bytes=1_000_000))
    assert base642tensor(text(GOOD), limits=MediaLimits(tensor_bytes=0)).shape == (4, 6)
