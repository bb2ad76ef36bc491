"""Phi-3.5-vision: every published tensor has a parameter, at the published size too; the embedding twice."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters import transforms as to
from mmjax.converters.phi3_v import TABLE
from mmjax.converters.safetensors import open_checkpoint
from mmjax.converters.table import ConversionError, Shape, plan

from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from tiny_families import phi3_v

WTE = "model.vision_embed_tokens.wte.weight"
SIZE = {"width": 3072, "mlp": 8192, "layers": 32, "heads": 32, "kv_heads": 32}
TOWER = {"tower_width": 1024, "tower_mlp": 4096, "tower_layers": 24, "tower_heads": 16}


@dataclasses.dataclass(frozen=True)
class Header:
    """A tensor of which only the header is known."""

    shape: Shape
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def read(self) -> np.ndarray:
        raise AssertionError("nothing is read to make a plan")


def wanted(config: dict[str, Any], files: Mapping[str, dict[str, Any]]) -> dict[str, Shape]:
    family = Family.of(config)
    _, leaves = param_specs(family, family.config.from_hf(config, files, tied=False))
    return {path: leaf.shape for path, leaf in leaves.items()}


def of(directory: Path) -> dict[str, Shape]:
    files = {file.name: json.loads(file.read_text()) for file in directory.glob("*config.json")}
    return wanted(files["config.json"], files)


def check(tensors: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    result = plan(tensors, TABLE, shapes)
    assert set(result.claimed) | set(result.ignored) == set(tensors)
    assert all("post_layernorm" in name or f"layers.{last(tensors)}." in name for name in result.ignored)


def last(tensors: Mapping[str, Any]) -> int:
    """The layer of the tower that is not used."""
    return max(int(name.split(".layers.")[1].split(".")[0]) for name in tensors if "encoder.layers." in name)


def test_tiny_and_reference_checkpoints(tiny_dir: Callable[[str], Path]) -> None:
    check(open_checkpoint(tiny_dir("phi3_v")), of(tiny_dir("phi3_v")))


def test_reference_checkpoint(shared: Path) -> None:
    check(open_checkpoint(shared / "reference/phi3v"), of(shared / "reference/phi3v"))


def test_published_size() -> None:
    config = phi3_v.configuration(SIZE | TOWER, 32064)
    tensors = phi3_v.shapes(SIZE | TOWER, 32064, 336)
    files = {"preprocessor_config.json": {"num_crops": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    check({name: Header(shape) for name, shape in tensors.items()}, wanted(config, files))
    found = Family.of(config).config.from_hf(config, files, tied=False)
    assert (found.text.head_dim, found.text.num_kv_heads, found.text.max_positions) == (96, 32, 131072)
    assert found.text.rope.attention_factor == pytest.approx(1.1902, abs=1e-4)
    encoder = found.spec.encoders["vision"]
    assert (encoder.embeds_per_group, encoder.max_item_inputs, found.spec.max_item_embeds) == (157, 17, 17 * 156 + 1)


def test_the_embedding_may_have_another_name(tiny_dir: Callable[[str], Path]) -> None:
    tensors, shapes = dict(open_checkpoint(tiny_dir("phi3_v"))), of(tiny_dir("phi3_v"))
    assert plan(tensors | {WTE: tensors["model.embed_tokens.weight"]}, TABLE, shapes).ignored[-1] == WTE
    tensors[WTE] = tensors.pop("model.embed_tokens.weight")
    assert plan(tensors, TABLE, shapes).pieces["text.embed"][0].sources == (WTE,)
    del tensors[WTE]
    with pytest.raises(ConversionError, match=r"'text\.embed'"):
        plan(tensors, TABLE, shapes)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hd_transform_order", "glb", "hd_transform_order 'glb' is not supported"),
        ("use_hd_transform", False, "not supported"),
        ("with_learnable_separator", False, "not supported"),
    ],
)
def test_other_layouts_of_images(key: str, value: Any, words: str, tiny_dir: Callable[[str], Path]) -> None:
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir("phi3_v").glob("*config.json")}
    files["config.json"]["embd_layer"][key] = value
    with pytest.raises(ValueError, match=words):
        wanted(files["config.json"], files)


def test_fused_tensors_are_those_of_their_parts() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((rows, 5)) for rows in (12, 6, 6))
    shape = (5, 2, 4, 3)
    np.testing.assert_array_equal(
        to.regroup_qkv(np.concatenate([q, k, v]), shape=shape), to.fuse_qkv(q, k, v, shape=shape)
    )
    assert to.regroup_qkv.sources(shape) == ((24, 5),)
    gate, up = rng.standard_normal((2, 7, 5))
    both = to.split_gate_up(np.concatenate([gate, up]), shape=(5, 2, 7))
    np.testing.assert_array_equal(both, to.fuse_gate_up(gate, up, shape=(5, 2, 7)))
    assert to.split_gate_up.sources((5, 2, 7)) == ((14, 5),)
    assert to.flatten(2).sources((4,)) == ((1, 1, 4),)
