"""The safetensors reader: what it reads, and the damaged or hostile files that it refuses."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mmjax.converters.safetensors import DTYPES, INDEX, SINGLE, CheckpointError, open_checkpoint
from safetensors.numpy import save_file


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "bf16": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "f16": rng.standard_normal((2, 1, 3)).astype(np.float16),
        "i64": rng.integers(-9, 9, (4,)),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    tensors = open_checkpoint(tmp_path)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (array.dtype, array.shape, array.nbytes)
        value = tensor.read()
        assert value.tobytes() == array.tobytes() and not value.flags.writeable


def test_every_dtype_has_its_width(tmp_path: Path) -> None:
    header, at = {}, 0
    for name, dtype in DTYPES.items():
        header[name] = entry(name, [3], [at, at + 3 * dtype.itemsize])
        at += 3 * dtype.itemsize
    write(tmp_path / SINGLE, header, bytes(at))
    for name, tensor in open_checkpoint(tmp_path).items():
        assert tensor.dtype == DTYPES[name] and not tensor.read().astype(np.float32).any()


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_values_of_dtypes_that_numpy_lacks(name: str, tmp_path: Path) -> None:
    before, values = np.arange(3, dtype=np.int8), np.arange(-4, 4).astype(DTYPES[name]).reshape(2, 4)
    header = {"a": entry("I8", [3], [0, 3]), "b": entry(name, [2, 4], [3, 3 + values.nbytes])}
    write(tmp_path / SINGLE, header, before.tobytes() + values.tobytes())
    read = open_checkpoint(tmp_path)["b"].read()
    assert read.dtype == values.dtype and read.tobytes() == values.tobytes() and not read.flags.writeable


def test_a_view_outlives_the_reader_and_the_directory(tmp_path: Path) -> None:
    save_file({"a": np.arange(5000, dtype=np.float32)}, tmp_path / SINGLE)
    value = open_checkpoint(tmp_path)["a"].read()
    (tmp_path / SINGLE).unlink()
    np.testing.assert_array_equal(value, np.arange(5000))


def test_files_need_no_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "weights.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a"]
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "more.safetensors")
    for name in ("adapter_model", "consolidated"):  # of a LoRA, and Mistral's own format beside the other
        save_file({name: np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert sorted(open_checkpoint(tmp_path)) == ["a", "b"]
    assert "no model.safetensors.index.json: all are read" in caplog.text


def test_shards_without_an_index(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({str(number): np.ones(2, np.float32)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"2 of 3 shards and no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    save_file({"2": np.ones(2, np.float32)}, tmp_path / "model-00002-of-00003.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["1", "2", "3"]


HEADERS = [
    ("not json", b"{]", "not valid JSON"),
    ("not utf-8", b'{"\xff": 1}', "not valid JSON"),
    ("not an object", [1], "not a JSON object"),
    ("deep json", b"[" * 100_000, "not valid JSON"),
    ("repeated key", b'{"a": 1, "a": 2}', "twice"),
    ("not an entry", {"a": 1}, "needs exactly"),
    ("missing field", {"a": {"dtype": "F32", "shape": [2]}}, "needs exactly"),
    ("unknown dtype", {"a": entry("F4")}, "'F4'"),
    ("dtype of another type", {"a": entry(dtype=["F32"])}, "dtype"),  # type: ignore[arg-type]
    ("negative shape", {"a": entry(shape=[-2])}, "bad shape"),
    ("fractional shape", {"a": entry(shape=[2.0])}, "bad shape"),
    ("boolean shape", {"a": entry(shape=[True, 2])}, "bad shape"),
    ("huge shape", {"a": entry(shape=[2**62, 2**62])}, "takes"),
    ("many dimensions", {"a": entry(shape=[1] * 33)}, "bad shape"),
    ("one offset", {"a": entry(offsets=[0])}, "bad data_offsets"),
    ("reversed offsets", {"a": entry(offsets=[8, 0])}, "bad data_offsets"),
    ("negative offset", {"a": entry(offsets=[-8, 0])}, "bad data_offsets"),
    ("wrong size", {"a": entry(shape=[3])}, "takes 12 bytes"),
    ("out of bounds", {"a": entry(shape=[4], offsets=[0, 16])}, "describes 16 bytes"),
    ("overlap", {"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps 'a'"),
    ("same bytes twice", {"a": entry(), "b": entry()}, "overlaps"),
    ("hole", {"a": entry(shape=[1], offsets=[4, 8])}, "unused bytes after the header"),
    ("dtype that NumPy lacks", {"a": entry("F4", [16])}, "known are BOOL"),
    ("one dimension too many", {"a": entry(shape=[1] * 32 + [2])}, "bad shape"),
    ("metadata that is no text", {"__metadata__": {"a": 1}, "a": entry()}, "expected a string"),
    ("unused tail", {"a": entry(shape=[1], offsets=[0, 4])}, "describes 4 bytes"),
]


@pytest.mark.parametrize(("header", "words"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_refuses_a_bad_header(header: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, header, bytes(8))
    with pytest.raises(CheckpointError, match=words) as refused:
        open_checkpoint(tmp_path)
    assert SINGLE in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("length", "words"), [(2**63, "limit"), (100_000_001, "limit"), (1000, "in all"), (2**64 - 1, "limit")]
)
def test_refuses_a_bad_length(length: int, words: str, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": entry()}, bytes(8), length)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_refuses_a_stub(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match="too few"):
        open_checkpoint(tmp_path)


def test_refuses_a_truncated_download(tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="incomplete download"):
        open_checkpoint(tmp_path)


def sharded(directory: Path, places: Any) -> None:
    save_file({"a": np.ones(2, np.float32)}, directory / "one.safetensors")
    save_file({"b": np.ones(2, np.float32)}, directory / "two.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_reads_shards_in_order(tmp_path: Path) -> None:
    sharded(tmp_path, {"b": "two.safetensors", "a": "one.safetensors"})
    assert list(open_checkpoint(tmp_path)) == ["a", "b"]


PLACES = [
    ("no map", None, "no weight_map"),
    ("empty map", {}, "no weight_map"),
    ("parent folder", {"a": "../one.safetensors"}, "plain name"),
    ("absolute path", {"a": "/etc/one.safetensors"}, "plain name"),
    ("windows path", {"a": "c:\\one.safetensors"}, "plain name"),
    ("sub folder", {"a": "sub/one.safetensors"}, "plain name"),
    ("another format", {"a": "pytorch_model.bin"}, "plain name"),
    ("not a name", {"a": 3}, "plain name"),
    ("missing shard", {"a": "one.safetensors", "c": "three.safetensors"}, "1 of 2 shards are missing, first three"),
]
# An index that is wrong about tensors that are there all the same.
MISTAKES = [
    ("absent tensor", {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "that no shard has"),
    ("unlisted tensor", {"a": "one.safetensors", "c": "two.safetensors"}, "does not list all tensors"),
    ("tensor elsewhere", {"a": "one.safetensors", "b": "one.safetensors"}, "in another shard"),
    ("swapped", {"a": "two.safetensors", "b": "one.safetensors"}, "in another shard"),
    ("other names of shards", {"a": "one.safetensors", "b": "three.safetensors"}, "in another shard"),
]


@pytest.mark.parametrize(("places", "words"), [case[1:] for case in PLACES], ids=[case[0] for case in PLACES])
def test_refuses_a_bad_index(places: Any, words: str, tmp_path: Path) -> None:
    sharded(tmp_path, places)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("places", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_an_index_with_mistakes_is_told(
    places: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded(tmp_path, places)
    tensors = open_checkpoint(tmp_path)
    assert {name: tensor.listed for name, tensor in tensors.items()} == {name: name in places for name in "ab"}
    assert words in caplog.text and INDEX in caplog.text


def test_a_tensor_in_two_shards_is_read_from_the_listed_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sharded(tmp_path, {"a": "two.safetensors", "b": "two.safetensors"})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    save_file({"a": np.full(2, 7, np.float32), "b": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    assert open_checkpoint(tmp_path)["a"].read()[0] == 7
    assert "1 tensors are in several files, first a, which is read from" in caplog.text
    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' has shape \(3,\), but \(2,\) in one"):
        open_checkpoint(tmp_path)


def test_refuses_a_broken_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(tmp_path)


def test_never_opens_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        open_checkpoint(tmp_path)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)
