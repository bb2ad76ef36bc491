"""Converted checkpoints: the same bits, restorable by stock Orbax, written without the whole model in memory."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from mmjax.converters import llava, qwen2_vl, whisper
from mmjax.converters.manifest import MANIFEST, is_orbax, read_manifest
from mmjax.converters.orbax import convert_checkpoint, open_converted
from mmjax.converters.safetensors import CheckpointError, open_checkpoint
from mmjax.converters.table import ConversionError, Table, convert
from safetensors.numpy import load_file, save_file

import tiny

TABLES: dict[str, Table] = {"llava": llava.TABLE, "qwen2_vl": qwen2_vl.TABLE, "whisper": whisper.TABLE}
Shapes = dict[str, tuple[int, ...]]
Case = tuple[Path, Table, Shapes]


@pytest.fixture
def case(tiny_dir: Callable[[str], Path], expected: Callable[[str, Path], Shapes]) -> Case:
    return tiny_dir("qwen2_vl"), TABLES["qwen2_vl"], expected("qwen2_vl", tiny_dir("qwen2_vl"))


def same_bits(one: Any, two: Any) -> bool:
    one, two = np.asarray(one), np.asarray(two)
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


@pytest.mark.parametrize("family", TABLES)
def test_round_trip_is_bit_exact(
    family: str, tiny_dir: Callable[[str], Path], expected: Callable[[str, Path], Shapes], tmp_path: Path
) -> None:
    src, shapes = tiny_dir(family), expected(family, tiny_dir(family))
    seen: list[tuple[str, int, int]] = []
    convert_checkpoint(
        src,
        tmp_path / "out",
        table=TABLES[family],
        shapes=shapes,
        progress=lambda path, done, total: seen.append((path, done, total)),
    )
    leaves = open_converted(tmp_path / "out")
    values = dict(convert(open_checkpoint(src), TABLES[family], shapes))
    assert set(leaves) == set(values) == {path for path, _, _ in seen}
    assert all(same_bits(leaves[path].read(), value) for path, value in values.items())
    assert seen[-1][1] == seen[-1][2] == sum(value.nbytes for value in values.values())


def test_stock_orbax_restores_it(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    convert_checkpoint(src, tmp_path / "out", table=table, shapes=shapes)
    values = dict(convert(open_checkpoint(src), table, shapes))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out")
        assert set(restored) == set(values) and all(same_bits(restored[path], value) for path, value in values.items())
        mesh = jax.make_mesh((2,), ("x",))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        wanted = {
            path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=split if path == "text.embed" else None)
            for path, value in values.items()
        }
        placed = checkpointer.restore(tmp_path / "out", wanted)
        assert placed["text.embed"].sharding == split and same_bits(placed["text.embed"], values["text.embed"])


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (ml_dtypes.bfloat16, None),
        (np.float16, None),
        (np.float32, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
    ],
)
def test_dtypes(stored: Any, wanted: Any, case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    (tmp_path / "src").mkdir()
    save_file(
        {name: value.astype(stored) for name, value in load_file(src / "model.safetensors").items()},
        tmp_path / "src" / "model.safetensors",
    )
    convert_checkpoint(tmp_path / "src", tmp_path / "out", table=table, shapes=shapes, dtype=wanted)
    leaves = open_converted(tmp_path / "out")
    for path, value in convert(open_checkpoint(tmp_path / "src"), table, shapes):
        assert same_bits(leaves[path].read(), value.astype(wanted or stored))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and list(manifest["source_dtypes"]) == [np.dtype(stored).name]
    assert list(manifest["dtypes"]) == [np.dtype(wanted or stored).name]


def test_a_part_is_read_alone(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    convert_checkpoint(src, tmp_path / "out", table=table, shapes=shapes)
    leaf = open_converted(tmp_path / "out")["vision.layers.fc1"]
    assert leaf.shape == shapes["vision.layers.fc1"] and leaf.nbytes == leaf.read().nbytes
    assert same_bits(leaf.read((slice(1, 2), slice(None), slice(0, 5))), leaf.read()[1:2, :, 0:5])


def test_shards_become_the_same_checkpoint(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    tiny.make("qwen2_vl", tmp_path / "src", shards=4)
    for name in (src, tmp_path / "src"):
        convert_checkpoint(name, tmp_path / f"{name.name}-out", table=table, shapes=shapes)
    one, many = open_converted(tmp_path / f"{src.name}-out"), open_converted(tmp_path / "src-out")
    assert all(same_bits(one[path].read(), many[path].read()) for path in shapes)


def test_text_files_travel_and_weights_do_not(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    shutil.copytree(src, tmp_path / "src")
    (tmp_path / "src" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "src" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "src" / "modeling.py").write_text("raise SystemExit")
    convert_checkpoint(tmp_path / "src", tmp_path / "out", table=table, shapes=shapes)
    for name in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    assert not [
        *(tmp_path / "out").glob("*.safetensors"),
        *(tmp_path / "out").glob("*.bin"),
        *(tmp_path / "out").glob("*.py"),
    ]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    total = sum(tensor.nbytes for tensor in open_checkpoint(src).values())
    assert manifest == {
        "format": 3,
        "family": "qwen2_vl",
        "source_dtypes": {"float32": len(open_checkpoint(src))},
        "dtypes": {"float32": len(shapes)},
        "tensors": len(shapes),
        "bytes": total,
    }
    assert is_orbax(tmp_path / "out") and not is_orbax(src)


def test_refuses_an_occupied_destination(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="nothing is overwritten"):
            convert_checkpoint(src, tmp_path / name, table=table, shapes=shapes)
    (tmp_path / "empty").mkdir()
    convert_checkpoint(src, tmp_path / "empty", table=table, shapes=shapes)
    assert is_orbax(tmp_path / "empty") and (tmp_path / "full" / "precious").exists()


def test_failures_leave_nothing_behind(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, table, shapes = case

    def stop(path: str, done: int, total: int) -> None:
        raise KeyboardInterrupt if done == total else RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        convert_checkpoint(src, tmp_path / "out", table=table, shapes=shapes, progress=stop)
    with pytest.raises(ConversionError, match="extra"):
        convert_checkpoint(src, tmp_path / "out", table=table, shapes={**shapes, "extra": (1,)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1000 bytes free"):
        convert_checkpoint(src, tmp_path / "out", table=table, shapes=shapes)
    assert list(tmp_path.iterdir()) == []


def test_refuses_damaged_checkpoints(case: Case, tmp_path: Path) -> None:
    src, table, shapes = case
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        open_converted(src)
    convert_checkpoint(src, tmp_path / "out", table=table, shapes=shapes)
    manifest = tmp_path / "out" / MANIFEST
    for text, words in (
        ("{", "damaged"),
        ('{"format": 3}', "damaged"),
        ('{"format": 2, "tensors": 1}', "convert the checkpoint again"),
        ('{"format": 3, "tensors": 1}', "speaks of 1 tensors"),
    ):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            open_converted(tmp_path / "out")
    manifest.unlink()
    assert len(open_converted(tmp_path / "out")) == len(shapes)
    for data in (tmp_path / "out").glob("**/manifest.ocdbt"):
        data.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        open_converted(tmp_path / "out")


def test_nested_trees_of_others_are_read_too(tmp_path: Path) -> None:
    weight = np.arange(6.0).reshape(2, 3)
    tree = {"text": {"layers": [{"w": weight}], "norm": np.ones(2, np.float32)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "out", tree)
    leaves = open_converted(tmp_path / "out")
    assert set(leaves) == {"text.layers.0.w", "text.norm"}
    assert same_bits(leaves["text.layers.0.w"].read(), weight)


MEMORY = """
    import resource, sys
    import jax
    from mmjax.converters import orbax
    from mmjax.converters.table import Rule, Table
    from mmjax.converters.transforms import transpose

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = Table((Rule("w.{i}", "p.{i}", transpose),))
    jax.devices()
    before = peak()
    orbax.convert_checkpoint(sys.argv[1], sys.argv[2], table=table, shapes={f"p.{i}": (1000, 5000) for i in range(12)})
    print(peak() - before)
"""


def test_memory_stays_at_one_shard(tmp_path: Path) -> None:
    """Six shards of 40 MB: the peak grows by less than two of them, memory-mapped pages included."""
    places = {}
    for i in range(12):
        file = f"model-{i // 2}.safetensors"
        places[f"w.{i}"] = file
        if i % 2:
            rows = np.random.default_rng(i).standard_normal((2, 5000, 1000), dtype=np.float32)
            save_file({f"w.{i - 1}": rows[0], f"w.{i}": rows[1]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEMORY), str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80e6
