"""The Omni tables against the tensors of the published sizes, and checkpoints of the thinker alone."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters.safetensors import open_checkpoint
from mmjax.converters.table import EmptyHoleError, UnclaimedTensorError, plan
from safetensors.numpy import load_file, save_file

from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs

Shape = tuple[int, ...]
FAMILIES = ("qwen2_5_omni", "qwen3_omni_moe")


@dataclasses.dataclass
class Header:
    """A tensor of which only the shape is known."""

    shape: Shape
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


def dense(name: str, out: int, width: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def audio_tower(depth: int, width: int, mlp: int, key_bias: bool) -> Iterator[tuple[str, Shape]]:
    for i in range(depth):
        layer = f"thinker.audio_tower.layers.{i}."
        for x in ("q", "k", "v", "out"):
            yield from dense(f"{layer}self_attn.{x}_proj", width, width, key_bias or x != "k")
        yield from dense(layer + "fc1", mlp, width)
        yield from dense(layer + "fc2", width, mlp)
        yield from norm(layer + "self_attn_layer_norm", width)
        yield from norm(layer + "final_layer_norm", width)
    yield from norm("thinker.audio_tower.ln_post", width)


def attention(layer: str, width: int, heads: int, kv: int, head: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    for x, n in (("q", heads), ("k", kv), ("v", kv)):
        yield from dense(f"{layer}self_attn.{x}_proj", n * head, width, bias)
    yield from dense(layer + "self_attn.o_proj", width, heads * head, False)
    yield from norm(layer + "input_layernorm", width, False)
    yield from norm(layer + "post_attention_layernorm", width, False)


def qwen2_5_omni_7b() -> Iterator[tuple[str, Shape]]:
    width, vocab, seen = 3584, 152064, 1280
    yield "thinker.model.embed_tokens.weight", (vocab, width)
    yield "thinker.lm_head.weight", (vocab, width)
    yield from norm("thinker.model.norm", width, False)
    for i in range(28):
        layer = f"thinker.model.layers.{i}."
        yield from attention(layer, width, 28, 4, 128, True)
        for x, (out, into) in {"gate": (18944, width), "up": (18944, width), "down": (width, 18944)}.items():
            yield from dense(f"{layer}mlp.{x}_proj", out, into, False)
    yield "thinker.visual.patch_embed.proj.weight", (seen, 3, 2, 14, 14)
    for i in range(32):
        block = f"thinker.visual.blocks.{i}."
        for x in ("q", "k", "v", "proj"):
            yield from dense(f"{block}attn.{x}", seen, seen)
        for x, (out, into) in {"gate": (3420, seen), "up": (3420, seen), "down": (seen, 3420)}.items():
            yield from dense(f"{block}mlp.{x}_proj", out, into)
        yield from norm(block + "norm1", seen, False)
        yield from norm(block + "norm2", seen, False)
    yield from norm("thinker.visual.merger.ln_q", seen, False)
    yield from dense("thinker.visual.merger.mlp.0", 4 * seen, 4 * seen)
    yield from dense("thinker.visual.merger.mlp.2", width, 4 * seen)
    yield from [("thinker.audio_tower.conv1.weight", (1280, 128, 3)), ("thinker.audio_tower.conv1.bias", (1280,))]
    yield from [("thinker.audio_tower.conv2.weight", (1280, 1280, 3)), ("thinker.audio_tower.conv2.bias", (1280,))]
    yield from audio_tower(32, 1280, 5120, key_bias=False)
    yield from dense("thinker.audio_tower.proj", width, 1280)
    yield "thinker.audio_tower.audio_bos_eos_token.weight", (2, width)
    yield "talker.model.layers.0.mlp.up_proj.weight", (18944, 896)
    yield "token2wav.code2wav_dit_model.norm_out.linear.weight", (2048, 1024)


def qwen3_omni_30b() -> Iterator[tuple[str, Shape]]:
    width, vocab, seen = 2048, 152064, 1152
    yield "thinker.model.embed_tokens.weight", (vocab, width)
    yield "thinker.lm_head.weight", (vocab, width)
    yield from norm("thinker.model.norm", width, False)
    for i in range(48):
        layer = f"thinker.model.layers.{i}."
        yield from attention(layer, width, 32, 4, 128, False)
        yield from norm(layer + "self_attn.q_norm", 128, False)
        yield from norm(layer + "self_attn.k_norm", 128, False)
        yield from dense(layer + "mlp.gate", 128, width, False)
        for j in range(128):
            for x, (out, into) in {"gate": (768, width), "up": (768, width), "down": (width, 768)}.items():
                yield from dense(f"{layer}mlp.experts.{j}.{x}_proj", out, into, False)
    yield "thinker.visual.patch_embed.proj.weight", (seen, 3, 2, 16, 16)
    yield "thinker.visual.patch_embed.proj.bias", (seen,)
    yield "thinker.visual.pos_embed.weight", (2304, seen)
    for i in range(27):
        block = f"thinker.visual.blocks.{i}."
        yield from dense(block + "attn.qkv", 3 * seen, seen)
        yield from dense(block + "attn.proj", seen, seen)
        yield from dense(block + "mlp.linear_fc1", 4304, seen)
        yield from dense(block + "mlp.linear_fc2", seen, 4304)
        yield from norm(block + "norm1", seen)
        yield from norm(block + "norm2", seen)
    for name, size in {"merger": seen, **{f"merger_list.{i}": 4 * seen for i in range(3)}}.items():
        yield from norm(f"thinker.visual.{name}.ln_q", size)
        yield from dense(f"thinker.visual.{name}.mlp.0", 4 * seen, 4 * seen)
        yield from dense(f"thinker.visual.{name}.mlp.2", width, 4 * seen)
    for n, into in ((1, 1), (2, 480), (3, 480)):
        yield f"thinker.audio_tower.conv2d{n}.weight", (480, into, 3, 3)
        yield f"thinker.audio_tower.conv2d{n}.bias", (480,)
    yield from dense("thinker.audio_tower.conv_out", 1280, 480 * 16, False)
    yield from audio_tower(32, 1280, 5120, key_bias=True)
    yield from dense("thinker.audio_tower.proj1", 1280, 1280)
    yield from dense("thinker.audio_tower.proj2", width, 1280)
    yield "talker.model.layers.0.mlp.experts.0.up_proj.weight", (384, 1024)
    yield "code2wav.code_embedding.weight", (32768, 1024)


EARS = {"num_mel_bins": 128, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
EARS |= {"d_model": 1280}
PUBLISHED: dict[str, tuple[Callable[[], Iterator[tuple[str, Shape]]], dict[str, Any], dict[str, Any], dict[str, Any]]]
PUBLISHED = {
    "qwen2_5_omni": (
        qwen2_5_omni_7b,
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": {"mrope_section": [16, 24, 24]}},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
        | {"fullatt_block_indexes": [7, 15, 23, 31]},
        EARS | {"n_window": 100, "output_dim": 3584},
    ),
    "qwen3_omni_moe": (
        qwen3_omni_30b,
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | {"vocab_size": 152064, "rope_scaling": {"mrope_section": [24, 20, 20]}},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048}
        | {"deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304},
        EARS | {"n_window": 50, "n_window_infer": 800, "downsample_hidden_size": 480, "output_dim": 2048},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_tensor_has_a_parameter(family: str, tiny_dir: Callable[[str], Path]) -> None:
    names, text, vision, audio = PUBLISHED[family]
    files = {file.name: json.loads(file.read_text()) for file in tiny_dir(family).glob("*config.json")}
    config = files["config.json"]
    for part, sizes in (("text_config", text), ("vision_config", vision), ("audio_config", audio)):
        config["thinker_config"][part] |= sizes
    found = Family.of(config)
    shapes = {
        path: leaf.shape
        for path, leaf in param_specs(found, found.config.from_hf(config, files, tied=False))[1].items()
    }
    headers = {name: Header(shape) for name, shape in names()}
    result = plan(headers, found.table, shapes)
    silent = {name for name in headers if not name.startswith("thinker.") or "bos_eos" in name}
    assert set(result.ignored) == silent and set(result.claimed) == set(headers) - silent


def test_a_missing_layer_and_an_unknown_tensor_are_reported(tiny_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny_dir("qwen2_5_omni")))
    shapes = {path: leaf.shape for path, leaf in param_specs(checkpoint.family, checkpoint.model_config())[1].items()}
    tensors = dict(open_checkpoint(checkpoint.directory))
    with pytest.raises(UnclaimedTensorError, match="adapter"):
        plan({**tensors, "thinker.audio_tower.adapter.weight": Header((32, 32))}, checkpoint.family.table, shapes)
    del tensors["thinker.audio_tower.layers.1.fc1.weight"]
    with pytest.raises(EmptyHoleError, match="layer 1"):
        plan(tensors, checkpoint.family.table, shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thinker_alone_is_the_same_model(family: str, tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers saves it: config, names, and one file for all processors."""
    whole, alone = tiny_dir(family), tmp_path / "alone"
    shutil.copytree(whole, alone)
    config = json.loads((whole / "config.json").read_text())["thinker_config"]
    kind = {"qwen2_5_omni": "Qwen2_5Omni", "qwen3_omni_moe": "Qwen3OmniMoe"}[family]
    config["architectures"] = [f"{kind}ThinkerForConditionalGeneration"]
    (alone / "config.json").write_text(json.dumps(config))
    prepare = json.loads((alone / "preprocessor_config.json").read_text())
    (alone / "preprocessor_config.json").unlink()
    seen = {name: value for name, value in prepare.items() if not name.startswith(("feature", "sampling", "hop", "n_"))}
    (alone / "processor_config.json").write_text(json.dumps({"image_processor": seen, "feature_extractor": prepare}))
    weights = load_file(alone / "model.safetensors")
    renamed = {name.removeprefix("thinker."): value for name, value in weights.items()}
    save_file(renamed, alone / "model.safetensors")

    one, other = Checkpoint.open(str(whole)), Checkpoint.open(str(alone))
    assert one.model_config() == other.model_config()
    specs = param_specs(one.family, one.model_config())[1]
    shapes = {path: spec.shape for path, spec in specs.items()}
    for (path, ours), (same, theirs) in zip(one.param_readers(shapes), other.param_readers(shapes), strict=True):
        assert path == same
        np.testing.assert_array_equal(ours(()), theirs(()))
    processors = [found.family.processor(found.config, found.files, None) for found in (one, other)]
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    mels = [processor.process_item("audio", sound, {}).features["mel"] for processor in processors]
    np.testing.assert_array_equal(*mels)
    assert processors[0].pixel_bounds == processors[1].pixel_bounds


@pytest.mark.parametrize("prefix", ["thinker.model.", "model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_in_memory(family: str, prefix: str, tiny_dir: Callable[[str], Path]) -> None:
    """transformers has the parts side by side under `model.`."""
    checkpoint = Checkpoint.open(str(tiny_dir(family)))
    shapes = {path: leaf.shape for path, leaf in param_specs(checkpoint.family, checkpoint.model_config())[1].items()}

    def renamed(name: str) -> str:
        bare = name.removeprefix("thinker.")
        if bare.startswith("lm_head."):
            return prefix.removesuffix("model.") + bare
        return prefix + (bare if not bare.startswith("model.") else "language_model." + bare.removeprefix("model."))

    tensors = open_checkpoint(tiny_dir(family))
    usual = plan(tensors, checkpoint.family.table, shapes)
    other = plan({renamed(name): tensor for name, tensor in tensors.items()}, checkpoint.family.table, shapes)
    assert other.claimed == tuple(map(renamed, usual.claimed))
