"""The parameter paths and shapes of three families, written by hand from a config.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Shapes = dict[str, tuple[int, ...]]


def decoder(config: Mapping[str, Any], kv: int, bias: bool, tied: bool) -> Shapes:
    width, heads, mlp = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    group, head = heads // kv, width // heads
    shapes: Shapes = {"text.embed": (config["vocab_size"], width), "text.norm": (width,)}
    if not tied:
        shapes["text.head"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"text.layers.{i}."
        shapes[layer + "attn_norm"] = shapes[layer + "mlp_norm"] = (width,)
        shapes[layer + "qkv"] = (width, kv, group + 2, head)
        if bias:
            shapes[layer + "qkv_bias"] = (kv, group + 2, head)
        shapes[layer + "o"] = (kv, group, head, width)
        shapes[layer + "gate_up"] = (width, 2, mlp)
        shapes[layer + "down"] = (mlp, width)
    return shapes


def tower(prefix: str, depth: int, width: int, heads: int, mlp: int) -> Shapes:
    head = width // heads
    sizes: Shapes = {
        "norm1": (width,),
        "norm1_bias": (width,),
        "norm2": (width,),
        "norm2_bias": (width,),
        "qkv": (width, 3, heads, head),
        "qkv_bias": (3, heads, head),
        "o": (heads, head, width),
        "o_bias": (width,),
        "fc1": (width, mlp),
        "fc1_bias": (mlp,),
        "fc2": (mlp, width),
        "fc2_bias": (width,),
    }
    return {f"{prefix}.layers.{name}": (depth, *shape) for name, shape in sizes.items()}


def qwen2_vl(config: Mapping[str, Any]) -> Shapes:
    vision = config["vision_config"]
    width = vision["embed_dim"]
    merged = 4 * width
    return {
        **decoder(config, config["num_key_value_heads"], bias=True, tied=config["tie_word_embeddings"]),
        **tower("vision", vision["depth"], width, vision["num_heads"], int(width * vision["mlp_ratio"])),
        "vision.patch": (1176, width),
        "vision.merger.norm": (width,),
        "vision.merger.norm_bias": (width,),
        "vision.merger.fc1": (merged, merged),
        "vision.merger.fc1_bias": (merged,),
        "vision.merger.fc2": (merged, config["hidden_size"]),
        "vision.merger.fc2_bias": (config["hidden_size"],),
    }


def llava(config: Mapping[str, Any]) -> Shapes:
    text, vision = config["text_config"], config["vision_config"]
    width, patch, wide = vision["hidden_size"], vision["patch_size"], text["hidden_size"]
    depth = vision["num_hidden_layers"] + config["vision_feature_layer"] + 1
    return {
        **decoder(text, text["num_key_value_heads"], bias=False, tied=False),
        **tower("vision", depth, width, vision["num_attention_heads"], vision["intermediate_size"]),
        "vision.class_embed": (width,),
        "vision.patch": (3 * patch * patch, width),
        "vision.positions": (1 + (vision["image_size"] // patch) ** 2, width),
        "vision.pre_norm": (width,),
        "vision.pre_norm_bias": (width,),
        "projector.fc1": (width, wide),
        "projector.fc1_bias": (wide,),
        "projector.fc2": (wide, wide),
        "projector.fc2_bias": (wide,),
    }


def whisper(config: Mapping[str, Any]) -> Shapes:
    width, heads, mlp = config["d_model"], config["decoder_attention_heads"], config["decoder_ffn_dim"]
    head = width // heads
    shapes: Shapes = {
        **tower("audio", config["encoder_layers"], width, config["encoder_attention_heads"], config["encoder_ffn_dim"]),
        "audio.conv1": (3, config["num_mel_bins"], width),
        "audio.conv1_bias": (width,),
        "audio.conv2": (3, width, width),
        "audio.conv2_bias": (width,),
        "audio.positions": (config["max_source_positions"], width),
        "audio.norm": (width,),
        "audio.norm_bias": (width,),
        "text.embed": (config["vocab_size"], width),
        "text.positions": (config["max_target_positions"], width),
        "text.norm": (width,),
        "text.norm_bias": (width,),
    }
    layer: Shapes = {
        "qkv": (width, heads, 3, head),
        "qkv_bias": (heads, 3, head),
        "o": (heads, 1, head, width),
        "o_bias": (width,),
        "cross_q": (width, heads, 1, head),
        "cross_q_bias": (heads, 1, head),
        "cross_kv": (width, heads, 2, head),
        "cross_kv_bias": (heads, 2, head),
        "cross_o": (heads, 1, head, width),
        "cross_o_bias": (width,),
        "fc1": (width, mlp),
        "fc1_bias": (mlp,),
        "fc2": (mlp, width),
        "fc2_bias": (width,),
        **{f"{name}{end}": (width,) for name in ("attn_norm", "cross_norm", "mlp_norm") for end in ("", "_bias")},
    }
    for i in range(config["decoder_layers"]):
        shapes.update({f"text.layers.{i}.{name}": shape for name, shape in layer.items()})
    return shapes


@pytest.fixture
def expected() -> Callable[[str, Path], Shapes]:
    """`expected(family, directory)`: what the checkpoint in `directory` must fill."""
    families = {"llava": llava, "qwen2_vl": qwen2_vl, "whisper": whisper}

    def shapes(family: str, directory: Path) -> Shapes:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for part in (config, config.get("text_config", {})):  # published files leave out what is equal
            if "num_attention_heads" in part:
                part.setdefault("num_key_value_heads", part["num_attention_heads"])
        return families[family](config)

    return shapes
