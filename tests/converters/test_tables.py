"""Every family's table against its published names, in all three layouts they come in, and against tiny checkpoints."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from mmjax.converters.safetensors import open_checkpoint
from mmjax.converters.table import Table, convert, plan

import tiny
from mmjax.loader.family import Family

FAMILIES = ("llava", "qwen2_vl", "whisper")
Expected = Callable[[str, Path], dict[str, tuple[int, ...]]]
TinyDir = Callable[[str], Path]

# published prefix -> the same tensors since transformers 4.52, as transformers 5 saves them, or from a bare model
LAYOUTS = {
    "llava": [
        [
            (r"language_model\.model\.", "model.language_model."),
            (r"language_model\.lm_head\.", "lm_head."),
            (r"vision_tower\.", "model.vision_tower."),
            (r"multi_modal_projector\.", "model.multi_modal_projector."),
        ],
        [
            (r"language_model\.model\.", "model.language_model."),
            (r"language_model\.lm_head\.", "lm_head."),
            (r"vision_tower\.vision_model\.", "model.vision_tower."),
            (r"multi_modal_projector\.", "model.multi_modal_projector."),
        ],
        [(r"vision_tower\.vision_model\.", "vision_tower.")],
    ],
    "qwen2_vl": [
        [(r"model\.", "model.language_model."), (r"visual\.", "model.visual.")],
        [(r"model\.", "language_model.model."), (r"visual\.", "model.visual.")],
    ],
    "whisper": [[(r"model\.", "")]],
}


def table(family: str) -> Table:
    return importlib.import_module(f"mmjax.converters.{family}").TABLE


@pytest.mark.parametrize("family", FAMILIES)
def test_claims_every_tensor_of_a_tiny_checkpoint(family: str, tiny_dir: TinyDir, expected: Expected) -> None:
    tensors = open_checkpoint(tiny_dir(family))
    shapes = expected(family, tiny_dir(family))
    result = plan(tensors, table(family), shapes)
    assert set(result.claimed) | set(result.ignored) == set(tensors)
    for path, value in convert(tensors, table(family), shapes):
        assert value.shape == shapes[path] and value.dtype == np.float32 and value.flags.c_contiguous


@pytest.mark.parametrize("family", FAMILIES)
def test_claims_every_published_name(family: str, shared: Path, expected: Expected) -> None:
    directory = shared / "reference" / family
    tensors = open_checkpoint(directory)
    result = plan(tensors, table(family), expected(family, directory))
    assert set(result.claimed) | set(result.ignored) == set(tensors)
    unused = r".*(encoder\.layers\.3\.|post_layernorm).*"
    assert all(family == "llava" and re.fullmatch(unused, name) for name in result.ignored)


def test_reads_a_published_whisper(shared: Path, expected: Expected) -> None:
    directory = shared / "models" / "whisper-tiny.en"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not a folder")
    tensors = open_checkpoint(directory)
    assert not plan(tensors, table("whisper"), expected("whisper", directory)).ignored


@pytest.mark.parametrize(
    ("family", "layout"), [(family, i) for family in FAMILIES for i in range(len(LAYOUTS[family]))]
)
def test_other_layouts_give_the_same_plan(family: str, layout: int, tiny_dir: TinyDir, expected: Expected) -> None:
    tensors = open_checkpoint(tiny_dir(family))
    shapes = expected(family, tiny_dir(family))

    def renamed(name: str) -> str:
        return next((new + name[m.end() :] for old, new in LAYOUTS[family][layout] if (m := re.match(old, name))), name)

    usual = plan(tensors, table(family), shapes)
    other = plan({renamed(name): tensor for name, tensor in tensors.items()}, table(family), shapes)
    assert other.claimed == tuple(map(renamed, usual.claimed))
    assert other.ignored == tuple(map(renamed, usual.ignored))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_declare_the_same_parameters(family: str, tiny_dir: TinyDir, expected: Expected) -> None:
    config = json.loads((tiny_dir(family) / "config.json").read_text())
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir(family).glob("*.json")}
    found = Family.of(config)
    state = nnx.state(found.model(found.config.from_hf(config, files, tied=family != "llava")))
    shapes = {".".join(map(str, path)): tuple(param.get_value().shape) for path, param in nnx.to_flat_state(state)}
    assert shapes == expected(family, tiny_dir(family))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_head_is_optional(family: str, tiny_dir: TinyDir, expected: Expected) -> None:
    tensors = dict(open_checkpoint(tiny_dir(family)))
    shapes = expected(family, tiny_dir(family))
    if shapes.pop("text.head", None) is None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert any("lm_head" in name for name in plan(tensors, table(family), shapes).ignored)


def test_tied_whisper_head_and_old_buffers_are_ignored(tiny_dir: TinyDir, expected: Expected) -> None:
    for family, like, names in (
        ("whisper", "model.decoder.embed_tokens.weight", ["proj_out.weight"]),
        (
            "llava",
            "language_model.model.norm.weight",
            [
                "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
                "vision_tower.vision_model.embeddings.position_ids",
            ],
        ),
        ("qwen2_vl", "model.norm.weight", ["visual.rotary_pos_emb.inv_freq"]),
    ):
        tensors = dict(open_checkpoint(tiny_dir(family)))
        ignored = plan(
            {**tensors, **{name: tensors[like] for name in names}}, table(family), expected(family, tiny_dir(family))
        ).ignored
        assert set(names) <= set(ignored)


def test_tiny_checkpoints_are_deterministic_and_follow_their_seed(tmp_path: Path) -> None:
    for family in FAMILIES:
        one, two, other = (tiny.make(family, tmp_path / f"{family}{i}", seed=i // 2) for i in range(3))
        for file in one.iterdir():
            assert file.read_bytes() == (two / file.name).read_bytes()
        assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    one, many = tiny.make("whisper", tmp_path / "one"), tiny.make("whisper", tmp_path / "many", shards=3)
    single, sharded = open_checkpoint(one), open_checkpoint(many)
    assert len({tensor.file for tensor in sharded.values()}) == 3
    assert set(single) == set(sharded)
    for name, tensor in single.items():
        np.testing.assert_array_equal(tensor.read(), sharded[name].read())


def test_sizes_can_be_chosen_but_not_misspelt(tmp_path: Path, expected: Expected) -> None:
    directory = tiny.make("qwen2_vl", tmp_path, layers=3, width=48, heads=6, kv_heads=3, tower_width=24, tower_mlp=96)
    plan(open_checkpoint(directory), table("qwen2_vl"), expected("qwen2_vl", directory))
    with pytest.raises(TypeError, match="depth"):
        tiny.make("qwen2_vl", tmp_path, depth=3)
