"""Audio families: every published tensor has a parameter, at the published sizes and in whichever checkpoint it is."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters.table import Shape, convert, plan
from safetensors.numpy import load_file, save_file

import tiny
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from mmjax.spec import ModelSpec as Sizes
from tiny_families import qwen2_audio, ultravox

FAMILIES = {"qwen2_audio": False, "ultravox": True}  # and whether the head is the embedding
LARGE = {"tower_width": 1280, "tower_mlp": 5120, "tower_heads": 20, "tower_layers": 32}
LAYOUTS = {  # published prefix -> since transformers 4.52
    "qwen2_audio": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "audio_tower.": "model.audio_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
EXTRACTOR = {"sampling_rate": 16000, "n_fft": 400, "hop_length": 160, "feature_size": 128, "chunk_length": 30}
Make = Callable[[str], Path]


@dataclasses.dataclass
class Header:
    """A tensor of which only the shape is known."""

    shape: Shape
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


def fits(config: dict[str, Any], tensors: Mapping[str, Shape], *, tied: bool) -> Sizes:
    """Every tensor of a checkpoint is claimed, and every parameter is filled."""
    family = Family.of(config)
    made = family.config.from_hf(config, {"preprocessor_config.json": EXTRACTOR}, tied=tied)
    shapes = {path: leaf.shape for path, leaf in param_specs(family, made)[1].items()}
    assert not plan({name: Header(shape) for name, shape in tensors.items()}, family.table, shapes).ignored
    found: Sizes = made.spec
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_tiny_checkpoint_has_a_parameter(family: str, tiny_dir: Make) -> None:
    checkpoint = Checkpoint.open(str(tiny_dir(family)))
    shapes = {path: leaf.shape for path, leaf in param_specs(checkpoint.family, checkpoint.model_config())[1].items()}
    assert ("text.head" in shapes) != FAMILIES[family]
    result = plan(checkpoint.tensors, checkpoint.family.table, shapes)
    assert set(result.claimed) == set(checkpoint.tensors)
    for path, value in convert(checkpoint.tensors, checkpoint.family.table, shapes):
        assert value.shape == shapes[path]
    for old, new in LAYOUTS.get(family, {}).items():
        renamed = {
            name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in checkpoint.tensors.items()
        }
        assert len(plan(renamed, checkpoint.family.table, shapes).claimed) == len(renamed)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_reference_checkpoint_has_a_parameter(family: str, shared: Path) -> None:
    checkpoint = Checkpoint.open(str(shared / "reference" / family))
    shapes = {path: leaf.shape for path, leaf in param_specs(checkpoint.family, checkpoint.model_config())[1].items()}
    assert set(plan(checkpoint.tensors, checkpoint.family.table, shapes).claimed) == set(checkpoint.tensors)


def test_qwen2_audio_7b() -> None:
    """The published text_config leaves out what Qwen2Config fills in."""
    size = {"width": 4096, "mlp": 11008, "layers": 32, "heads": 32, "kv_heads": 32, **LARGE}
    config = qwen2_audio.configuration(size, 156032, 128, 1500) | {"audio_token_index": 151646}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        del config["text_config"][name]
    shape = fits(config, qwen2_audio.tensors(size, 156032, 128, 1500), tied=False)
    encoder = shape.encoders["audio"]
    assert (shape.num_layers, shape.hidden_size, shape.max_positions, shape.max_item_embeds) == (32, 4096, 8192, 750)
    assert (encoder.fields[0].shape, encoder.embeds_per_group, encoder.max_item_inputs) == ((195, 128), 48, 16)


def test_ultravox_1b() -> None:
    size = {"width": 2048, "mlp": 8192, "layers": 16, "heads": 32, "kv_heads": 8, **LARGE}
    config = ultravox.configuration(size, 128256, 128, 1500) | {"hidden_size": 4096}
    config["text_config"] |= {"max_position_embeddings": 131072}
    shape = fits(config, ultravox.tensors(size, 128256, 4096, 128, 1500), tied=True)
    encoder = shape.encoders["audio"]
    assert (shape.num_kv_heads, shape.head_dim, shape.max_positions, shape.max_item_embeds) == (8, 64, 131072, 4 * 188)
    assert (encoder.fields[0].shape, encoder.embeds_per_group, encoder.max_item_inputs) == ((195, 128), 12, 64)


@pytest.mark.parametrize("depth", [32, 4], ids=["large-v3", "turbo"])
def test_whisper_large(depth: int) -> None:
    size = {"width": 1280, "mlp": 5120, "heads": 20, "layers": depth, "tower_layers": 32}
    tensors = tiny._whisper_shapes(size, 51866, 128) | {"model.encoder.embed_positions.weight": (1500, 1280)}
    config = {
        "architectures": ["WhisperForConditionalGeneration"], "d_model": 1280, "encoder_layers": 32,
        "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_layers": depth, "decoder_attention_heads": 20,
        "decoder_ffn_dim": 5120, "activation_function": "gelu", "scale_embedding": False, "num_mel_bins": 128,
        "max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51866,
    }  # fmt: skip
    shape = fits(config, tensors, tied=True)
    assert (shape.num_layers, shape.cross_len, shape.max_positions, shape.vocab_size) == (depth, 1500, 448, 51866)
    assert shape.encoders["audio"].fields[0].shape == (480_000,)


# -- parts in other checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def apart(tiny_dir: Make, tmp_path: Path) -> dict[str, Path]:
    """Ultravox as it is published, a Llama and a Whisper beside it: "whole", "projector", "llama", "whisper"."""
    whole, weights = tiny_dir("ultravox"), load_file(tiny_dir("ultravox") / "model.safetensors")
    folders = {name: tmp_path / name for name in ("projector", "llama", "whisper")}
    shutil.copytree(whole, folders["projector"])
    config = json.loads((whole / "config.json").read_text())
    for name, part, here, there in (
        ("llama", "text_config", "language_model.", ""),
        ("whisper", "audio_config", "audio_tower.", "model.encoder."),
    ):
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config.pop(part)))
        mine = {there + key.removeprefix(here): weights.pop(key) for key in list(weights) if key.startswith(here)}
        if name == "whisper":
            mine["model.decoder.embed_tokens.weight"] = np.zeros((4, 4), np.float32)
        save_file(mine, folders[name] / "model.safetensors")
    config |= {"text_model_id": "meta-llama/none", "audio_model_id": str(folders["whisper"])}
    (folders["projector"] / "config.json").write_text(json.dumps(config))
    save_file(weights, folders["projector"] / "model.safetensors")
    return {"whole": whole, **folders}


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    _, specs = param_specs(checkpoint.family, checkpoint.model_config())
    readers = checkpoint.param_readers({path: spec.shape for path, spec in specs.items()})
    return {path: read(()) for path, read in readers}


def test_parts_in_other_checkpoints_make_the_same_model(apart: dict[str, Path], tmp_path: Path) -> None:
    from mmjax.converters.orbax import convert_checkpoint

    whole = Checkpoint.open(str(apart["whole"]))
    wanted = values(whole)
    overrides = {"text_model_id": str(apart["llama"])}
    joined = Checkpoint.open(str(apart["projector"]), overrides=overrides)
    assert joined.model_config() == whole.model_config()
    leaves = param_specs(joined.family, joined.model_config())[1]
    convert_checkpoint(
        joined.directory, tmp_path / "converted", table=joined.family.table,
        shapes={path: leaf.shape for path, leaf in leaves.items()}, tensors=joined.tensors, config=joined.config,
    )  # fmt: skip
    shutil.rmtree(apart["llama"])
    shutil.rmtree(apart["whisper"])
    for found in (joined, Checkpoint.open(str(tmp_path / "converted"))):
        parts = values(found)
        assert parts.keys() == wanted.keys()
        for path, value in wanted.items():
            np.testing.assert_array_equal(parts[path], value, path)


def test_a_checkpoint_with_all_parts_needs_no_other(apart: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(apart["whole"], tmp_path / "both")
    config = json.loads((tmp_path / "both/config.json").read_text()) | {"text_model_id": "meta-llama/none"}
    (tmp_path / "both/config.json").write_text(json.dumps(config))
    assert values(Checkpoint.open(str(tmp_path / "both"))).keys() == values(Checkpoint.open(str(apart["whole"]))).keys()


def test_a_missing_part_is_named_in_the_error(apart: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)text_model_id.*nowhere.*is neither.*hf_overrides"):
        Checkpoint.open(str(apart["projector"]), overrides={"text_model_id": "./no/where/nowhere"})


def test_unsupported_parts_are_refused(tiny_dir: Make) -> None:
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir("ultravox").glob("*config.json")}
    config = files["config.json"]
    for changed in ({"projector_act": "gelu"}, {"text_config": config["text_config"] | {"model_type": "gemma3"}}):
        with pytest.raises(ValueError, match="is not supported"):
            Family.of(config).config.from_hf(config | changed, files, tied=True)
