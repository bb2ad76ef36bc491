"""`mmjax inspect`: every tensor is counted, with the parameter that it becomes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mmjax.converters import llava
from mmjax.converters.inspect import describe, render, size
from mmjax.converters.orbax import convert_checkpoint
from mmjax.converters.safetensors import CheckpointError, open_checkpoint

import tiny

Expected = Callable[[str, Path], dict[str, tuple[int, ...]]]


def test_counts_every_tensor_once(tmp_path: Path) -> None:
    directory = tiny.make("llava", tmp_path, shards=2)
    found = describe(directory)
    tensors = open_checkpoint(directory)
    assert (found.format, found.model_type) == ("safetensors", "llava")
    assert found.architecture == "LlavaForConditionalGeneration"
    assert found.total.tensors == len(tensors) and found.total.nbytes == sum(t.nbytes for t in tensors.values())
    for parts in (found.dtypes, found.shards, found.prefixes):
        assert sum(tally.tensors for tally in parts.values()) == len(tensors)
        assert sum(tally.nbytes for tally in parts.values()) == found.total.nbytes
    assert list(found.dtypes) == ["float32"] and len(found.shards) == 2 and found.plan is None
    assert "language_model.model.layers" in found.prefixes and "multi_modal_projector.linear_1" in found.prefixes


def test_tells_claimed_ignored_and_problems(tmp_path: Path, expected: Expected) -> None:
    directory = tiny.make("llava", tmp_path)
    found = describe(directory, table=llava.TABLE, shapes={**expected("llava", directory), "text.extra": (3,)})
    assert found.plan is not None and len(found.plan.ignored) == 18 and len(found.plan.problems) == 1
    text = render(found)
    for words in (
        "LlavaForConditionalGeneration",
        "float32",
        "model.safetensors",
        "18 ignored",
        "1 problems",
        "ignored  vision_tower.vision_model.post_layernorm.bias",
        "'text.extra'",
    ):
        assert words in text


def test_describes_a_converted_checkpoint(tmp_path: Path, expected: Expected) -> None:
    src = tiny.make("llava", tmp_path / "src")
    shapes = expected("llava", src)
    convert_checkpoint(src, tmp_path / "out", table=llava.TABLE, shapes=shapes)
    found = describe(tmp_path / "out", table=llava.TABLE, shapes=shapes)
    assert (found.format, found.model_type, found.total.tensors) == ("orbax", "llava", len(shapes))
    assert found.plan is not None and not found.plan.problems and not found.plan.ignored
    assert "orbax" in render(found) and describe(tmp_path / "out").plan is None
    missing = {**shapes, "text.norm": (7,)}
    found = describe(tmp_path / "out", shapes=missing)
    assert found.plan is not None and len(found.plan.problems) == 1


def test_works_without_a_config_and_refuses_a_broken_one(tmp_path: Path) -> None:
    directory = tiny.make("llava", tmp_path)
    for text in ("{", "[]"):
        (directory / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            describe(directory)
    (directory / "config.json").unlink()
    assert "not told" in render(describe(directory))


SIZES = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB"), (5 << 50, "5120.0 TiB")]


@pytest.mark.parametrize(("nbytes", "text"), SIZES)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
