"""A tiny Qwen2.5-VL: windows of 2 x 2 embeddings, so that small images have several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import FAMILIES, Shapes, put_decoder, put_layer

SEED = 3


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tokenizer, files, _ = FAMILIES["qwen2_vl"](size)
    config, vocabulary = files["config.json"], files["config.json"]["vocab_size"]
    config |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": size["tower_layers"], "hidden_act": "silu", "hidden_size": size["tower_width"],
            "intermediate_size": size["tower_mlp"], "num_heads": size["tower_heads"], "in_chans": 3,
            "out_hidden_size": size["width"], "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 56, "fullatt_block_indexes": [size["tower_layers"] - 2], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    files["generation_config.json"] |= {"repetition_penalty": 1.05}
    return tokenizer, files, _shapes(size, vocabulary)


def _shapes(size: Mapping[str, int], vocabulary: int) -> Shapes:
    shapes: Shapes = {"lm_head.weight": (vocabulary, size["width"])}
    put_decoder(shapes, "model.", size, vocabulary, bias=True)
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes["visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for i in range(size["tower_layers"]):
        block = f"visual.blocks.{i}."
        shapes[f"{block}norm1.weight"] = shapes[f"{block}norm2.weight"] = (width,)
        put_layer(shapes, block + "attn.qkv", 3 * width, width)
        put_layer(shapes, block + "attn.proj", width, width)
        put_layer(shapes, block + "mlp.gate_proj", mlp, width)
        put_layer(shapes, block + "mlp.up_proj", mlp, width)
        put_layer(shapes, block + "mlp.down_proj", width, mlp)
    shapes["visual.merger.ln_q.weight"] = (width,)
    put_layer(shapes, "visual.merger.mlp.0", 4 * width, 4 * width)
    put_layer(shapes, "visual.merger.mlp.2", size["width"], 4 * width)
    return shapes
