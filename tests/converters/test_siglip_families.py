"""LLaVA-OneVision and MiniCPM-V: every published tensor has a parameter, at every published size, in every layout."""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters.safetensors import open_checkpoint
from mmjax.converters.table import Shape, Table, convert, plan

from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from tiny_families import llava_onevision, minicpmv

FAMILIES = {"llava_onevision": "llava_onevision", "minicpmv": "minicpmv26"}  # and their reference checkpoints
LAYOUTS = {  # published name -> since transformers 4.52, as transformers 5 saves it
    "llava_onevision": [
        {
            r"language_model\.model\.": "model.language_model.",
            r"vision_tower\.": "model.vision_tower.",
            r"multi_modal_projector\.": "model.multi_modal_projector.",
            r"image_newline": "model.image_newline",
        },
        {
            r"language_model\.model\.": "model.language_model.",
            r"vision_tower\.vision_model\.": "model.vision_tower.",
            r"multi_modal_projector\.": "model.multi_modal_projector.",
            r"image_newline": "model.image_newline",
        },
        {r"vision_tower\.vision_model\.": "vision_tower."},
    ],
}
TOWER = {"tower_width": 1152, "tower_mlp": 4304, "tower_heads": 16}
PUBLISHED = {  # name -> family, sizes, vocabulary, whether the head is the embedding
    "0.5b": ("llava_onevision", {"width": 896, "mlp": 4864, "layers": 24, "heads": 14, "kv_heads": 2}, 152000, True),
    "7b": ("llava_onevision", {"width": 3584, "mlp": 18944, "layers": 28, "heads": 28, "kv_heads": 4}, 152128, False),
    "2.6": ("minicpmv", {"width": 3584, "mlp": 18944, "layers": 28, "heads": 28, "kv_heads": 4}, 151666, False),
}


@dataclasses.dataclass(frozen=True)
class Header:
    """A tensor of which only the header is known."""

    shape: Shape
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def read(self) -> np.ndarray:
        raise AssertionError("nothing is read to make a plan")


def table(family: str) -> Table:
    found: Table = importlib.import_module(f"mmjax.converters.{family}").TABLE
    return found


def wanted(config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> dict[str, Shape]:
    family = Family.of(config)
    _, leaves = param_specs(family, family.config.from_hf(config, files, tied=tied))
    return {path: leaf.shape for path, leaf in leaves.items()}


def of(directory: Path, *, tied: bool) -> dict[str, Shape]:
    files = {file.name: json.loads(file.read_text()) for file in directory.glob("*config.json")}
    return wanted(files["config.json"], files, tied=tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_tiny_checkpoint_has_a_parameter(family: str, tiny_dir: Callable[[str], Path]) -> None:
    tensors, shapes = open_checkpoint(tiny_dir(family)), of(tiny_dir(family), tied=family == "llava_onevision")
    result = plan(tensors, table(family), shapes)
    assert set(result.claimed) | set(result.ignored) == set(tensors)
    assert all("post_layernorm" in name and family == "llava_onevision" for name in result.ignored)
    for path, value in convert(tensors, table(family), shapes):
        assert value.shape == shapes[path]


@pytest.mark.parametrize("layout", range(3))
def test_other_layouts_give_the_same_plan(layout: int, tiny_dir: Callable[[str], Path]) -> None:
    family = "llava_onevision"
    tensors, shapes = open_checkpoint(tiny_dir(family)), of(tiny_dir(family), tied=True)

    def renamed(name: str) -> str:
        names = LAYOUTS[family][layout].items()
        return next((new + name[m.end() :] for old, new in names if (m := re.match(old, name))), name)

    usual = plan(tensors, table(family), shapes)
    other = plan({renamed(name): tensor for name, tensor in tensors.items()}, table(family), shapes)
    assert other.claimed == tuple(map(renamed, usual.claimed))


def test_unused_tensors_are_ignored(tiny_dir: Callable[[str], Path]) -> None:
    """Pooling heads, tables that follow from the sizes, and layers above the chosen one."""
    for family, prefix in (("llava_onevision", "vision_tower.vision_model."), ("minicpmv", "vpm.")):
        tensors = dict(open_checkpoint(tiny_dir(family)))
        some = tensors[f"{prefix}post_layernorm.weight"]
        more = [f"{prefix}head.probe", f"{prefix}embeddings.position_ids"]
        more += [f"{prefix}encoder.layers.3.layer_norm1.weight", f"{prefix}encoder.layers.3.layer_norm1.bias"]
        more += ["resampler.pos_embed"] if family == "minicpmv" else []
        shapes = of(tiny_dir(family), tied=family == "llava_onevision")
        assert set(more) <= set(plan(tensors | dict.fromkeys(more, some), table(family), shapes).ignored)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """From config.json and the names and shapes of the tensors alone; sizes for the engine as documented."""
    family, size, vocabulary, tied = PUBLISHED[name]
    size = {**size, **TOWER, "tower_layers": 26 if family == "llava_onevision" else 27}
    if family == "llava_onevision":
        edges = range(384, 2305, 384)
        config = llava_onevision.configuration(size, vocabulary, 384, [[h, w] for h in edges for w in edges])
        tensors, prepare = llava_onevision.shapes(size, vocabulary, 384), {"image_mean": [0.5] * 3}
        prepare["image_std"] = prepare["image_mean"]
    else:
        config = minicpmv.configuration(size, vocabulary, 448, 64)
        tensors, prepare = minicpmv.shapes(size, vocabulary, 64), {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
        prepare |= {"scale_resolution": 448, "max_slice_nums": 9}
    if not tied and family == "llava_onevision":
        tensors["language_model.lm_head.weight"] = (vocabulary, size["width"])
    shapes = wanted(config, {"preprocessor_config.json": prepare}, tied=tied)
    plan({tensor: Header(shape) for tensor, shape in tensors.items()}, table(family), shapes)
    found = Family.of(config)
    shape = found.config.from_hf(config, {"preprocessor_config.json": prepare}, tied=tied).spec
    encoder = shape.encoders["vision"]
    if family == "llava_onevision":
        assert (encoder.embeds_per_group, encoder.max_item_inputs) == (756, 64)
        assert shape.max_item_embeds == 729 + 7938 + 6 * 27
    else:
        assert (encoder.group_size, encoder.embeds_per_group, shape.max_item_embeds) == (512, 64, 640)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_reference_checkpoint_has_a_parameter(family: str, shared: Path) -> None:
    directory = shared / "reference" / FAMILIES[family]
    tensors = open_checkpoint(directory)
    result = plan(tensors, table(family), of(directory, tied=family == "llava_onevision"))
    assert set(result.claimed) | set(result.ignored) == set(tensors)


def test_other_minicpm_versions_are_refused(tiny_dir: Callable[[str], Path]) -> None:
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir("minicpmv").glob("*config.json")}
    files["config.json"]["version"] = 2.5
    with pytest.raises(ValueError, match=r"2\.5 is another model"):
        wanted(files["config.json"], files, tied=False)


WRONG: dict[str, dict[str, Any]] = {
    r"vision_feature_layer \[-1, 7\] is not supported": {"vision_feature_layer": [-1, 7]},
    r"vision_feature_layer \[\] is not supported": {"vision_feature_layer": []},
    "vision_feature_select_strategy 'default' is not supported": {"vision_feature_select_strategy": "default"},
    "vision_feature_select_strategy 'cls' is not supported": {"vision_feature_select_strategy": "cls"},
    "model_type 'pixtral' is not supported": {"vision_config": {"model_type": "pixtral"}},
    "model_type 'gemma2' is not supported": {"text_config": {"model_type": "gemma2"}},
    "projector_hidden_act 'laplace' is not supported": {"projector_hidden_act": "laplace"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_supported_is_named(message: str, tiny_dir: Callable[[str], Path]) -> None:
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir("llava_onevision").glob("*config.json")}
    files["config.json"] |= WRONG[message]
    with pytest.raises(ValueError, match=message):
        wanted(files["config.json"], files, tied=True)
