"""Qwen2.5-VL, Qwen3-VL and language models alone: published sizes, other layouts, experts either way round."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters import decoder
from mmjax.converters.safetensors import open_checkpoint
from mmjax.converters.table import EmptyHoleError, Table, WrongShapeError, convert, plan

import tiny_families.qwen2_5_vl
import tiny_families.qwen3_moe
import tiny_families.qwen3_vl
import tiny_families.qwen3_vl_moe
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs

Shape = tuple[int, ...]
Make = Callable[[str], Path]
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_moe")


@dataclasses.dataclass
class Header:
    """A tensor of which only the shape is known, or an array."""

    shape: Shape
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


@dataclasses.dataclass
class Value:
    """A tensor in memory."""

    array: np.ndarray

    @property
    def shape(self) -> Shape:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self) -> np.ndarray:
        return self.array


def parameters(config: dict[str, Any], files: Mapping[str, Any], tied: bool) -> tuple[Any, Table, dict[str, Shape]]:
    """(configuration, table, shapes of the parameters) of a config.json."""
    family = Family.of(config)
    made = family.config.from_hf(config, files, tied=tied)
    return made, family.table, {path: leaf.shape for path, leaf in param_specs(family, made)[1].items()}


def directory(where: Path) -> tuple[Any, Table, dict[str, Shape]]:
    files = {file.name: json.loads(file.read_text()) for file in where.glob("*config.json")}
    return parameters(files["config.json"], files, tied=False)


OLD = {"tower_layers": 32, "tower_width": 1280, "tower_mlp": 3420, "tower_heads": 16}
NEW = {"tower_layers": 27, "tower_width": 1152, "tower_mlp": 4304, "tower_heads": 16}
MEDIUM = {"tower_layers": 24, "tower_width": 1024, "tower_mlp": 4096, "tower_heads": 16}
ROUTED = {"width": 2048, "mlp": 6144, "heads": 32, "kv_heads": 4}
PUBLISHED: Mapping[str, tuple[Any, dict[str, int], int, bool]] = {
    "Qwen2.5-VL-3B": (
        tiny_families.qwen2_5_vl,
        {"width": 2048, "mlp": 11008, "layers": 36, "heads": 16, "kv_heads": 2, **OLD},
        151936,
        True,
    ),
    "Qwen2.5-VL-7B": (
        tiny_families.qwen2_5_vl,
        {"width": 3584, "mlp": 18944, "layers": 28, "heads": 28, "kv_heads": 4, **OLD},
        152064,
        False,
    ),
    "Qwen3-VL-4B": (
        tiny_families.qwen3_vl,
        {"width": 2560, "mlp": 9728, "layers": 36, "heads": 32, "kv_heads": 8, **MEDIUM},
        151936,
        True,
    ),
    "Qwen3-VL-30B-A3B": (tiny_families.qwen3_vl_moe, {**ROUTED, "layers": 48, **NEW}, 151936, False),
    "Qwen3-30B-A3B, five layers": (tiny_families.qwen3_moe, {**ROUTED, "layers": 5, **NEW}, 151936, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor has a parameter of its shape, and every parameter its tensor."""
    module, size, vocabulary, tied = PUBLISHED[name]
    for constant, value in {"HEAD": 128, "SIDE": 48, "TAPS": 3, "EXPERTS": 128, "TOP": 8}.items():
        monkeypatch.setattr(tiny_families.qwen3_vl, constant, value)
    monkeypatch.setattr(tiny_families.qwen3_vl, "expert_mlp", lambda size: 768)
    _, files, tensors = module.build(size)
    config = files["config.json"]
    text = config.get("text_config", config)
    text["vocab_size"] = vocabulary
    if "rope_scaling" in text:
        sections = [24, 20, 20] if "Qwen3" in name else [16, 24, 24]
        text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": sections}
    embed = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors[embed] = tensors["lm_head.weight"] = (vocabulary, size["width"])
    if tied:
        del tensors["lm_head.weight"]
    made, table, shapes = parameters(config, files, tied)
    result = plan({key: Header(shape) for key, shape in tensors.items()}, table, shapes)
    assert set(result.claimed) == set(tensors) and not result.ignored
    if "VL" in name:
        assert made.spec.max_item_embeds == 16384
        assert made.spec.mm_embed_dim == size["width"] * (4 if "Qwen3" in name else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_checkpoints_and_newer_names(family: str, tiny_dir: Make) -> None:
    tensors = open_checkpoint(tiny_dir(family))
    _, table, shapes = directory(tiny_dir(family))
    usual = plan(tensors, table, shapes)
    assert set(usual.claimed) == set(tensors)
    if family == "qwen2_5_vl":
        newer = {re.sub("^model.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
        newer = {re.sub("^visual.", "model.visual.", name): tensor for name, tensor in newer.items()}
        assert len(plan(newer, table, shapes).claimed) == len(usual.claimed)
    for path, value in convert(tensors, table, shapes):
        assert value.shape == shapes[path] and value.flags.c_contiguous


def test_experts_saved_by_transformers_5_are_transposed(tiny_dir: Make) -> None:
    """The same names with [out, in] instead of [in, out]: the same parameters."""
    tensors = open_checkpoint(tiny_dir("qwen3_vl_moe"))
    _, table, shapes = directory(tiny_dir("qwen3_vl_moe"))
    transposed = {
        name: Value(tensor.read().swapaxes(1, 2)) if ".experts." in name else tensor for name, tensor in tensors.items()
    }
    for (path, usual), (_, other) in zip(
        convert(tensors, table, shapes), convert(transposed, table, shapes), strict=True
    ):
        np.testing.assert_array_equal(usual, other, path)
    halfway = {name: transposed[name] if "down_proj" in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(WrongShapeError, match="down_proj"):
        plan(halfway, table, shapes)


@pytest.mark.parametrize(("width", "mlp"), [(8, 4), (6, 6)])
def test_square_experts(width: int, mlp: int) -> None:
    """One of the two tensors is square and fits both layouts; the other says the layout of both."""
    rng, table = np.random.default_rng(0), Table(decoder.EXPERTS, otherwise=Table(decoder.TRANSPOSED_EXPERTS))
    layer = "text.layers.0.mlp"
    gate_up, down = rng.standard_normal((3, width, 2 * mlp)), rng.standard_normal((3, mlp, width))
    assert gate_up.shape[1] == gate_up.shape[2] or down.shape[1] == down.shape[2]
    shapes = {
        "text.layers.0.experts.router": (width, 3),
        "text.layers.0.experts.gate_up": (3, width, 2 * mlp),
        "text.layers.0.experts.down": (3, mlp, width),
    }
    for turn in (False, True):
        tensors = {
            f"{layer}.gate.weight": Value(np.zeros((3, width))),
            f"{layer}.experts.gate_up_proj": Value(gate_up.swapaxes(1, 2) if turn else gate_up),
            f"{layer}.experts.down_proj": Value(down.swapaxes(1, 2) if turn else down),
        }
        found = dict(convert(tensors, table, shapes))
        np.testing.assert_array_equal(found["text.layers.0.experts.gate_up"], gate_up)
        np.testing.assert_array_equal(found["text.layers.0.experts.down"], down)


def test_experts_apart(tiny_dir: Make) -> None:
    """Expert j of layer i is at index j of the stack of layer i; a missing one is named in the error."""
    tensors = dict(open_checkpoint(tiny_dir("qwen3_moe")))
    _, table, shapes = directory(tiny_dir("qwen3_moe"))
    stacks = {path: value for path, value in convert(tensors, table, shapes) if ".experts." in path}
    assert not any("layers.0." in path for path in stacks), "the first layer has none"
    for j in range(tiny_families.qwen3_vl.EXPERTS):
        down = tensors[f"model.layers.1.mlp.experts.{j}.down_proj.weight"].read()
        np.testing.assert_array_equal(stacks["text.layers.1.experts.down"][j], down.T)
        gate = tensors[f"model.layers.1.mlp.experts.{j}.gate_proj.weight"].read()
        np.testing.assert_array_equal(stacks["text.layers.1.experts.gate_up"][j, :, : len(gate)], gate.T)
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    with pytest.raises(EmptyHoleError, match=r"experts\.4\.up_proj"):
        plan(tensors, table, shapes)
